"""Passes that undo flattening of batch x heads, so that each dim can be sharded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.graph.passes.editing import expand_to, rebuilt, reshape_to
from autoparallel.graph.row_program import ROUTED

__all__ = ["explicit_bias_of_batches", "is_pointwise", "shifted_arguments", "unmerge_batches"]


def explicit_bias_of_batches(graph: Graph) -> Graph:
    """baddbmm(%bias, %x, %y, beta, alpha) becomes bmm(%x, %y) * alpha + %bias * beta.

    Why: a product that is a pending sum is reduced before the bias is added, or the bias counts
    world_size times. After: no baddbmm is left; surviving nodes keep name, shape and dtype; a
    second run is a no-op.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target != "aten.baddbmm.default":
            nodes.append(node)
            continue
        bias, left, right = node.args[:3]
        grads = {ref.name: graph.values[ref.name].requires_grad for ref in (bias, left, right)}
        product = replace(
            node.result,
            name=f"{node.name}_product",
            requires_grad=node.result.requires_grad and (grads[left.name] or grads[right.name]),
        )
        added = replace(
            graph.values[bias.name],
            name=f"{node.name}_bias",
            requires_grad=node.result.requires_grad and grads[bias.name],
        )

        def produce(value: Value, target: str, *args: Any, like: Node = node) -> Node:
            """Return a call that produces the value, at the node's place in the program."""
            return replace(
                like, name=value.name, target=target, results=(value,), args=args, kwargs=()
            )

        nodes.append(produce(product, "aten.bmm.default", left, right))
        alpha, beta = node.keyword("alpha", 1), node.keyword("beta", 1)
        if alpha != 1:
            scaled = replace(product, name=f"{node.name}_scaled")
            nodes.append(produce(scaled, "aten.mul.Tensor", Ref(product.name), alpha))
            product = scaled
        if beta != 1:
            nodes.append(produce(added, "aten.mul.Tensor", bias, beta))
            bias = Ref(added.name)
        nodes.append(produce(node.result, "aten.add.Tensor", Ref(product.name), bias))
    return rebuilt(graph, nodes, {})


def unmerge_batches(graph: Graph) -> Graph:
    """bmm(reshape(%x, (b*h, s, k)), ..) becomes reshape(matmul(%x, ..), (b*h, s, t)).

    %x has the shape (b, h, s, k). And linear(reshape(%x, (b*s, k)), ..) becomes reshape(linear(%x,
    ..), (b*s, n)). So do all ops between such a reshape and the one that undoes it, if they treat
    the merged dim as a batch: element by element, row by row, matrix by matrix.

    Why: of dims merged into one of an unknown size only the first can be sharded, and nobody needed
    them merged. After: no such op has an operand that was merged like that; all values keep name
    and shape, and those that nobody reads are left to `drop_unused`.
    """
    return _Unmerger(graph).run()


@dataclass(frozen=True, slots=True)
class _Apart:
    """A merged value, seen apart: it is a reshape of `value`,
    which has the dims `batch` in place of its first.
    """

    value: Value
    batch: tuple[Dim, ...]


@dataclass
class _Unmerger:
    """One run of the pass. nodes: of the new graph. apart: merged values seen apart, by name."""

    graph: Graph
    nodes: list[Node] = field(default_factory=list)
    apart: dict[str, _Apart] = field(default_factory=dict)

    def run(self) -> Graph:
        """Return the new graph: ops on merged batches run on unmerged ones,
        and their results are merged after that.
        """
        for node in self.graph.nodes:
            unmerged = self.instead(node) if node.kind == "call" else None
            if unmerged is None:
                self.nodes.append(node)
                if node.target == "aten.reshape.default":
                    self.note_merge(node)
                elif node.target == "aten.repeat.default":
                    self.note_repeat(node)
            elif unmerged.results[0].shape == node.results[0].shape:
                self.nodes.append(replace(unmerged, name=node.name, results=node.results))
            else:
                self.nodes.append(unmerged)
                for value, result in zip(node.results, unmerged.results, strict=True):
                    self.nodes.append(reshape_to(node, value, result))
                    count = len(result.shape) - len(value.shape) + 1
                    self.apart[value.name] = _Apart(result, result.shape[:count])
        return rebuilt(self.graph, self.nodes, {})

    def note_merge(self, node: Node) -> None:
        """Remember a reshape that merges the first dims and leaves the others."""
        before, after = self.graph.values[node.operands()[0]], node.result
        count = len(before.shape) - len(after.shape) + 1
        merged = before.shape[:count]
        if not any(isinstance(size, Sym) for size in merged):
            return  # loops see through it
        # The dims behind the merged ones must be untouched.
        if count > 1 and len(after.shape) > 1 and before.shape[count:] == after.shape[1:]:
            self.apart[after.name] = _Apart(before, before.shape[:count])

    def note_repeat(self, node: Node) -> None:
        """Write repeat(%x, (n, 1, 1)) as an expansion: %x once for each of n,
        merged with its first dim.
        """
        source, (times, *others) = self.graph.values[node.operands()[0]], node.args[1]
        if len(node.args[1]) != len(source.shape) or any(other != 1 for other in others):
            return
        once = replace(source, name=f"{node.name}_once", shape=(1, *source.shape))
        apart = replace(node.result, name=f"{node.name}_apart", shape=(times, *source.shape))
        self.nodes += [reshape_to(node, once, source), expand_to(node, apart, once)]
        self.apart[node.name] = _Apart(apart, apart.shape[:2])

    def instead(self, node: Node) -> Node | None:
        """Return the same call on batches that are not merged;
        None where it is no call for each of them.
        """
        merged = next((name for name in node.operands() if name in self.apart), None)
        if merged is None or any(len(result.shape) < 2 for result in node.results):
            return None
        apart, first = self.apart[merged], self.graph.values[merged].shape[0]
        values = tuple(
            replace(result, name=f"{result.name}_apart", shape=(*apart.batch, *result.shape[1:]))
            for result in node.results
        )
        if node.target == "aten.reshape.default":
            if node.result.shape[: len(apart.batch)] == apart.batch:
                return reshape_to(node, node.result, apart.value)
            return (
                reshape_to(node, values[0], apart.value) if node.result.shape[0] == first else None
            )
        if node.target == "aten.expand.default" and node.args[1][0] in (first, -1):
            return expand_to(node, values[0], apart.value)
        args = shifted_arguments(node, len(self.graph.values[merged].shape), len(apart.batch) - 1)
        if args is None or any(result.shape[0] != first for result in node.results):
            return None
        # Its other operands are weights, which have no batch.
        if node.target in _OF_ROWS:
            if node.operands()[0] != merged:
                return None
            args = (Ref(apart.value.name), *node.args[1:])
            return replace(node, name=values[0].name, results=values, args=args)
        names = _with_batch(node)
        shapes = [self.graph.values[name].shape for name in names]
        if not is_pointwise(node.target) and any(shape[0] != first for shape in shapes):
            return None
        reads = {name: name for name in node.operands()}
        for name in names:
            reads[name] = self.operand(node, name, apart.batch, first)

        def leaf(item: Any) -> Any:
            """Return the argument, with values of merged batches replaced by unmerged ones."""
            return Ref(reads[item.name]) if isinstance(item, Ref) else item

        return replace(
            node,
            name=f"{node.name}_apart",
            target="aten.matmul.default" if node.target in _PRODUCTS else node.target,
            results=values,
            args=map_leaves(leaf, args),
            kwargs=map_leaves(leaf, node.kwargs),
        )

    def operand(self, reader: Node, name: str, batch: tuple[Dim, ...], first: Dim) -> str:
        """Return the name of a value with `batch` in place of its first dim,
        if that dim is merged.
        """
        value, known = self.graph.values[name], self.apart.get(name)
        if known is not None and known.batch == batch:
            return known.value.name
        # Broadcast against the batch, it has no merged dim to take apart.
        if len(value.shape) < len(reader.results[0].shape) and reader.target != ROUTED:
            return name
        first_dims = batch if value.shape[0] == first else (1,) * len(batch)
        reshaped = replace(
            value, name=f"{reader.name}_{name}", shape=(*first_dims, *value.shape[1:])
        )
        self.nodes.append(reshape_to(reader, reshaped, value))
        return reshaped.name


def shifted_arguments(node: Node, rank: int, extra: int) -> tuple[Any, ...] | None:
    """Return the call's args for operands with `extra` more dims in front.

    rank: of the merged operand. None where the call is not one for each place in the first dim.
    """
    if node.target in _PRODUCTS:
        return node.args if rank == 3 else None
    if is_pointwise(node.target):
        return node.args
    if node.target in _OF_ROWS:
        dims = len(node.args[1]) if "norm" in node.target else 1
        return node.args if dims < rank else None
    if node.target == ROUTED:
        return node.args
    positions = _DIMS.get(node.target)
    if positions is None:
        return None
    # Ops that leave the dim out work along the last one.
    positions = tuple(index for index in positions if index < len(node.args))
    last = node.target in _LAST_BY_DEFAULT and node.keyword("dim") is None
    if not positions and not last:
        return None
    args = list(node.args)
    # A new dim may also lie behind all others.
    rank += node.target == "aten.unsqueeze.default"
    for index in positions:
        given = args[index]
        named: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
        # The call works along the merged dim itself, and so not on each place by itself; no dim
        # stands for all of them.
        if not named or any(not isinstance(dim, int) or dim % rank == 0 for dim in named):
            return None
        shifted = tuple(dim % rank + extra for dim in named)
        args[index] = shifted if isinstance(given, tuple) else shifted[0]
    return tuple(args)


def _with_batch(node: Node) -> tuple[str, ...]:
    """Return the operands of a call that have its batch: all but the weights of experts."""
    if node.target != ROUTED:
        return node.operands()
    rows, experts, values = node.args[:3]
    return tuple(ref.name for ref in (*rows, experts, *values))


def is_pointwise(target: str) -> bool:
    """Return whether the op computes each element by itself, by torch's own tag."""
    tags = getattr(operator_of(target), "tags", ())
    return torch.Tag.pointwise in tags or target in _ALSO_POINTWISE


_PRODUCTS = {"aten.bmm.default", "aten.matmul.default"}
# Of the last dims of the first operand, whatever lies before them.
_OF_ROWS = {"aten.linear.default", "aten.layer_norm.default", "aten.rms_norm.default"}
_ALSO_POINTWISE = {
    "aten.to.dtype",
    "aten.detach.default",
    "aten.dropout.default",
    "aten.zeros_like.default",
    "aten.ones_like.default",
    "aten.full_like.default",
}
# Where the call names dims of its operand.
_DIMS = {
    "aten.transpose.int": (1, 2),
    "aten.softmax.int": (1,),
    "aten.log_softmax.int": (1,),
    "aten.gather.default": (1,),
    "aten.slice.Tensor": (1,),
    "aten.select.int": (1,),
    "aten.mean.dim": (1,),
    "aten.topk.default": (2,),
    "aten.sort.default": (1,),
    "aten.argsort.default": (1,),
    "aten.sum.dim_IntList": (1,),
    "aten.amax.default": (1,),
    "aten.amin.default": (1,),
    "aten.scatter.value": (1,),
    "aten.scatter.src": (1,),
    "aten.scatter_add.default": (1,),
    "aten.unsqueeze.default": (1,),
}
_LAST_BY_DEFAULT = {"aten.topk.default", "aten.sort.default", "aten.argsort.default"}
