"""The dataflow graph: frozen nodes that read and write named values.

A graph is in single-assignment form: every value is produced by one node and never changes. Its
text is its identity, so two graphs with one text have one fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import sympy

if TYPE_CHECKING:
    # A plan that was read is drawn and told without torch, and its words come by here.
    import torch

__all__ = [
    "Dim",
    "Graph",
    "Node",
    "Ref",
    "Sym",
    "Value",
    "hint",
    "leaves",
    "map_leaves",
    "numel_hint",
    "size_expression",
]


@dataclass(frozen=True, slots=True, eq=False)
class Sym:
    """A size that is known only when the model runs: an expression in the inputs' sizes.

    expr: a sympy expression in symbols of the inputs' dims. hint: its value for the example inputs,
    which is what the cost model sees. Two are equal if their expressions are; hints do not count.
    """

    expr: sympy.Expr
    # Not compared: the same program traced with other example inputs is the same program.
    hint: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sym) and bool(self.expr == other.expr)

    def __hash__(self) -> int:
        return hash(self.expr)

    def __str__(self) -> str:
        return _text(self.expr)

    __repr__ = __str__


@lru_cache(maxsize=4096)
def _text(expr: sympy.Expr) -> str:
    """Return an expression's text: few are in a graph, many times each, and sympy is slow at it."""
    return str(expr)


Dim = int | Sym


def hint(dim: Dim) -> int:
    """Return the size for the example inputs: the number itself, or a symbolic size's hint."""
    return dim.hint if isinstance(dim, Sym) else dim


def size_expression(dim: Dim) -> sympy.Expr:
    """Return the size as a sympy expression, so that fixed and
    symbolic sizes can be multiplied alike.
    """
    return dim.expr if isinstance(dim, Sym) else sympy.Integer(dim)


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of the value `name` among a node's arguments, as distinct from a text argument."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that a node produces, without its numbers.

    name: unique in the graph. shape: sizes, each a number or a Sym. dtype: the element type.
    requires_grad: a gradient flows back through it.

    >>> import torch
    >>> print(Value("x", (2, 3), torch.float32))
    %x: float32[2, 3], no grad
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    def __str__(self) -> str:
        grad = "" if self.requires_grad else ", no grad"
        kind = str(self.dtype).removeprefix("torch.")
        return f"%{self.name}: {kind}[{', '.join(map(str, self.shape))}]{grad}"


def numel_hint(shape: tuple[Dim, ...]) -> int:
    """Return the number of elements of a tensor of this shape, for the example inputs.

    >>> numel_hint((2, 3, 4))
    24
    """
    count = 1
    for dim in shape:
        count *= hint(dim)
    return count


@dataclass(frozen=True)
class Node:
    """One operation of a graph, or one tensor that the graph starts from.

    kind: "input", "parameter", "buffer", "constant" or "call". target: the op
    ("aten.linear.default") of a call, the attribute's path of a parameter, buffer or constant, the
    position of an input. results: the values that it produces. args, kwargs: nested tuples with
    Ref, Sym and plain leaves. scope: the module calls that it is inside of, the outermost first,
    each by the module's path; "path@2" is the third call of one module from the same call of
    another, and "path#2" the third region that the module's forward checkpoints. line: of the
    user's code. Both belong to the user's view of the program, not to the program, and do not count
    when nodes are compared.
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
        """The path of the innermost module whose call the node is inside of; "" at the top."""
        # A region that is checkpointed ("path#0") belongs to the module whose forward has it.
        return self.scope[-1].partition("#")[0].partition("@")[0] if self.scope else ""

    @property
    def result(self) -> Value:
        """The only result.

        It is an error of the caller to ask a node with another number of them.
        """
        assert len(self.results) == 1, self
        return self.results[0]

    def operands(self) -> tuple[str, ...]:
        """Return the names of the tensors that the node reads, in order, repeats kept."""
        return self._operands

    @cached_property
    def _operands(self) -> tuple[str, ...]:
        """Collected once: every pass asks for them, and arguments can be long lists."""
        names: list[str] = []
        _collect(self.args, names)
        _collect(self.kwargs, names)
        return tuple(names)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return the argument given by position or by keyword, or the default where neither is."""
        if len(self.args) > position:
            return self.args[position]
        return self.keyword(name, default)

    def keyword(self, name: str, default: Any = None) -> Any:
        """Return the keyword argument `name`, or the default where the call does not give it."""
        return dict(self.kwargs).get(name, default)

    def __str__(self) -> str:
        outputs = ", ".join(map(str, self.results))
        inputs = ", ".join(
            [*map(repr, self.args), *(f"{key}={value!r}" for key, value in self.kwargs)]
        )
        return f"{outputs} = {self.kind} {self.target}({inputs})"


def _collect(structure: tuple[Any, ...], names: list[str]) -> None:
    """Append to `names` the names that nested tuples refer to, in order."""
    for item in structure:
        if type(item) is Ref:
            names.append(item.name)
        elif isinstance(item, tuple):
            _collect(item, names)


def leaves(structure: Any) -> Iterator[Any]:
    """Yield the leaves of nested tuples, in order; a leaf is everything that is no tuple.

    >>> list(leaves((1, (2, (3,)), "x")))
    [1, 2, 3, 'x']
    """
    if isinstance(structure, tuple):
        for item in structure:
            yield from leaves(item)
    else:
        yield structure


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """Return the same nested tuples with `function` applied to each leaf, in order.

    >>> map_leaves(lambda leaf: leaf + 1, (1, (2, 3)))
    (2, (3, 4))
    """
    if isinstance(structure, tuple):
        return tuple([map_leaves(function, item) for item in structure])
    return function(structure)


@dataclass(frozen=True)
class Graph:
    """A program: nodes in execution order, and the names of the values that it returns.

    outputs: names of the returned values, in the order of the output structure's leaves. mutations:
    pairs of a buffer's path and the value that is written back to it after the forward pass.

    >>> import torch
    >>> x = Value("x", (2, 3), torch.float32)
    >>> y = Value("y", (2, 3), torch.float32)
    >>> source = Node("x", "input", "0", (x,))
    >>> negated = Node("y", "call", "aten.neg.default", (y,), (Ref("x"),))
    >>> print(Graph((source, negated), ("y",)).verify())
    %x: float32[2, 3], no grad = input 0()
    %y: float32[2, 3], no grad = call aten.neg.default(%x)
    return %y
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    mutations: tuple[tuple[str, str], ...] = ()

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """Every value of the graph, by its name."""
        return {value.name: value for node in self.nodes for value in node.results}

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that produces each value, by the value's name."""
        return {value.name: node for node in self.nodes for value in node.results}

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each value, by its name, in execution order, each once."""
        readers: dict[str, dict[str, Node]] = {name: {} for name in self.values}
        for node in self.nodes:
            for name in node.operands():
                readers[name][node.name] = node
        return {name: tuple(nodes.values()) for name, nodes in readers.items()}

    @cached_property
    def calls(self) -> tuple[Node, ...]:
        """The nodes that compute, in execution order: those of kind "call"."""
        return tuple(node for node in self.nodes if node.kind == "call")

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the text, equal for equal programs.

        Plans store it to know their model again.
        """
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def map_leaves(self, function: Callable[[Any], Any]) -> Graph:
        """Return the graph with `function` applied to every size of a shape and to every argument
        of a call, as to symbolic sizes that are written in other symbols, or get other hints.

        function: returns what it does not change as it is. Names and types stay.
        """
        nodes = tuple(
            replace(
                node,
                results=tuple(
                    [replace(v, shape=map_leaves(function, v.shape)) for v in node.results]
                ),
                args=map_leaves(function, node.args),
                kwargs=map_leaves(function, node.kwargs),
            )
            for node in self.nodes
        )
        return replace(self, nodes=nodes)

    def verify(self) -> Graph:
        """Return the graph itself, after a check that every value is produced once,
        and before it is read.

        Every pass is followed by this check. Raises AssertionError, because a graph that fails it
        is an error of ours.
        """
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
