"""Rules of ops that nobody wrote one for, found by running the op on small tensors, and proven.

Here belong small sizes for a call, the dependence of results on operands, the trial of every
strategy against the unsplit op, and the cache on disk. The validation is also the oracle of written
rules. The form of a rule is in rules/, and the generic kernels that a discovered rule may name are
in runtime/.
"""
