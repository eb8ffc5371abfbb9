"""Passes that undo flattening to rows before products and losses, so that each dim can be split."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value
from autoparallel.graph.passes.editing import rebuilt, reshape_to

__all__ = ["unflatten_products", "unmerge_losses"]


def unflatten_products(graph: Graph) -> Graph:
    """reshape(linear(reshape(%x, (b*s, k)), %w), (b, s, n)) becomes linear(%x, %w).

    And mm and addmm become matmul and add.

    Why: a batch and a sequence merged into one dim can be sharded by neither, and the product never
    needed them merged. After: no product is left whose operand was flattened to two dims; no mm and
    no addmm; a second run is a no-op.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target not in _FLAT_PRODUCTS:
            nodes.append(node)
            continue
        at = _FLAT_PRODUCTS[node.target]
        source, shape = _unflattened(graph, node.args[at].name, node.result)
        if node.target == "aten.linear.default" and shape == node.result.shape:
            nodes.append(node)
            continue
        value = node.result
        if shape != value.shape:
            value = replace(value, name=f"{value.name}_nd", shape=shape)
        product_node = replace(node, name=value.name, results=(value,), kwargs=())
        if node.target == "aten.linear.default":
            nodes.append(replace(product_node, args=(source, *node.args[1:])))
        elif node.target == "aten.mm.default":
            nodes.append(
                replace(product_node, target="aten.matmul.default", args=(source, node.args[1]))
            )
        else:
            product = replace(value, name=f"{value.name}_product")
            alone = replace(product_node, name=product.name, results=(product,))
            nodes.append(replace(alone, target="aten.matmul.default", args=(source, node.args[2])))
            args = (Ref(product.name), node.args[0])
            nodes.append(replace(product_node, target="aten.add.Tensor", args=args))
        if value is not node.result:
            nodes.append(reshape_to(node, node.result, value))
    return rebuilt(graph, nodes, {})


# Where the operand is whose rows were flattened.
_FLAT_PRODUCTS = {"aten.mm.default": 0, "aten.addmm.default": 1, "aten.linear.default": 0}


def _unflattened(graph: Graph, name: str, result: Value) -> tuple[Ref, tuple[Dim, ...]]:
    """Return the value that was flattened to two dims, and the shape of the product with it."""
    operand, flat = graph.values[name], graph.producers[name]
    if flat.target == "aten.reshape.default" and len(operand.shape) == 2:
        before = graph.values[flat.operands()[0]]
        if len(before.shape) > 2 and before.shape[-1] == operand.shape[-1]:
            return Ref(before.name), (*before.shape[:-1], result.shape[-1])
    return Ref(name), result.shape


def unmerge_losses(graph: Graph) -> Graph:
    """cross_entropy(reshape(%x, (b*s, c)), reshape(%y, (b*s))) becomes that of (b, c, s) and %y.

    Why: a batch and a sequence merged into one dim can be sharded by neither, and each rank would
    need the logits of all tokens. After: no sum or mean of losses over such tokens is left; the
    loss keeps its name; a second run is a no-op.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        source = _rows_apart(graph, node)
        if source is None:
            nodes.append(node)
            continue
        *batch, classes = source.shape
        # Torch wants the classes second, behind the first batch dim.
        order = (0, len(batch), *range(1, len(batch)))
        shape = (batch[0], classes, *batch[1:])
        logits = replace(source, name=f"{node.name}_logits", shape=shape)
        args = (Ref(source.name), order)
        view = replace(node, name=logits.name, results=(logits,), args=args, kwargs=())
        target = graph.values[node.args[1].name]
        tokens = replace(target, name=f"{node.name}_tokens", shape=tuple(batch))
        nodes += [
            replace(view, target="aten.permute.default"),
            reshape_to(node, tokens, target),
            replace(node, args=(Ref(logits.name), Ref(tokens.name), *node.args[2:])),
        ]
    return rebuilt(graph, nodes, {})


def _rows_apart(graph: Graph, node: Node) -> Value | None:
    """Return the value whose rows a loss over tokens flattens, if it has symbolic dims among them;
    else None.
    """
    if node.target != "aten.cross_entropy_loss.default" or node.result.shape:
        return None
    rows, target = (graph.values[name] for name in node.operands()[:2])
    flat = graph.producers[rows.name]
    if flat.target != "aten.reshape.default" or len(rows.shape) != 2 or len(target.shape) != 1:
        return None
    before = graph.values[flat.operands()[0]]
    merged = before.shape[:-1]
    if len(merged) < 2 or before.shape[-1] != rows.shape[-1]:
        return None
    return before if any(isinstance(size, Sym) for size in merged) else None
