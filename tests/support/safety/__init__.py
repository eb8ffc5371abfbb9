"""The rows of docs/safety.md: each tries something, and says how often what happened."""
