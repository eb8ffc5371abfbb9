"""A pass that writes fused attention with dropout as products, softmax and dropout."""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Value, hint
from autoparallel.graph.passes.editing import rebuilt

__all__ = ["explicit_attention_dropout"]


def explicit_attention_dropout(graph: Graph) -> Graph:
    """scaled_dot_product_attention with dropout becomes products, softmax and dropout.

    Why: the fused kernel draws its own numbers, which would depend on how heads are split.
    After: no fused attention drops anything; rows that attend to nothing give zeros, as fused.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        attention = node.target == "aten.scaled_dot_product_attention.default"
        probability = node.argument(4, "dropout_p", 0.0) if attention else 0.0
        if probability:
            nodes += _spelled_attention(node, graph, probability)
        else:
            nodes.append(node)
    return rebuilt(graph, nodes, {})


def _spelled_attention(node: Node, graph: Graph, probability: float) -> list[Node]:
    """Return the nodes of softmax(q k^T scale + mask), dropped, times v.

    The last one keeps the node's name.
    """
    nodes: list[Node] = []
    grad, dtype = node.result.requires_grad, node.result.dtype

    def call(
        suffix: str,
        op: str,
        args: tuple[Any, ...],
        shape: tuple[Dim, ...],
        kind: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Ref:
        """Append a call and return a use of its result.

        suffix: of its name; kind: its dtype if another.
        """
        name = f"{node.name}_{suffix}" if suffix else node.name
        value = Value(name, shape, kind or dtype, grad and kind is None)
        options = tuple(kwargs.items())
        nodes.append(Node(name, "call", op, (value,), args, options, node.scope, node.line))
        return Ref(name)

    query, key, value = node.args[:3]
    q, k, v = (graph.values[item.name].shape for item in (query, key, value))
    if node.keyword("enable_gqa", False) and q[-3] != k[-3]:
        assert isinstance(q[-3], int)
        assert isinstance(k[-3], int)
        # Grouped-query attention (arXiv:2305.13245): each key head serves `times` query heads.
        times = q[-3] // k[-3]
        repeated = []
        for label, item, shape in (("keys", key, k), ("values", value, v)):
            wide = (*shape[:-2], 1, *shape[-2:])
            item = call(f"{label}_1", "aten.unsqueeze.default", (item, -3), wide)
            wide = (*shape[:-2], times, *shape[-2:])
            item = call(f"{label}_2", "aten.expand.default", (item, wide), wide)
            shape = (*shape[:-3], q[-3], *shape[-2:])
            repeated.append(call(label, "aten.reshape.default", (item, shape), shape))
        key, value = repeated
        k = (*k[:-3], q[-3], *k[-2:])
    scores = (*node.result.shape[:-1], k[-2])
    turned = (*k[:-2], k[-1], k[-2])
    flipped = call("turned", "aten.transpose.int", (key, -2, -1), turned)
    x = call("scores", "aten.matmul.default", (query, flipped), scores)
    # Torch's default is 1 / sqrt(width of a head).
    scale = node.keyword("scale")
    scale = hint(q[-1]) ** -0.5 if scale is None else scale
    x = call("scaled", "aten.mul.Tensor", (x, scale), scores)
    mask = node.argument(3, "attn_mask")
    causal = node.argument(5, "is_causal", False)
    hidden: Ref | None = None
    if causal:
        square = (q[-2], k[-2])
        allowed = call(
            "ones",
            "aten.ones.default",
            (square,),
            square,
            torch.bool,
            device=torch.device("cpu"),
            dtype=torch.bool,
        )
        mask = call("causal", "aten.tril.default", (allowed,), square, torch.bool)
    if mask is not None and (causal or graph.values[mask.name].dtype == torch.bool):
        shape = (q[-2], k[-2]) if causal else graph.values[mask.name].shape
        hidden = call("hidden", "aten.logical_not.default", (mask,), shape, torch.bool)
        # Not -inf: a row that attends to nothing would become NaN in the softmax.
        lowest = torch.finfo(dtype).min
        x = call("masked", "aten.masked_fill.Scalar", (x, hidden, lowest), scores)
    elif mask is not None:
        x = call("biased", "aten.add.Tensor", (x, mask), scores)
    x = call("probabilities", "aten.softmax.int", (x, -1), scores)
    # Such a row is uniform now; the fused kernel gives zeros.
    if hidden is not None:
        x = call("visible", "aten.masked_fill.Scalar", (x, hidden, 0.0), scores)
    x = call("dropped", "aten.dropout.default", (x, probability, True), scores)
    call("", "aten.matmul.default", (x, value), node.result.shape)
    return nodes
