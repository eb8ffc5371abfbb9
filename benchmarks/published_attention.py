"""The predicted seconds of fused attention by itself, for the figures of published.json."""

from __future__ import annotations

import torch

from autoparallel.cost.hardware import Hardware
from autoparallel.cost.op_costs import op_costs
from autoparallel.graph.graph import Node, Ref, Value
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.rule import OpCall
from autoparallel.rules.strategies import strategies

__all__ = ["attention_seconds"]


def attention_seconds(
    shape: tuple[int, ...], causal: bool, hardware: Hardware
) -> tuple[float, float]:
    """Return the seconds of fused attention, forward and in all, on one device.

    shape: of queries, keys and values alike.
    """
    target = "aten.scaled_dot_product_attention.default"
    *operands, result = (Value(name, shape, torch.bfloat16, True) for name in "qkvy")
    refs = tuple(Ref(operand.name) for operand in operands)
    node = Node(result.name, "call", target, (result,), refs, (("is_causal", causal),))
    author, call = find_rule(target), OpCall(node, tuple(operands))
    assert author is not None
    rule = author(call)
    (whole, *_) = strategies(rule, [], (True,) * 3, (True,), 1)
    (cost,) = op_costs(call, rule, [(whole,)], [(1, hardware.inside)], hardware)
    return cost.forward, cost.seconds
