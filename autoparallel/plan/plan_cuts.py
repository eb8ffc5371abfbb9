"""The cuts of dims that a plan makes: by them a program says whether ranks drop the same copies."""

from __future__ import annotations

from collections.abc import Iterator

from autoparallel.graph.graph import Dim, Graph
from autoparallel.placement import Shard
from autoparallel.plan.plan import Plan

__all__ = ["Cut", "cuts_of"]

# The size of a dim, and the splits of it, outermost first, each with the number of its mesh axis.
Cut = tuple[Dim, tuple[tuple[int, Shard], ...]]


def cuts_of(graph: Graph, plan: Plan) -> Iterator[Cut]:
    """Yield every cut of a dim of what ops read and make, once for each shape and layout.

    graph: that of the plan, or of one of its stages.

    Example: `set(cuts_of(plan.captured.graph, plan))`
    """
    values = graph.values
    tensors = dict.fromkeys(
        (values[name].shape, layout)
        for op in plan.ops
        for names, layouts in ((op.reads, op.operands), (op.makes, op.results))
        for name, layout in zip(names, layouts, strict=True)
    )
    for shape, layout in tensors:
        for dim, size in enumerate(shape):
            splits = tuple(
                (axis, cut)
                for axis, cut in enumerate(layout)
                if isinstance(cut, Shard) and cut.dim == dim
            )
            if splits:
                yield size, splits
