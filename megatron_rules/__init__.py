"""Megatron's partition written by hand: the judge of what the planner finds."""
