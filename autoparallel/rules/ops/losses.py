"""Rules of losses."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import numel_hint
from autoparallel.graph.loss_ops import MEAN, OF_ELEMENTS
from autoparallel.placement import Collective, Invariant, Partial
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Kernel, OpCall, ShardingRule

# Torch's number for no `reduction`.
_NONE = 0


@rule("aten.cross_entropy_loss.default")
def cross_entropy(call: OpCall) -> ShardingRule:
    """loss = mean over tokens t of logsumexp_c(x[t, c]) - x[t, target[t]].

    Split over classes it takes an all-reduce of one number per token and one of two (Megatron-LM
    takes three of one, arXiv:1909.08053, section 3). Split over tokens, along any of their dims,
    each rank sums its own and divides by the global count.
    """
    logits = call.operands[0]
    plain = (
        len(logits.shape) >= 2
        and len(call.operands) == 2
        and not call.operands[1].dtype.is_floating_point
        and call.argument(4, "label_smoothing", 0.0) == 0.0
    )
    reduction = call.argument(3, "reduction", MEAN)
    # Weights, label smoothing and target probabilities have no kernel.
    if not plain:
        return _whole(call, reduction)
    per_token = numel_hint((logits.shape[0], *logits.shape[2:])) * logits.dtype.itemsize
    tokens = ["t", *(f"x{i}" for i in range(len(logits.shape) - 2))]
    rows = f"{' '.join(['t', 'c', *tokens[1:]])}, {' '.join(tokens)}"
    classes = Kernel(
        "cross_entropy_classes",
        Invariant(),
        ((Collective.ALL_REDUCE, per_token), (Collective.ALL_REDUCE, 2 * per_token)),
    )
    function = "cross_entropy_rows" if len(logits.shape) > 2 else ""
    if reduction == _NONE:
        per_row = ShardingRule.parse(f"{rows} -> {' '.join(tokens)}", call, kernels={"c": classes})
        return replace(per_row, function=function)
    # The one all-reduce is of the count, 8 bytes: tokens may be ignored, unevenly over the ranks.
    count = ((Collective.ALL_REDUCE, 8),) if reduction == MEAN else ()
    part = Kernel("cross_entropy_tokens", Partial(), count, wraps=True)
    kernels = {"c": classes, **dict.fromkeys(tokens, part)}
    rule_of_sum = ShardingRule.parse(f"{rows} -> ", call, kernels=kernels)
    return replace(rule_of_sum, function=function)


def _whole(call: OpCall, reduction: int) -> ShardingRule:
    """Return the rule of a loss that nothing splits; its loops are named all the same,
    to be counted.
    """
    logits = call.operands[0]
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


@rule("aten.nll_loss.default", "aten.nll_loss_nd.default")
def nll_loss(call: OpCall) -> ShardingRule:
    """-x[t, target[t], ..]: classes stay whole; so does all else if the mean is taken,
    for its count.
    """
    reduction = call.argument(3, "reduction", MEAN)
    rank = len(call.operands[0].shape)
    names = ["c"] if rank == 1 else ["t", "c", *(f"x{i}" for i in range(rank - 2))]
    tokens = " ".join(name for name in names if name != "c")
    weight = ", c" * (len(call.operands) - 2)
    return ShardingRule.parse(
        f"{' '.join(names)}, {tokens}{weight} -> {tokens if reduction == _NONE else ''}",
        call,
        whole=names if reduction == MEAN else ["c"],
    )


@rule("autoparallel.ctc_loss.default")
def ctc_loss(call: OpCall) -> ShardingRule:
    """The loss of each sequence n, over all its times t, classes c and labels s.

    Where the labels of a sequence begin in one row l of all labels, all of them say.
    """
    if len(call.operands[1].shape) == 1:
        return ShardingRule.parse("t n c, l, n, n -> n", call, whole="tncl")
    return ShardingRule.parse("t n c, n s, n, n -> n", call, whole="tcs")


@rule(*OF_ELEMENTS)
def elementwise_loss(call: OpCall) -> ShardingRule:
    """A loss of each element by itself, or their sum.

    A mean stays whole: it needs the global count.
    """
    reduction = call.argument(OF_ELEMENTS[call.node.target], "reduction", MEAN)
    rank = max(len(operand.shape) for operand in call.operands)
    names = [f"d{i}" for i in range(rank)]
    rows = [" ".join(names[rank - len(operand.shape) :]) for operand in call.operands]
    return ShardingRule.parse(
        f"{', '.join(rows)} -> {' '.join(names) if reduction == _NONE else ''}",
        call,
        whole=names if reduction == MEAN else [],
    )
