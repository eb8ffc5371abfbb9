"""The strategies of every op, and what they cost together: the cost network."""
