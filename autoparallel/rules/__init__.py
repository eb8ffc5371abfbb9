"""What each operator allows: one rule per op, from which everything else is derived.

A rule says of which loops a call is made; rule.py derives strategies, rules/ops has one file for
each family of ops, and registry.py finds a rule by the op's name. Facts about ops belong here. What
a strategy costs is in cost/ and strategy/, rules that nobody wrote are found in discovery/, and
kernels that a rule names are in runtime/.
"""
