"""A traced module: its graph, and the conditions under which the graph is right for a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import sympy
import torch
from torch import nn

from autoparallel.errors import PlanError
from autoparallel.graph.attribute_read import AttributeRead, TensorRead
from autoparallel.graph.attribute_write import AttributeWrite
from autoparallel.graph.graph import Dim, Graph, Sym
from autoparallel.graph.repeated_blocks import Repeats, find_repeats
from autoparallel.graph.settled_parameters import SettledParameter
from autoparallel.support.pytree import Skeleton, leaf_paths, rebuild, with_constants
from autoparallel.support.rng_state import PythonDraw, PythonNumbers
from autoparallel.support.torch_private import default_device_kind

__all__ = ["Captured", "Modes", "SizeNumber", "Surroundings", "autocast_type", "modes_of"]

# One truth value per module.
Modes = tuple[bool, ...]


def modes_of(model: nn.Module) -> Modes:
    """Return whether the model and each module in it trains, in one order: another mode,
    another program.
    """
    return tuple(module.training for module in model.modules())


class Surroundings(NamedTuple):
    """The state of torch around a call, outside of the model, on which its graph depends.

    default_dtype: of tensors that the forward makes from numbers. autocast: the type in which
    autocast computes on the model's device, None where it is off. default_device: the kind of the
    one on which tensors lie that are made without saying where.

    >>> Surroundings.now(torch.device("cpu"))
    Surroundings(default_dtype=torch.float32, autocast=None, default_device='cpu')
    """

    default_dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    default_device: str = "cpu"

    @staticmethod
    def now(device: torch.device) -> Surroundings:
        """Return the state of this thread. device: of the model's parameters."""
        dtype, autocast = torch.get_default_dtype(), autocast_type(device)
        return Surroundings(dtype, autocast, default_device_kind())


_USUAL = Surroundings()


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type in which autocast computes now on a device, None where it is off.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_type(torch.device("cpu"))
    torch.bfloat16
    """
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


@dataclass(frozen=True)
class SizeNumber:
    """A number that a model returns and that follows from the sizes of its inputs.

    kind: int, float or bool. expression: in the symbols of the graph's sizes.

    >>> rows = sympy.Symbol("rows")
    >>> SizeNumber(float, rows / 2).at({rows: 3})
    1.5
    """

    kind: type
    expression: sympy.Basic

    def at(self, values: Mapping[Any, int]) -> int | float | bool:
        """Return the number for these values of the symbols."""
        number: int | float | bool = self.kind(self.expression.subs(values))
        return number


@dataclass(frozen=True)
class Captured:
    """A module as it was traced: a program, the structures around it, and what it was traced for.

    graph: the program. inputs, outputs: skeletons of the arguments and of the returned structure.
    aliases: for each parameter path the one that stands for it (another one for tied weights).
    constants: tensors that the forward makes from numbers, by the targets of "constant" nodes.
    repeats: paths of modules that are instances of one traced block. guards: conditions on symbolic
    sizes that the tracer took for granted, such as which way a branch goes. part: whether the
    module is called by Python that goes on with what it returns. modes: see `modes_of`.
    left: the places in attributes to which the forward writes: where there are any, the outputs are
    a pair of what it returns and a tuple of what it writes there.
    reads: the plain attributes that the forward has read. surroundings: the state of torch around
    it. gradients: whether gradients were recorded, None where the forward does not ask for that.
    given: the properties of input tensors that it has read. own: (number of an output, path) where
    the model returns a tensor that it holds itself, a parameter or any other. ways: the answers
    that its branches on values got, by the lines that ask; the graph checks each of them.
    numbers: the states in which the forward leaves Python's and numpy's generators, where it seeds
    them, and what it draws of others to no effect. settled: the writes to parameters that come
    before the program.
    """

    graph: Graph
    inputs: Skeleton
    outputs: Skeleton
    aliases: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    repeats: tuple[tuple[str, ...], ...] = ()
    guards: tuple[sympy.Basic, ...] = ()
    part: bool = False
    modes: Modes = ()
    left: tuple[AttributeWrite, ...] = ()
    reads: tuple[AttributeRead, ...] = ()
    surroundings: Surroundings = _USUAL
    gradients: bool | None = None
    given: tuple[TensorRead, ...] = ()
    own: tuple[tuple[int, str], ...] = ()
    ways: Mapping[tuple[str, int, str], tuple[Any, ...]] = field(default_factory=dict)
    numbers: tuple[PythonNumbers | PythonDraw, ...] = ()
    settled: tuple[SettledParameter, ...] = ()

    def together(
        self, tensors: list[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> tuple[Any, tuple[Any, ...]]:
        """Return what the model returns, and what it writes to the places in `left`.

        tensors: those that the program returns. inputs: of the call, whose sizes may be among what
        the model returns.
        """
        made = rebuild(self.returned(inputs), tensors)
        return made if self.left else (made, ())

    def refuse_writes(self, program: str) -> None:
        """Raise PlanError where parameters are written to before the program runs.

        program: what was to be made of the graph, which has no such writes.
        """
        if self.settled:
            write = self.settled[0]
            raise PlanError(
                f"the forward writes to {write.path} before it reads it ({write.target})",
                why=f"{program} has no place for it: the parallel module does it before each call",
                fix="write to the parameter outside of the forward, after the optimizer's step",
            )

    @property
    def returned_tensors(self) -> int:
        """The number of tensors that the model returns, without those that it leaves behind."""
        kept = self.outputs.children[0] if self.left else self.outputs
        return kept.tensors

    def returned(self, inputs: Sequence[torch.Tensor]) -> Skeleton:
        """Return the skeleton of what the model returns in a call with these inputs."""
        if not self._returns_sizes:
            return self.outputs
        values: dict[Any, int] = {}
        nodes = (node for node in self.graph.nodes if node.kind == "input")
        for tensor, node in zip(inputs, nodes, strict=True):
            for actual, size in zip(tensor.shape, node.result.shape, strict=True):
                if isinstance(size, Sym) and size.expr.is_Symbol:
                    values[size.expr] = actual

        def number(constant: Any) -> Any:
            """Return the number that an expression in sizes has in this call."""
            return constant.at(values) if isinstance(constant, SizeNumber) else constant

        return with_constants(self.outputs, number)

    @cached_property
    def _returns_sizes(self) -> bool:
        """True if the model returns numbers that follow from sizes of its inputs."""
        constants = leaf_paths(self.outputs, "constant").values()
        return any(isinstance(constant, SizeNumber) for constant in constants)

    def alike(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Return whether the properties of inputs that the forward has read are as they were."""
        return all(read.holds_among(inputs) for read in self.given)

    def fits(self, inputs: list[torch.Tensor]) -> bool:
        """Return whether the program is right for tensors of these types and sizes, and gives a
        gradient to every one of them that needs one.

        inputs: the tensors of the call, in the order of the graph's input nodes. Where it does not
        fit, tracing with them would give another program.
        """
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        types = [tensor.dtype for tensor in inputs]
        values = [node.result for node in self.graph.nodes if node.kind == "input"]
        # Cheap tests first: this runs before every call.
        if types != [value.dtype for value in values]:
            return False
        # A forward may do something else with a sparse tensor, and its parts are other ones.
        if any(tensor.layout is not torch.strided for tensor in inputs):
            return False
        # A gradient that was not planned for would not come back.
        pairs = zip(inputs, values, strict=True)
        if any(one.requires_grad and not planned.requires_grad for one, planned in pairs):
            return False
        return self._holds(shapes, [value.shape for value in values])

    @cached_property
    def blocks(self) -> Repeats:
        """The repeated blocks of the graph."""
        return find_repeats(self.graph)

    def _holds(self, shapes: tuple[tuple[int, ...], ...], expected: list[tuple[Dim, ...]]) -> bool:
        """Return whether inputs of these shapes agree with the
        expected sizes and satisfy all guards.

        Symbols get their values from dims that are a symbol by itself; sizes derived from symbols
        are checked after that.
        """
        sizes: dict[Any, int] = {}
        derived: list[tuple[sympy.Expr, int]] = []
        for shape, dims in zip(shapes, expected, strict=True):
            if len(shape) != len(dims):
                return False
            for actual, dim in zip(shape, dims, strict=True):
                if not isinstance(dim, Sym):
                    if actual != dim:
                        return False
                elif dim.expr.is_Symbol:
                    # The tracer treats 0 and 1 apart.
                    if actual < 2 or sizes.setdefault(dim.expr, actual) != actual:
                        return False
                else:
                    derived.append((dim.expr, actual))
        if any(expr.subs(sizes) != actual for expr, actual in derived):
            return False
        # A guard that cannot be decided is taken to hold, as the tracer did.
        return all(guard.subs(sizes) != sympy.false for guard in self.guards)
