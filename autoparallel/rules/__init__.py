"""Sharding rules: one for each op, which says what the op allows; strategies follow from it.

A rule says of which loops a call is made; loop_splits.py has the ways to split one of them and
strategies.py the strategies, rules/ops has one file for each family of ops, registry.py holds the
table that they fill, lookup.py finds a rule in it, and user_rules.py takes rules from users. Facts
about ops belong here. The cost of a strategy is in cost/ and strategy/, rules that nobody wrote are
found in discovery/, and kernels that a rule names are in runtime/.
"""
