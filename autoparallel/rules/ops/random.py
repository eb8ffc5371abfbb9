"""Ops that draw random numbers: an element's number is keyed by its place in the whole."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.operators import packet_of
from autoparallel.rules.ops.pointwise import pointwise
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import OpCall, ShardingRule

_FUNCTIONS = {"rand": "rand", "rand_like": "rand", "randn": "randn", "randn_like": "randn"}


@rule("aten.dropout.default")
def dropout(call: OpCall) -> ShardingRule:
    """A mask keyed by the global element index, so linear with the same mask on all ranks."""
    return replace(pointwise(call, {0}), random="dropout")


@rule(*(f"aten.{name}.default" for name in _FUNCTIONS))
def drawn(call: OpCall) -> ShardingRule:
    """Numbers for a given shape. Of a tensor of that shape nothing else is read."""
    return replace(pointwise(call), random=_FUNCTIONS[packet_of(call.node.target)])
