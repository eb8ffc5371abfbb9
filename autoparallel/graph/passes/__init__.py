"""Passes from graph to graph, each of which makes one kind of thing explicit.

A pass is a pure function with its own file and a golden text under tests/graph/passes;
run_passes.py has their order. Rewrites that help a split to be seen belong here. What depends on
hardware or on a plan does not: a graph after its passes is the same for every plan. Ops are named
here and in rules/, nowhere else.
"""
