"""A pass that sees masks which hide later keys, and nothing else, as what they are."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from autoparallel.graph.graph import Graph, Node, Ref, Value
from autoparallel.graph.passes.editing import rebuilt
from autoparallel.graph.place_formulas import Affine, Bias, Formula, Truth
from autoparallel.graph.place_values import place_values

__all__ = ["explicit_causal_masks"]

_ATTENTION = "aten.scaled_dot_product_attention.default"


def explicit_causal_masks(graph: Graph) -> Graph:
    """attention(q, k, v, mask) becomes attention(q, k, v, is_causal=True), or loses its mask.

    Why: kernels for a causal mask leave out the half that it hides, and read no mask. Libraries
    that ask for them in a call write a mask while they are traced. After: no mask that follows from
    places alone hides exactly the keys behind each query, or nothing, for all sizes.
    """
    masks = {node.name: mask for node in graph.calls if (mask := _mask(node)) is not None}
    if not masks:
        return graph
    formulas = place_values(graph)
    nodes = []
    for node in graph.nodes:
        mask = masks.get(node.name)
        seen = mask and _seen(formulas.get(mask.name), graph.values[mask.name])
        nodes.append(_without_mask(node, graph, seen) if mask and seen else node)
    return rebuilt(graph, nodes, {})


def _mask(node: Node) -> Ref | None:
    """Return the mask of an attention that has one."""
    mask = node.argument(3, "attn_mask") if node.target == _ATTENTION else None
    return mask if isinstance(mask, Ref) else None


def _seen(formula: Formula | None, mask: Value) -> Truth | None:
    """Return where a mask lets queries see keys; None where that does not follow from places."""
    if isinstance(formula, Bias):
        return formula.seen
    # Ones and zeros of another type than bool are added to the scores.
    return formula if isinstance(formula, Truth) and mask.dtype == torch.bool else None


def _without_mask(node: Node, graph: Graph, seen: Truth) -> Node:
    """Return the attention without its mask, if `seen` says that it needs none; else as it is."""
    queries, keys = (graph.values[item.name].shape[-2] for item in node.args[:2])
    shape = graph.values[node.argument(3, "attn_mask").name].shape
    conditions = seen.within(shape).conditions
    causal = bool(conditions)
    if causal:
        # A CPU's kernel hides keys by -inf before it multiplies by the scale: those of 0 and less
        # make NaN of it.
        scale = node.keyword("scale")
        if scale is not None and not (isinstance(scale, int | float) and scale > 0):
            return node
        behind = Affine(sympy.Integer(0), (*(0,) * (len(shape) - 2), 1, -1))
        if conditions != {behind} or (*shape[-2:], queries) != (queries, keys, keys):
            return node
    args = (*node.args[:3], None, node.argument(4, "dropout_p", 0.0), causal)
    given = ("attn_mask", "dropout_p", "is_causal")
    kwargs = tuple((key, value) for key, value in node.kwargs if key not in given)
    return replace(node, args=args, kwargs=kwargs)
