"""Passes that write each thing in one way: no identities, sizes written out, one view each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from autoparallel.graph.graph import (
    Graph,
    Node,
    Ref,
    Sym,
)
from autoparallel.graph.passes.editing import Rename, first_operand, rebuilt, renamed

__all__ = [
    "drop_empty_parts",
    "drop_identities",
    "drop_unused",
    "explicit_sizes",
    "merge_reshapes",
    "types_alone",
]


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
