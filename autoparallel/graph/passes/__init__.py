"""Graph -> Graph: each pass makes one kind of thing explicit."""
