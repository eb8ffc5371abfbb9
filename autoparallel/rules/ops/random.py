"""Rules of ops that draw random numbers: an element's number is keyed by its place in the whole."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.operators import packet_of
from autoparallel.rules.ops.pointwise import pointwise
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import OpCall, ShardingRule

# The function of runtime/random_ops.py that runs each op.
_FUNCTIONS = {"rand": "rand", "rand_like": "rand", "randn": "randn", "randn_like": "randn"}


@rule("aten.dropout.default")
def dropout(call: OpCall) -> ShardingRule:
    """A mask keyed by the element's place in the whole tensor, the same on all ranks: linear,
    given the mask.
    """
    return replace(pointwise(call, {0}), random="dropout")


@rule(*(f"aten.{name}.default" for name in _FUNCTIONS))
def drawn(call: OpCall) -> ShardingRule:
    """Random numbers of a given shape, keyed by place.

    Nothing else is read of a tensor of that shape.
    """
    return replace(pointwise(call), random=_FUNCTIONS[packet_of(call.node.target)])
