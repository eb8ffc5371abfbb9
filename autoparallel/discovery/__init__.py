"""Rules for ops that have none: found by running the op on small tensors, and proven."""
