"""Losses."""

from __future__ import annotations

from autoparallel.graph.graph import numel_hint
from autoparallel.placement import Collective, Invariant, Partial
from autoparallel.rules.pointwise import broadcast
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Kernel, OpCall, ShardingRule

_MEAN, _NONE = 1, 0


@rule("aten.cross_entropy_loss.default")
def cross_entropy(call: OpCall) -> ShardingRule:
    """loss = mean over tokens t of logsumexp_c(x[t, c]) - x[t, target[t]].

    Split over classes: an all-reduce of one number per token and one of two (Megatron-LM takes
    three of one, arXiv:1909.08053, section 3).
    Split over tokens: each rank sums its own and divides by the global count.
    """
    logits = call.operands[0]
    plain = (
        len(logits.shape) == 2
        and len(call.operands) == 2
        and not call.operands[1].dtype.is_floating_point
        and call.argument(4, "label_smoothing", 0.0) == 0.0
    )
    reduction = call.argument(3, "reduction", _MEAN)
    if not plain:
        names = ["c"] if len(logits.shape) == 1 else ["t", "c"]
        names += [f"x{i}" for i in range(len(logits.shape) - 2)]
        rows = [" ".join(names)]
        for operand in call.operands[1:]:
            if operand.shape == logits.shape:
                rows.append(" ".join(names))
            elif len(operand.shape) == len(logits.shape) - 1:
                rows.append(" ".join(name for name in names if name != "c"))
            else:
                rows.append("c")
        out = " ".join(name for name in names if name != "c") if reduction == _NONE else ""
        return ShardingRule.parse(f"{', '.join(rows)} -> {out}", call, whole=names)
    per_token = numel_hint(logits.shape[:1]) * logits.dtype.itemsize
    classes = Kernel(
        "cross_entropy_classes",
        Invariant(),
        ((Collective.ALL_REDUCE, per_token), (Collective.ALL_REDUCE, 2 * per_token)),
    )
    if reduction == _NONE:
        return ShardingRule.parse("t c, t -> t", call, kernels={"c": classes})
    tokens = Kernel("cross_entropy_tokens", Partial(), ((Collective.ALL_REDUCE, 8),))
    return ShardingRule.parse("t c, t -> ", call, kernels={"c": classes, "t": tokens})


@rule("aten.mse_loss.default", "aten.l1_loss.default", "aten.smooth_l1_loss.default")
def elementwise_loss(call: OpCall) -> ShardingRule:
    """Reduced over all elements: whole, unless it is not reduced at all."""
    dims, sizes = broadcast(call) if call.results[0].shape else ((), {})
    if dims:
        return ShardingRule(dims[:2], dims[2:], sizes)
    notation = " ".join(f"d{i}" for i in range(len(call.operands[0].shape)))
    return ShardingRule.parse(
        f"{notation}, {notation} -> ",
        call,
        whole=[f"d{i}" for i in range(len(call.operands[0].shape))],
    )
