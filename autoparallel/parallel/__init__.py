"""The parallel module that the user gets."""
