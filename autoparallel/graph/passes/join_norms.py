"""A pass that sees a root mean square norm in the ops that a library spells it out by."""

from __future__ import annotations

from dataclasses import replace

import torch

from autoparallel.graph.graph import Graph, Node, Ref, Value
from autoparallel.graph.passes.editing import first_operand, rebuilt

__all__ = ["join_norms"]

_NORM = "aten.rms_norm.default"


def join_norms(graph: Graph) -> Graph:
    """mul(%w, mul(%x, rsqrt(add(mean(pow(%x, 2), (-1,), True), eps)))) becomes
    rms_norm(%x, (n,), %w, eps), and with it go casts to single precision and back.

    Why: in single precision a norm of half precision keeps and moves several times the bytes that
    its one kernel does. After: a norm that is computed as the kernel does is one call; values
    between, which nobody reads any more, are left to `drop_unused`. A second run is a no-op.
    """
    return _Joiner(graph).run()


class _Joiner:
    """One run of the pass. by_name: the nodes as they are now, by their result."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.by_name = {value.name: node for node in graph.nodes for value in node.results}

    def run(self) -> Graph:
        """Return the new graph. Norms grow as their readers are met: a cast, then a weight."""
        nodes = []
        for node in self.graph.nodes:
            joined = self.norm(node) or self.narrowed(node) or self.weighted(node)
            if joined is not None:
                self.by_name[joined.result.name] = node = joined
            nodes.append(node)
        return rebuilt(self.graph, nodes, {})

    def norm(self, node: Node) -> Node | None:
        """Return the norm that a product of rows with their inverse root mean squares is."""
        for rows, factors in _both_ways(node, "aten.mul.Tensor"):
            root = self.only_read(factors, "aten.rsqrt.default")
            total = self.only_read(root.args[0], "aten.add.Tensor") if root else None
            if total is None or total.kwargs or not isinstance(total.args[1], (int, float)):
                continue
            mean = self.only_read(total.args[0], "aten.mean.dim")
            squares = self.only_read(mean.args[0], "aten.pow.Tensor_Scalar") if mean else None
            if mean is None or squares is None or squares.args[1] != 2:
                continue
            x = self.graph.values[first_operand(squares)]
            dims = mean.argument(1, "dim")
            last = dims in ((-1,), (len(x.shape) - 1,)) and mean.argument(2, "keepdim", False)
            # Rows that the user has rounded, or made integers of, are others than x.
            same = rows.name in (x.name, self.uncast(x.name))
            kinds = {x.dtype, mean.result.dtype, node.result.dtype}
            alike = len(kinds) == 1 and last and same
            if alike and x.shape and isinstance(x.shape[-1], int):
                return _as_norm(node, x, None, float(total.args[1]))
        return None

    def narrowed(self, node: Node) -> Node | None:
        """Return the norm of what was cast to single precision for it, where its result is cast
        back: the kernel computes in single precision by itself.
        """
        norm = self.norm_read_by(node.args[0]) if node.target == "aten.to.dtype" else None
        if norm is None or norm.args[2] is not None or norm.result.dtype is not torch.float32:
            return None
        narrow = self.graph.values.get(self.uncast(first_operand(norm)))
        if narrow is None or narrow.dtype is not node.result.dtype:
            return None
        if narrow.dtype not in (torch.float16, torch.bfloat16):
            return None
        return _as_norm(node, narrow, None, norm.args[3])

    def weighted(self, node: Node) -> Node | None:
        """Return the norm with a weight that a product of a norm and a vector is."""
        for scaled, vector in _both_ways(node, "aten.mul.Tensor"):
            norm = self.norm_read_by(scaled)
            weight = self.graph.values[vector.name]
            if norm is None or norm.args[2] is not None or weight.shape != norm.args[1]:
                continue
            if weight.dtype is norm.result.dtype is node.result.dtype:
                x = self.graph.values[first_operand(norm)]
                return _as_norm(node, x, vector, norm.args[3])
        return None

    def only_read(self, argument: object, target: str) -> Node | None:
        """Return the call of an op that makes an argument which is read once; None else."""
        node = self.by_name.get(argument.name) if isinstance(argument, Ref) else None
        if node is None or node.target != target or node.result.name in self.graph.outputs:
            return None
        return node if len(self.graph.readers[node.result.name]) <= 1 else None

    def norm_read_by(self, argument: object) -> Node | None:
        """Return the norm that makes an argument which is read once; None where there is none."""
        return self.only_read(argument, _NORM)

    def uncast(self, name: str) -> str:
        """Return the value that a value is cast from; "" where it is none."""
        node = self.by_name[name]
        return first_operand(node) if node.target == "aten.to.dtype" else ""


def _both_ways(node: Node, target: str) -> list[tuple[Ref, Ref]]:
    """Return the two tensors that a call of an op joins, in either order."""
    if node.target != target or node.kwargs:
        return []
    one, two = node.args[:2]
    if not (isinstance(one, Ref) and isinstance(two, Ref)):
        return []
    return [(one, two), (two, one)]


def _as_norm(node: Node, x: Value, weight: Ref | None, eps: float) -> Node:
    """Return a node as the norm of the last dim of a value."""
    args = (Ref(x.name), x.shape[-1:], weight, eps)
    return replace(node, target=_NORM, args=args, kwargs=())
