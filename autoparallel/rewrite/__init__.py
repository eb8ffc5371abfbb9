"""From a plan to code: the same ops on local tensors, with collectives in between."""
