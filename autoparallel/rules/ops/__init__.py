"""One rule per op."""
