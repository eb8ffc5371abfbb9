"""Graph -> Graph: each pass makes one kind of thing explicit, and is verified after it ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from autoparallel.graph.graph import (
    Dim,
    Graph,
    Node,
    Ref,
    Sym,
    map_leaves,
    numel_hint,
)
from autoparallel.graph.passes.attention_dropout import explicit_attention_dropout
from autoparallel.graph.passes.editing import Rename, first_operand, rebuilt, renamed
from autoparallel.graph.passes.flattened_batches import (
    explicit_bias_of_batches,
    unflatten_products,
    unmerge_batches,
    unmerge_losses,
)
from autoparallel.graph.passes.functionalize import functional
from autoparallel.graph.passes.join_slices import join_slices
from autoparallel.graph.passes.merged_dims import see_through_merges
from autoparallel.graph.passes.no_grad import explicit_stops

__all__ = ["PASSES", "run_passes", "with_larger_hints"]


def _aliasing(test: Callable[[Node, Graph], str | None]) -> Callable[[Graph], Graph]:
    """A pass that drops nodes whose result is just the value that `test` names."""

    def run(graph: Graph) -> Graph:
        nodes: list[Node] = []
        names: Rename = {}
        for node in graph.nodes:
            node = renamed(node, names)
            same = test(node, graph) if node.kind == "call" else None
            if same is None:
                nodes.append(node)
            else:
                names[node.result.name] = same
        return rebuilt(graph, nodes, names)

    return run


_IDENTITY = {
    "aten.contiguous.default",
    "aten.alias.default",
    "aten.clone.default",
    "aten.lift_fresh_copy.default",
    "aten.detach_.default",
}
_SAME_SHAPE = {
    "aten.view.default",
    "aten.reshape.default",
    "aten.expand.default",
    "aten._unsafe_view.default",
    "aten.slice.Tensor",
    "aten.unflatten.int",
    "aten.flatten.using_ints",
    "aten.squeeze.dim",
}
_CASTS = {"aten.to.dtype", "aten.to.dtype_layout", "aten.to.device"}


def _is_identity(node: Node, graph: Graph) -> str | None:
    if node.target in _IDENTITY:
        return first_operand(node)
    if len(node.results) != 1 or not node.args or not isinstance(node.args[0], Ref):
        return None
    operand = graph.values[first_operand(node)]
    result = node.result
    if node.target in _SAME_SHAPE and operand.shape == result.shape:
        return operand.name
    if node.target in _CASTS and operand.dtype == result.dtype:
        return operand.name
    if node.target == "aten.dropout.default" and (node.args[1] == 0 or not node.args[2]):
        return operand.name
    if (
        node.target in ("aten.add.Tensor", "aten.sub.Tensor")
        and not isinstance(node.args[1], (Ref, Sym))
        and node.args[1] == 0
        and operand.dtype == result.dtype
    ):
        return operand.name
    return None


drop_identities = _aliasing(_is_identity)
drop_identities.__doc__ = """Casts to the same type, views to the same shape, dropout of nothing.

Why: each would be an operator with strategies of its own. After: none left.
"""


def drop_empty_parts(graph: Graph) -> Graph:
    """cat([%empty, %x]) becomes cat([%x]), and cat([%x]) becomes %x.

    Why: caches start as tensors of shape (0,), which cat ignores whatever its dim.
    After: no cat reads a tensor of shape (0,); a second run is a no-op.
    """
    nodes: list[Node] = []
    names: Rename = {}
    for node in graph.nodes:
        node = renamed(node, names)
        if node.target == "aten.cat.default":
            parts = tuple(part for part in node.args[0] if graph.values[part.name].shape != (0,))
            if len(parts) == 1:
                names[node.result.name] = parts[0].name
                continue
            node = replace(node, args=(parts or node.args[0], *node.args[1:]))
        nodes.append(node)
    return rebuilt(graph, nodes, names)


def explicit_sizes(graph: Graph) -> Graph:
    """view(%x, (b, -1)) becomes view(%x, (b, 48)): sizes written out, one spelling for each view.

    And one for each expansion: broadcast_tensors([%x, %y]) becomes expand(%x, ..), expand(%y, ..).

    Why: a size is what the rewriter replaces by a local one. After: no -1 and no flatten left.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target in _VIEWS:
            node = replace(
                node,
                target="aten.reshape.default",
                args=(node.args[0], node.result.shape),
                kwargs=(),
            )
        elif node.target in _EXPANSIONS:
            parts = node.args[0] if isinstance(node.args[0], tuple) else (node.args[0],)
            for part, value in zip(parts, node.results, strict=True):
                name = node.name if len(parts) == 1 else value.name
                own = replace(node, name=name, results=(value,), args=(part, value.shape))
                nodes.append(replace(own, target="aten.expand.default", kwargs=()))
            continue
        nodes.append(node)
    return rebuilt(graph, nodes, {})


_VIEWS = {
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.view_as.default",
    "aten.reshape_as.default",
}
_EXPANSIONS = {
    "aten.expand.default",
    "aten.expand_as.default",
    "aten.broadcast_to.default",
    "aten.broadcast_tensors.default",
}


def types_alone(graph: Graph) -> Graph:
    """new_zeros(%x, (b, 4)) becomes zeros((b, 4)), and type_as(%y, %x) to(%y), of the type of %x.

    Why: of the operand only the type is read, so it matters to nobody how it lies.
    After: no new_empty, new_zeros, new_ones, new_full, type_as and to.other left.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target in _CREATIONS:
            value = replace(node.result, requires_grad=False)
            kwargs = (("dtype", value.dtype), ("device", torch.device("cpu")))
            node = replace(
                node,
                target=_CREATIONS[node.target],
                results=(value,),
                args=node.args[1:],
                kwargs=kwargs,
            )
        elif node.target in _CASTS_TO_ANOTHER:
            dtype = node.result.dtype
            node = replace(node, target="aten.to.dtype", args=(node.args[0], dtype), kwargs=())
        nodes.append(node)
    return rebuilt(graph, nodes, {})


_CASTS_TO_ANOTHER = {"aten.type_as.default", "aten.to.other"}
_CREATIONS = {
    "aten.new_empty.default": "aten.empty.memory_format",
    "aten.new_zeros.default": "aten.zeros.default",
    "aten.new_ones.default": "aten.ones.default",
    "aten.new_full.default": "aten.full.default",
}


def merge_reshapes(graph: Graph) -> Graph:
    """reshape(reshape(%x, a), b) becomes reshape(%x, b).

    Why: flattening and unflattening again must not hide a dim in between.
    After: no reshape reads a reshape.
    """
    nodes: list[Node] = []
    kept: dict[str, Node] = {}
    for node in graph.nodes:
        if node.target == "aten.reshape.default":
            before = kept.get(first_operand(node))
            if before is not None and before.target == "aten.reshape.default":
                node = replace(node, args=(before.args[0], node.args[1]))
        nodes.append(node)
        for value in node.results:
            kept[value.name] = node
    return rebuilt(graph, nodes, {})


def split_bias(graph: Graph) -> Graph:
    """linear(%x, %w, %bias) becomes add(linear(%x, %w), %bias).

    Why: a row-parallel product is reduced before the bias is added, or the bias counts
    world_size times. After: no linear has a bias; surviving nodes keep name, shape and dtype.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target == "aten.linear.default" and len(node.args) > 2 and node.args[2] is not None:
            value = replace(node.result, name=f"{node.name}_product")
            nodes.append(replace(node, name=value.name, results=(value,), args=node.args[:2]))
            node = replace(
                node, target="aten.add.Tensor", args=(Ref(value.name), node.args[2]), kwargs=()
            )
        nodes.append(node)
    return rebuilt(graph, nodes, {})


def split_mean(graph: Graph) -> Graph:
    """mean(%x, dims) becomes sum(%x, dims) / count, with the global count.

    Why: a mean over a split dim must not divide by the local count. After: no mean left. Numbers of
    16 bits are added up as float32, as they are in a mean: their sum may be none of them.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target in ("aten.mean.dim", "aten.mean.default"):
            shape = graph.values[first_operand(node)].shape
            dims = node.args[1] if len(node.args) > 1 else node.keyword("dim")
            if dims is None or dims == ():
                dims = tuple(range(len(shape)))
            dims = dims if isinstance(dims, tuple) else (dims,)
            count = count_of(tuple(shape[dim] for dim in dims))
            keep = node.args[2] if len(node.args) > 2 else node.keyword("keepdim", False)
            kwargs = tuple(pair for pair in node.kwargs if pair[0] == "dtype")
            kind = node.result.dtype
            narrow = kind.is_floating_point and kind.itemsize < torch.float32.itemsize
            if narrow:
                kwargs = (("dtype", torch.float32),)
                kind = torch.float32
            total = replace(node.result, name=f"{node.name}_sum", dtype=kind)
            nodes.append(
                replace(
                    node,
                    name=total.name,
                    target="aten.sum.dim_IntList",
                    results=(total,),
                    args=(node.args[0], dims, keep),
                    kwargs=kwargs,
                )
            )
            mean = replace(total, name=f"{node.name}_wide") if narrow else node.result
            args = (Ref(total.name), count)
            over = replace(
                node,
                name=mean.name,
                target="aten.div.Tensor",
                results=(mean,),
                args=args,
                kwargs=(),
            )
            if narrow:
                nodes.append(over)
                cast = (Ref(mean.name), node.result.dtype)
                node = replace(node, target="aten.to.dtype", args=cast, kwargs=())
            else:
                node = over
        nodes.append(node)
    return rebuilt(graph, nodes, {})


def count_of(shape: tuple[Dim, ...]) -> Dim:
    """Number of elements: a plain int, or an expression in the inputs' sizes."""
    expr: Any = 1
    for dim in shape:
        expr = expr * (dim.expr if isinstance(dim, Sym) else dim)
    return expr if isinstance(expr, int) else Sym(expr, numel_hint(shape))


def drop_unused(graph: Graph) -> Graph:
    """What nobody reads goes, but for inputs. Why: it would be planned. After: all is read."""
    needed = set(graph.outputs) | {name for _, name in graph.mutations}
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if node.kind != "input" and not any(value.name in needed for value in node.results):
            continue
        needed.update(node.operands())
        nodes.append(node)
    return rebuilt(graph, nodes[::-1], {})


def with_larger_hints(graph: Graph, elements: int) -> Graph:
    """The same program with hints as for inputs of at least `elements` elements.

    Why: example inputs are often tiny, and a plan for tiny inputs saves latency, not work. The
    last symbolic dim of every input grows by one common factor; names and expressions stay.
    """
    inputs = [node.result for node in graph.nodes if node.kind == "input"]
    largest = max(
        (numel_hint(tuple(d for d in value.shape if isinstance(d, Sym))) for value in inputs),
        default=elements,
    )
    factor = -(-elements // max(largest, 1))
    hints: dict[Any, int] = {}
    for value in inputs:
        symbolic = [dim for dim in value.shape if isinstance(dim, Sym)]
        for index, dim in enumerate(symbolic):
            if dim.expr.is_Symbol:
                hints.setdefault(dim.expr, dim.hint * (factor if index == len(symbolic) - 1 else 1))
    if factor <= 1 or not hints:
        return graph
    scaled: dict[Any, Sym] = {}

    def grow(leaf: Any) -> Any:
        if not isinstance(leaf, Sym):
            return leaf
        if leaf.expr not in scaled:
            scaled[leaf.expr] = Sym(leaf.expr, int(leaf.expr.subs(hints)))
        return scaled[leaf.expr]

    nodes = tuple(
        replace(
            node,
            results=tuple(replace(v, shape=map_leaves(grow, v.shape)) for v in node.results),
            args=map_leaves(grow, node.args),
        )
        for node in graph.nodes
    )
    # Sizes that add up to a fixed one cannot all grow.
    possible = all(size.hint >= 0 for size in scaled.values())
    return replace(graph, nodes=nodes) if possible else graph


PASSES: tuple[Callable[[Graph], Graph], ...] = (
    functional,
    types_alone,
    explicit_stops,
    explicit_attention_dropout,
    drop_empty_parts,
    drop_identities,
    explicit_sizes,
    join_slices,
    see_through_merges,
    explicit_bias_of_batches,
    unmerge_batches,
    unflatten_products,
    unmerge_losses,
    merge_reshapes,
    drop_identities,
    split_bias,
    split_mean,
    drop_unused,
)


def run_passes(graph: Graph) -> Graph:
    """All passes in order, each verified."""
    for run in PASSES:
        graph = run(graph).verify()
    return graph
