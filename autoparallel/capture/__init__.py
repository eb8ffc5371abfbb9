"""From a module and example inputs to a Graph."""
