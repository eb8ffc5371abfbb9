"""Passes that take a bias out of a product, and the division out of a mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autoparallel.graph.graph import (
    Dim,
    Graph,
    Node,
    Ref,
    Sym,
    numel_hint,
)
from autoparallel.graph.passes.editing import first_operand, rebuilt

__all__ = ["count_of", "split_bias", "split_mean"]


def split_bias(graph: Graph) -> Graph:
    """linear(%x, %w, %bias) becomes add(linear(%x, %w), %bias).

    Why: a row-parallel product is reduced before the bias is added, or the bias counts world_size
    times. After: no linear has a bias; surviving nodes keep name, shape and dtype; a second run is
    a no-op.
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

    Why: a mean over a sharded dim must not divide by the local count. After: no mean is left; a
    second run is a no-op. Numbers of 16 bits are summed as float32, as torch does inside of a mean:
    their sum may be larger than any number of 16 bits.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.target in ("aten.mean.dim", "aten.mean.default"):
            shape = graph.values[first_operand(node)].shape
            dims = node.argument(1, "dim")
            # Torch takes both for all dims, and any dim of a single number for none.
            if dims is None or dims == () or not shape:
                dims = tuple(range(len(shape)))
            dims = dims if isinstance(dims, tuple) else (dims,)
            count = count_of(tuple(shape[dim] for dim in dims))
            keep = node.argument(2, "keepdim", False)
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
    """Return the number of elements of a shape: an int, or a symbolic size where a dim is symbolic.

    >>> count_of((2, 3))
    6
    """
    # A plain 1 and not sympy's, so that fixed sizes stay ints.
    expr: Any = 1
    for dim in shape:
        expr = expr * (dim.expr if isinstance(dim, Sym) else dim)
    return expr if isinstance(expr, int) else Sym(expr, numel_hint(shape))
