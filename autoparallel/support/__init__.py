"""Helpers that know nothing of the rest of the package: the one way to private names of torch."""
