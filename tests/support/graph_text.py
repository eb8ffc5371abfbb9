"""Graphs from their texts, and runs of them op by op, for golden texts of passes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import transformers.integrations.moe  # noqa: F401  # its ops

import autoparallel.runtime.kernels  # noqa: F401  # the project's ops
from autoparallel.graph.graph import Graph, Node, Ref, Sym, Value, hint, map_leaves
from autoparallel.graph.operators import operator_of

__all__ = ["Run", "graph_of_text", "run_graph"]

_VALUE = re.compile(r"%(\w+): (\w+)\[([^\]]*)\](, no grad)?")
_CALL = re.compile(r"(\w+) ([^\s(]+)\((.*)\)")


def graph_of_text(text: str, sizes: Mapping[str, int]) -> Graph:
    """Return the graph that prints as `text`. sizes: the hints of its symbols, by name.

    A node is named as its first result; the text does not tell the names of other nodes.
    """
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in sizes}
    hints = {symbols[name]: size for name, size in sizes.items()}

    def size(leaf: Any) -> Any:
        if isinstance(leaf, sympy.Expr) and not leaf.is_Integer:
            return Sym(leaf, int(leaf.subs(hints)))
        return int(leaf) if isinstance(leaf, sympy.Integer) else leaf

    def expression(words: str) -> Any:
        scope = {**symbols, "torch": torch, "device": torch.device, "Ref": Ref, "inf": math.inf}
        scope["arguments"] = lambda *args, **kwargs: (args, tuple(kwargs.items()))
        return map_leaves(size, _tuples(eval(re.sub(r"%(\w+)", r'Ref("\1")', words), scope)))

    nodes: list[Node] = []
    outputs: tuple[str, ...] = ()
    mutations: list[tuple[str, str]] = []
    for line in text.strip().splitlines():
        if line.startswith("return "):
            outputs = tuple(re.findall(r"%(\w+)", line))
        elif line.startswith("write "):
            path, _, name = line.removeprefix("write ").partition(" = %")
            mutations.append((path, name))
        else:
            left, _, right = line.partition(" = ")
            results = tuple(
                Value(name, expression(f"[{shape}]"), getattr(torch, kind), not no_grad)
                for name, kind, shape, no_grad in _VALUE.findall(left)
            )
            match = _CALL.fullmatch(right)
            assert match is not None, line
            args, kwargs = expression(f"arguments({match[3]})")
            nodes.append(Node(results[0].name, match[1], match[2], results, args, kwargs))
    return Graph(tuple(nodes), outputs, tuple(mutations)).verify()


def _tuples(item: Any) -> Any:
    """Return nested lists as nested tuples, which are what a graph has."""
    return tuple(map(_tuples, item)) if isinstance(item, (list, tuple)) else item


@dataclass(frozen=True)
class Run:
    """A Run is the results of a run of a graph.

    outputs: in order. buffers: after the run, by path. gradients: of a weighted sum of the outputs,
    by the node of the input or parameter.
    """

    outputs: tuple[torch.Tensor, ...]
    buffers: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]


def run_graph(graph: Graph) -> Run:
    """Return what the graph computes of numbers that are drawn by the names of its tensors.

    A call whose results need no gradient runs under no_grad, which is what the graph says.
    """
    tensors: dict[str, torch.Tensor] = {}
    leaves: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}

    def actual(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return tensors[leaf.name]
        return hint(leaf) if isinstance(leaf, Sym) else leaf

    torch.manual_seed(0)  # for ops that draw: the same numbers in the same order
    for node in graph.nodes:
        if node.kind != "call":
            tensors[node.result.name] = leaves[node.name] = _drawn(node.result)
            if node.kind == "buffer":
                buffers[node.target] = tensors[node.result.name]
            continue
        kwargs = {key: map_leaves(actual, item) for key, item in node.kwargs}
        with torch.set_grad_enabled(any(value.requires_grad for value in node.results)):
            returned = operator_of(node.target)(*map_leaves(actual, node.args), **kwargs)
        results = [returned] if isinstance(returned, torch.Tensor) else list(returned)
        for value, tensor in zip(node.results, results, strict=True):
            assert (tensor.dtype, tensor.shape) == (value.dtype, tuple(map(hint, value.shape))), (
                value
            )
            tensors[value.name] = tensor
    outputs = tuple(tensors[name] for name in graph.outputs)
    buffers.update({path: tensors[name] for path, name in graph.mutations})
    flowing = [tensor for tensor in outputs if tensor.requires_grad]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients: dict[str, torch.Tensor] = {}
    if flowing and wanted:
        total = sum((tensor * _drawn_like(tensor)).sum() for tensor in flowing)
        computed = torch.autograd.grad(total, tuple(wanted.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(wanted.items(), computed, strict=True)
        }
    return Run(outputs, buffers, gradients)


def _drawn(value: Value) -> torch.Tensor:
    """Return numbers of both signs, small whole numbers or truth values, by the value's name."""
    shape = tuple(map(hint, value.shape))
    generator = torch.Generator().manual_seed(sum(map(ord, value.name)))
    if value.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator) == 1
    if not value.dtype.is_floating_point:
        return torch.randint(0, 3, shape, generator=generator).to(value.dtype)
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return numbers.to(value.dtype).requires_grad_(value.requires_grad)


def _drawn_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return weights for a sum of the tensor's elements, all different and none zero."""
    generator = torch.Generator().manual_seed(tensor.numel())
    numbers = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    return numbers.to(tensor.dtype)
