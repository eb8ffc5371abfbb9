"""What each operator allows: one rule per op, everything else derived from it."""
