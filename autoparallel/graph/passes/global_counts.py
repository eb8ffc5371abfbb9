"""The pass that takes the division by a count out of losses, for graphs whose batch comes in
parts, one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Value, hint
from autoparallel.graph.loss_ops import MEAN, OF_ELEMENTS, OF_LABELS, SUM
from autoparallel.graph.passes.bias_and_mean import count_of
from autoparallel.graph.passes.editing import rebuilt

__all__ = ["split_loss_counts"]

# What torch's schemas have before `reduction` and, of losses of labels, behind it.
_IGNORED, _SMOOTHING = (4, "ignore_index", -100), (5, "label_smoothing", 0.0)


def split_loss_counts(graph: Graph) -> Graph:
    """cross_entropy(%x, %t, mean) becomes cross_entropy(%x, %t, sum) / sum(%t != ignored).

    Why: a part of the batch knows its own sum, and not how many labels of all the batch count. That
    number follows from the labels alone, and can be known before any part is computed. So it is for
    means over elements, whose number is a size. After: no loss of such parts takes a mean by
    itself; surviving nodes keep name, shape and dtype; a second run is a no-op. Losses with weights
    of classes or smoothed labels stay, and so do those in float16, whose sum may be larger than any
    number of that type.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        place = {**OF_ELEMENTS, **OF_LABELS}.get(node.target)
        if place is None or node.argument(place, "reduction", MEAN) != MEAN:
            nodes.append(node)
            continue
        operands = [graph.values[name] for name in node.operands()]
        count: list[Node] | Dim | None
        if node.target in OF_LABELS:
            count = _labels(node, operands)
        else:
            count = _elements(operands)
        if count is None or node.result.dtype == torch.float16:
            nodes.append(node)
            continue
        total = replace(node.result, name=f"{node.name}_sum")
        over: Any = count
        if isinstance(count, list):
            nodes += count
            over = Ref(count[-1].name)
        nodes.append(_with_sum(node, total, place))
        nodes.append(
            replace(node, target="aten.div.Tensor", args=(Ref(total.name), over), kwargs=())
        )
    return rebuilt(graph, nodes, {})


def _with_sum(node: Node, total: Value, place: int) -> Node:
    """Return the loss with the sum in place of the mean, under another name."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if len(args) > place:
        args[place] = SUM
    else:
        kwargs["reduction"] = SUM
    return replace(
        node, name=total.name, results=(total,), args=tuple(args), kwargs=tuple(kwargs.items())
    )


def _labels(node: Node, operands: list[Value]) -> list[Node] | None:
    """Return the nodes that count a loss's labels, the last of which has the count.

    None where the loss divides by something else: by weights of classes, or by classes that are
    likely in part.
    """
    plain = len(operands) == 2 and not operands[1].dtype.is_floating_point
    if not plain or node.argument(*_SMOOTHING) != 0.0:
        return None
    labels = operands[1]
    counted = Value(f"{node.name}_counted", labels.shape, torch.bool)
    count = Value(f"{node.name}_count", (), torch.int64)
    ignored = node.argument(*_IGNORED)
    return [
        replace(
            node,
            name=counted.name,
            target="aten.ne.Scalar",
            results=(counted,),
            args=(Ref(labels.name), ignored),
            kwargs=(),
        ),
        replace(
            node,
            name=count.name,
            target="aten.sum.dim_IntList",
            results=(count,),
            args=(Ref(counted.name), tuple(range(len(labels.shape))), False),
            kwargs=(),
        ),
    ]


def _elements(operands: list[Value]) -> Dim | None:
    """Return the number of elements of a loss's first two operands, None where one is repeated to
    fit the other.
    """
    first, second = operands[:2]
    if len(first.shape) != len(second.shape) or any(
        hint(one) != hint(other) for one, other in zip(first.shape, second.shape, strict=True)
    ):
        return None
    return count_of(first.shape)
