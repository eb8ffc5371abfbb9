"""Passes that give each thing one form: no identities, sizes written out, one op per view."""

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
from autoparallel.graph.operators import BRANCH_TAKEN
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
    """Return a pass that drops the calls whose result is just the value that `test` names."""

    def run(graph: Graph) -> Graph:
        """Drop the calls, and let their readers read the value itself."""
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
    """Return the value that the call's result is the same as; None where it computes something."""
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
    # Dropout of probability 0, or in eval mode.
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


drop_identities.__name__ = "drop_identities"
drop_identities.__doc__ = """clone(%x), a cast to the same type, a view to the same shape become %x.

Why: each would be an operator with strategies of its own. After: none is left, nor dropout of
probability 0, nor the addition of 0; a second run is a no-op.
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
    """view(%x, (b, -1)) becomes reshape(%x, (b, 48)): sizes written out,
    one op for each kind of view.

    And one for each expansion: broadcast_tensors([%x, %y]) becomes expand(%x, ..), expand(%y, ..).

    Why: the rewriter replaces sizes by local ones, so that they must be there. After: no -1, no
    view, flatten or squeeze is left; a second run is a no-op.
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
                view = replace(node, name=name, results=(value,), args=(part, value.shape))
                nodes.append(replace(view, target="aten.expand.default", kwargs=()))
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
    """new_zeros(%x, (b, 4)) becomes zeros((b, 4)), and type_as(%y, %x) becomes to(%y),
    of the type of %x.

    Why: of %x only the type is read, so that its layout must not matter. After: no new_empty,
    new_zeros, new_ones, new_full, type_as and to.other is left; a second run is a no-op.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target in _CREATIONS:
            value = replace(node.result, requires_grad=False)
            # The emitted program writes its own device where a graph names one.
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

    Why: flattening and unflattening again must not hide a dim in between. After: no reshape reads a
    reshape; a second run is a no-op.
    """
    nodes: list[Node] = []
    producers: dict[str, Node] = {}
    for node in graph.nodes:
        if node.target == "aten.reshape.default":
            before = producers.get(first_operand(node))
            if before is not None and before.target == "aten.reshape.default":
                node = replace(node, args=(before.args[0], node.args[1]))
        nodes.append(node)
        for value in node.results:
            producers[value.name] = node
    return rebuilt(graph, nodes, {})


def drop_unused(graph: Graph) -> Graph:
    """Calls, parameters and buffers that nobody reads are dropped; inputs stay,
    whose positions count.

    Why: they would be planned and computed. After: every value is read, returned or written back,
    or its node is an input or a check that may end the program; a second run is a no-op.
    """
    needed = set(graph.outputs) | {name for _, name in graph.mutations}
    nodes: list[Node] = []
    # Backwards, so that a value is known to be needed before its node is met.
    for node in reversed(graph.nodes):
        stays = node.kind == "input" or node.target == BRANCH_TAKEN
        if not stays and not any(value.name in needed for value in node.results):
            continue
        needed.update(node.operands())
        nodes.append(node)
    return rebuilt(graph, nodes[::-1], {})
