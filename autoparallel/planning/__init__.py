"""From a model and what is asked of it to a plan."""
