"""The dataflow graph: frozen nodes that read and write named values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch

__all__ = [
    "Dim",
    "Graph",
    "Node",
    "Ref",
    "Sym",
    "Value",
    "hint",
    "map_leaves",
    "numel_hint",
]


@dataclass(frozen=True, slots=True, eq=False)
class Sym:
    """A size known when the model runs: an expression in the inputs' sizes.

    hint: its value for the example inputs, which is what the cost model sees.
    """

    expr: sympy.Expr
    hint: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sym) and bool(self.expr == other.expr)

    def __hash__(self) -> int:
        return hash(self.expr)

    def __str__(self) -> str:
        return str(self.expr)

    __repr__ = __str__


Dim = int | Sym


def hint(dim: Dim) -> int:
    """The size for the example inputs."""
    return dim.hint if isinstance(dim, Sym) else dim


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of the value `name`."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that a node makes. requires_grad: a gradient flows back through it."""

    name: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    def __str__(self) -> str:
        grad = "" if self.requires_grad else ", no grad"
        kind = str(self.dtype).removeprefix("torch.")
        return f"%{self.name}: {kind}[{', '.join(map(str, self.shape))}]{grad}"


def numel_hint(shape: tuple[Dim, ...]) -> int:
    """Number of elements for the example inputs."""
    count = 1
    for dim in shape:
        count *= hint(dim)
    return count


@dataclass(frozen=True)
class Node:
    """One operation. kind: "input", "parameter", "buffer", "constant" or "call".

    target: the op ("aten.linear.default") of a call, the attribute's path of a parameter, buffer
    or constant, the position of an input. args, kwargs: nested tuples with Ref, Sym and plain
    leaves. scope: the module calls that it is inside of, the outermost first, each by the module's
    path; "path@2" is the third call of one module from the same call of another. line: of the
    user's code. Both belong to the user's view of the program, not to the program.
    """

    name: str
    kind: str
    target: str
    results: tuple[Value, ...]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    scope: tuple[str, ...] = field(default=(), compare=False)
    line: str = field(default="", compare=False)

    @property
    def where(self) -> str:
        """Path of the innermost module that it is inside of."""
        return self.scope[-1].partition("@")[0] if self.scope else ""

    @property
    def result(self) -> Value:
        """The only result."""
        assert len(self.results) == 1, self
        return self.results[0]

    def operands(self) -> tuple[str, ...]:
        """Names of the tensors it reads, in order, repeats kept."""
        return self._operands

    @cached_property
    def _operands(self) -> tuple[str, ...]:
        found: list[str] = []
        _collect(self.args, found)
        _collect(self.kwargs, found)
        return tuple(found)

    def keyword(self, name: str, default: Any = None) -> Any:
        """The keyword argument `name`."""
        return dict(self.kwargs).get(name, default)

    def __str__(self) -> str:
        outputs = ", ".join(map(str, self.results))
        inputs = ", ".join(
            [*map(repr, self.args), *(f"{key}={value!r}" for key, value in self.kwargs)]
        )
        return f"{outputs} = {self.kind} {self.target}({inputs})"


def _collect(structure: tuple[Any, ...], names: list[str]) -> None:
    """Append the names that nested tuples refer to."""
    for item in structure:
        if type(item) is Ref:
            names.append(item.name)
        elif isinstance(item, tuple):
            _collect(item, names)


def leaves(structure: Any) -> Iterator[Any]:
    """Leaves of nested tuples."""
    if isinstance(structure, tuple):
        for item in structure:
            yield from leaves(item)
    else:
        yield structure


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """The same nested tuples with `function` applied to each leaf."""
    if isinstance(structure, tuple):
        return tuple([map_leaves(function, item) for item in structure])
    return function(structure)


@dataclass(frozen=True)
class Graph:
    """A program: nodes in execution order and the values it returns.

    outputs: names of the returned values, in the order of the output structure's leaves.
    mutations: (buffer's path, value) pairs to write back after the forward pass.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    mutations: tuple[tuple[str, str], ...] = ()

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """Every value by its name."""
        return {value.name: value for node in self.nodes for value in node.results}

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that makes each value."""
        return {value.name: node for node in self.nodes for value in node.results}

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each value, in execution order, each once."""
        found: dict[str, dict[str, Node]] = {name: {} for name in self.values}
        for node in self.nodes:
            for name in node.operands():
                found[name][node.name] = node
        return {name: tuple(nodes.values()) for name, nodes in found.items()}

    @cached_property
    def calls(self) -> tuple[Node, ...]:
        """The nodes that compute."""
        return tuple(node for node in self.nodes if node.kind == "call")

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the text: equal for equal programs."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def verify(self) -> Graph:
        """Returns the graph itself. Raises AssertionError if a value is read before it is made."""
        seen: set[str] = set()
        for node in self.nodes:
            for name in node.operands():
                assert name in seen, f"%{name} is read by {node.name} before it is made"
            for value in node.results:
                assert value.name not in seen, f"%{value.name} is made twice"
                seen.add(value.name)
        missing = [name for name in self.outputs if name not in seen]
        assert not missing, f"outputs {missing} are never made"
        return self

    def __str__(self) -> str:
        lines = [str(node) for node in self.nodes]
        lines.append("return " + ", ".join(f"%{name}" for name in self.outputs))
        lines += [f"write {path} = %{name}" for path, name in self.mutations]
        return "\n".join(lines)
