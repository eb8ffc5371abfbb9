"""Bundled plain models and the small trainer around them."""
