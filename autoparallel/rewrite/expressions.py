"""Expressions of an emitted program: sizes, arguments and functions as Python text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.nn import functional

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Dim, Node, Ref, Sym
from autoparallel.graph.operators import operator_of
from autoparallel.placement import Layout, Placement
from autoparallel.rewrite.names import placement_name
from autoparallel.support.torch_private import (
    NN_BINDINGS,
    PythonPrinter,
    has_torch_binding,
    nn_binding,
    schema_of,
)

__all__ = ["Code", "ExpressionWriter", "own_reduction", "spelled"]

# Overloads that torch's Python functions do not take in the op's order of arguments.
_AS_IS = {"dtype_layout", "Tensor_Scalar_out"}
# Ops that torch has as methods of tensors alone.
_METHODS = {"expand", "repeat", "to"}


class Code(str):
    """An expression, which is printed without quotes among the arguments."""

    __slots__ = ()


class ExpressionWriter:
    """Writes sizes, placements and arguments as text, and collects the objects that the text names.

    constants: objects that the text names besides values, by name. symbols: the names of the
    inputs' sizes, by symbol. sizes: texts that were printed before, because sympy's printer is
    slow.
    """

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}
        self.symbols: dict[Any, str] = {}
        self.sizes: dict[Dim, str] = {}
        self.printer = PythonPrinter()

    def placement(self, placement: Placement) -> str:
        """Return a placement by a short name, which the program gets as a constant."""
        name = placement_name(placement)
        self.constants[name] = placement
        return name

    def layout(self, layout: Layout) -> str:
        """Return a layout as a tuple of such names, one for each mesh axis."""
        names = [self.placement(placement) for placement in layout]
        return f"({', '.join(names)}{',' if len(names) == 1 else ''})"

    def size(self, size: Any) -> str:
        """Return a number, or an expression in the inputs' sizes, as text."""
        if isinstance(size, Code):
            return str(size)
        if not isinstance(size, Sym):
            return repr(size)
        if size not in self.sizes:
            self.sizes[size] = self.printed(size)
        return self.sizes[size]

    def shape(self, sizes: Iterable[Any]) -> str:
        """Return a tuple of sizes as text, with a comma behind each."""
        return f"({''.join(f'{self.size(size)}, ' for size in sizes)})"

    def printed(self, size: Sym) -> str:
        """Return a symbolic size in the names that the program gives to the inputs' sizes.

        Raises PlanError for a size that the inputs do not determine, such as a number of true
        values.
        """
        known = {symbol: sympy.Symbol(text) for symbol, text in self.symbols.items()}
        unknown = size.expr.free_symbols - set(known)
        if unknown:
            symbols = ", ".join(sorted(map(str, unknown)))
            raise PlanError(
                f"size {size} does not follow from the inputs' sizes",
                why=f"{symbols} is known only when values are computed",
                fix="make the size a number or a function of the inputs' shapes",
            )
        return str(self.printer.doprint(size.expr.subs(known)))

    def arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], reads: Iterable[str]
    ) -> str:
        """Return a call's arguments as text.

        reads: the names of its tensors, in order, repeats kept.
        """
        names = iter(reads)
        parts = [self.argument(arg, names) for arg in args]
        parts += [f"{key}={self.argument(value, names)}" for key, value in kwargs.items()]
        return ", ".join(parts)

    def argument(self, item: Any, names: Iterator[str]) -> str:
        """Return one argument as text; nested tuples become lists,
        and tensors take the next name.
        """
        if isinstance(item, Ref):
            return next(names)
        if isinstance(item, (Code, Sym)):
            return self.size(item)
        if isinstance(item, tuple):
            return "[" + ", ".join(self.argument(part, names) for part in item) + "]"
        # Every rank has a device of its own, which it passes to the program.
        if isinstance(item, torch.device):
            return "device"
        # repr gives inf and nan, which are no names in Python.
        if isinstance(item, float) and not math.isfinite(item):
            return f"float('{item}')"
        if isinstance(item, (bool, type(None), torch.dtype)):
            return repr(item)
        # A child of these, such as a number of numpy's or a member of an enum, prints otherwise.
        for kind in (int, float, str):
            if isinstance(item, kind):
                return kind.__repr__(item)
        if isinstance(item, (torch.layout, torch.memory_format)):
            return repr(item)
        key = f"constant_{len(self.constants)}"
        self.constants[key] = item
        return key


def spelled(target: str, text: str, reads: list[str]) -> str:
    """Return the call of an op, as a person would write it where torch has such a function.

    target: of the op. text: its arguments. reads: the names of its tensors; a method is called on
    the first.

    >>> spelled("aten.relu.default", "x", ["x"]), spelled("aten.to.dtype", "x, y", ["x"])
    ('torch.relu(x)', 'x.to(y)')
    """
    space, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if space == "aten" and overload not in _AS_IS and not name.startswith("_"):
        function = nn_binding(name)
        if function is not None:
            # Some of these bindings are private; F re-exports the public ones.
            public = getattr(functional, name, None) is function
            return f"{'F' if public else NN_BINDINGS}.{name}({text})"
        if has_torch_binding(name):
            return f"torch.{name}({text})"
        if name in _METHODS and reads and text.startswith(reads[0]):
            others = text[len(reads[0]) :].removeprefix(", ")
            return f"{reads[0]}.{name}({others})"
    return f"torch.ops.{target}({text})"


def own_reduction(node: Node) -> dict[str, Any]:
    """Return the default of `reduction` by the op's schema,
    where the call leaves it to the default; else nothing.

    Torch's Python bindings of losses have another default (none) than the ops (mean), so that it is
    written out.
    """
    op = operator_of(node.target)
    if op is None or not node.target.startswith("aten."):
        return {}
    for index, argument in enumerate(schema_of(op).arguments):
        if argument.name == "reduction" and len(node.args) <= index:
            return {} if "reduction" in dict(node.kwargs) else {"reduction": argument.default_value}
    return {}
