"""The graph under construction: nodes, names, sizes and gradients, as the translators write them.

The importer translates one call of an exported program after the other; the block regions copy
whole runs of nodes. Both write here, so that names are unique and gradients are followed through
in-place writes whoever has added a node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sympy
import torch

from autoparallel.capture.source_files import ModelFiles
from autoparallel.capture.source_locations import Origins
from autoparallel.errors import CaptureError
from autoparallel.graph.aliasing import owner_of, shares_memory
from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value, leaves
from autoparallel.graph.operators import operator_of, packet_of
from autoparallel.graph.passes.masked_rows import unknown_symbols
from autoparallel.support.torch_private import expression_of, hint_of, is_fixed, schema_of

__all__ = ["GraphBuilder", "has_unknown_sizes", "require_known_sizes", "written_by"]

# The hint of a size that is not known before the model runs.
_UNKNOWN = 2


_PREFIXES = {"parameter": "p_", "buffer": "b_", "constant": "c_", "input": "tensors_"}


class GraphBuilder:
    """The nodes of a graph so far, and all that must be known to add the next one.

    nodes: in execution order. grad_enabled: for each node, whether torch records gradients where it
    is; for a tensor that is there before the program runs, whether it needs a gradient. values: all
    that the nodes produce, by name. translated: for each node of the exported program, the Ref,
    number, tuple or module that stands for it here. tensor_ids: the id of the model's tensor, by
    the name of its parameter or buffer node. names_of_tensors: the other way round; tied weights
    have one name. lifted: names of the constants that the forward makes from numbers. writes: for
    each call, the values that it writes to. views: for each view, the value whose memory it shares.
    overwritten: for each result of an in-place op, the value that the op has written to.
    trained_memory: owners of memory into which a value with a gradient was written. input_symbols:
    the symbols that the inputs' sizes consist of. equal_sizes: expressions that are numbers by what
    the tracer assumed. origins: names the module calls. frames: for each call, the lines of the
    forwards that it was made in, the outermost first. bases: each node's name without the number
    that makes it unique, in the order in which the names were given.

    Every name is chosen here, in the order of definition, so that a program with copied blocks has
    the names of a fully traced one.
    """

    def __init__(self, files: ModelFiles | None = None) -> None:
        self.nodes: list[Node] = []
        self.grad_enabled: list[bool] = []
        self.translated: dict[Any, Any] = {}
        self.tensor_ids: dict[str, int] = {}
        self.names_of_tensors: dict[int, str] = {}
        self.lifted: set[str] = set()
        self.writes: dict[str, tuple[str, ...]] = {}
        self.views: dict[str, str] = {}
        self.overwritten: dict[str, str] = {}
        self.trained_memory: set[str] = set()
        self.input_symbols: set[sympy.Basic] = set()
        self.equal_sizes: dict[sympy.Basic, sympy.Basic] = {}
        self.origins = Origins(ModelFiles() if files is None else files)
        self.frames: dict[str, tuple[str, ...]] = {}
        self.bases: dict[str, str] = {}
        self.values: dict[str, Value] = {}
        self._sizes: dict[sympy.Basic, Dim] = {}
        self._name_counts: dict[str, int] = {}
        self._names: set[str] = set()

    def stored(
        self, kind: str, target: str, example: torch.Tensor, grad: bool, node: Any = None
    ) -> str:
        """Add the node of a tensor that is there before the program runs, and return its name.

        kind, target: as in Node. example: a tensor of its shape and type. grad: whether it needs a
        gradient. node: the placeholder of the exported program that stands for it; None for the
        tensors of a hidden block, which the program does not know.
        """
        plain = re.sub(r"[^a-zA-Z0-9]", "_", target).lower()
        name = self.fresh(_PREFIXES[kind] + plain)
        self.add(Node(name, kind, target, (self.value(name, example, grad),)), grad)
        if node is not None:
            self.translated[node] = Ref(name)
        return name

    def fresh(self, base: str, results: int = 1) -> str:
        """Return the first of base, base_1, base_2, ... that clashes with no name.

        results: how many tensors the node produces. Several are called name_0, name_1, ..., which
        must be free as well.
        """
        while True:
            count = self._name_counts.get(base, 0)
            self._name_counts[base] = count + 1
            name = f"{base}_{count}" if count else base
            if results == 1:
                value_names = {name}
            else:
                value_names = {f"{name}_{index}" for index in range(results)}
            if not value_names & self._names:
                self._names |= value_names
                self.bases[name] = base
                return name

    def add(self, node: Node, grad: bool, frames: tuple[str, ...] = ()) -> None:
        """Append a node.

        grad: whether gradients are recorded where it is. frames: the lines of the forwards that a
        call was made in, the outermost first.
        """
        self.frames[node.name] = frames
        self.nodes.append(node)
        self.grad_enabled.append(grad)
        self.values.update((value.name, value) for value in node.results)

    def records(self, node: Node, grad: bool) -> bool:
        """Return whether a gradient flows back through a call.

        node: the call; its results are not looked at. grad: whether any gradient is recorded there.
        """
        return grad and not _stops(node.target) and self.carries(node.operands())

    def carries(self, operands: Iterable[str]) -> bool:
        """Return whether a gradient flows through one of these values, as they are now.

        A value that had no gradient has one after a trained value was written into its memory: into
        the value itself, into a view of it, or into what it is a view of.
        """
        names = [owner_of(name, self.overwritten) for name in operands]
        return any(
            self.values[name].requires_grad or owner_of(name, self.views) in self.trained_memory
            for name in names
        )

    def memory_of(self, name: str) -> str:
        """Return the name of the value in whose memory a value lies."""
        return owner_of(owner_of(name, self.overwritten), self.views)

    def first_write(self, names: Iterable[str], after: int) -> Node | None:
        """Return the first node that writes to memory of some values; None where none does.

        after: the number of nodes before it at least.
        """
        owners = {self.memory_of(name) for name in names}
        for later in self.nodes[after:]:
            written = self.writes.get(later.name, ())
            if any(self.memory_of(name) in owners for name in written):
                return later
        return None

    def follow(self, node: Node, flows: bool) -> None:
        """Remember whose memory a call writes to or shares, for `carries` to follow.

        flows: whether a gradient flows back through it.
        """
        writes = self.writes[node.name] = written_by(node)
        for name in writes if node.results else ():
            self.overwritten[node.results[0].name] = name
            if flows:
                owner = self.memory_of(name)
                self.trained_memory.add(owner)
        if node.results and shares_memory(node.target):
            operand = node.operands()[0]
            self.views.update((value.name, operand) for value in node.results)

    def leaf_all(self, item: Any) -> Any:
        """Return arguments with nodes replaced by what they stand for, and lists by tuples.

        item: an argument of a call of the exported program. Raises CaptureError for an object that
        is neither a tensor nor a number.
        """
        if isinstance(item, torch.fx.Node):
            if item not in self.translated:
                raise CaptureError(
                    f"the program holds an object that is no tensor: {item.name}",
                    why="its type is " + type(item.meta.get("val")).__name__,
                    fix="make it outside of the model, or keep what uses it in a submodule of its "
                    "own, which then stays Python",
                )
            return self.translated[item]
        if isinstance(item, (list, tuple)):
            return tuple(self.leaf_all(part) for part in item)
        if isinstance(item, slice):
            raise AssertionError("a slice in an aten call")
        return item

    def scalar(self, example: Any) -> Any:
        """Return a number of the exported program as it is, or as an expression if symbolic."""
        if isinstance(example, (torch.SymInt, torch.SymFloat)):
            return self.size(example)
        return example

    def assume(self, guards: Iterable[sympy.Basic]) -> None:
        """Note which expressions in sizes are numbers, by what the tracer assumed about sizes.

        A symbol alone that is a number is not among them: the tracer writes the number itself.
        """
        for guard in guards:
            if isinstance(guard, sympy.Eq) and guard.rhs.is_number and not guard.lhs.is_Symbol:
                self.equal_sizes[guard.lhs] = guard.rhs

    def size(self, size: Any) -> Dim:
        """Return one size of the exported program, equal sizes as one object.

        A size that depends on the values of a tensor has a symbol that no input has.
        """
        if isinstance(size, int):
            return size
        expr = expression_of(size)
        # The tracer may have assumed h // 4 == 2, say, and still write h // 4.
        if self.equal_sizes:
            expr = expr.xreplace(self.equal_sizes)
        if expr not in self._sizes:
            if expr.is_number:
                number: Any = int(expr) if expr.is_integer else float(expr)
                self._sizes[expr] = number
            elif not expr.is_Symbol and isinstance(size, torch.SymInt) and is_fixed(size):
                # It follows from several assumptions together, or from the range of a symbol.
                self._sizes[expr] = int(hint_of(size))
            else:
                hint = hint_of(size)
                # A pass may see that nothing else depends on it; else the graph is refused.
                self._sizes[expr] = Sym(
                    sympy.sympify(expr), _UNKNOWN if hint is None else int(hint)
                )
        return self._sizes[expr]

    def shape(self, example: torch.Tensor) -> tuple[Dim, ...]:
        """Return the sizes of a tensor of the exported program."""
        return tuple(self.size(size) for size in example.shape)

    def value(self, name: str, example: torch.Tensor, grad: bool) -> Value:
        """Return a value that looks like `example`.

        grad: whether it has a gradient, if numbers of its type can have one.
        """
        shape = self.shape(example)
        floating = example.dtype.is_floating_point or example.dtype.is_complex
        return Value(name, shape, example.dtype, grad and floating)


def has_unknown_sizes(graph: Graph) -> bool:
    """Return whether a size or a number depends on the values of a tensor."""
    return bool(unknown_symbols(graph))


def require_known_sizes(graph: Graph) -> None:
    """Raise CaptureError where a tensor has a size that depends on the values of another."""
    if has_unknown_sizes(graph):
        raise CaptureError(
            "the number of elements of a tensor depends on the values of another",
            why="nonzero, masked_select, x[mask] and their like return as many "
            "elements as fit, which no two ranks need agree on",
            fix="keep the shape: torch.where(mask, x, 0), masked_fill, or weights",
        )


def written_by(node: Node) -> tuple[str, ...]:
    """Return the names of the values that a call writes to, as the op's schema says.

    >>> written_by(Node("add_", "call", "aten.add_.Scalar", (), (Ref("x"), 2)))
    ('x',)
    >>> written_by(Node("add", "call", "aten.add.Scalar", (), (Ref("x"), 2)))
    ()
    """
    schema = schema_of(operator_of(node.target))
    if schema is None or not schema.is_mutable:
        return ()
    changed = [
        node.args[index] if index < len(node.args) else dict(node.kwargs).get(argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(leaf.name for leaf in leaves(tuple(changed)) if isinstance(leaf, Ref))


def _stops(target: str) -> bool:
    """Return whether no gradient flows back through the op, as it reads no value of its operand.

    `zeros_like` and `new_ones` read the shape and the type alone.
    """
    packet = packet_of(target)
    return packet == "detach" or packet.endswith("_like") or packet.startswith("new_")
