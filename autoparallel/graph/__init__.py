"""From a module to a verified dataflow graph."""
