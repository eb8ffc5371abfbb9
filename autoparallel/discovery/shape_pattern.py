"""The shape pattern of a call: how its sizes follow from independent ones; and runs at others.

An op that is understood at one call's sizes is understood at any that follow the same pattern, so a
rule can be found on small tensors, and be used for large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from autoparallel.capture.custom_functions import function_op
from autoparallel.discovery.forked_run import Limits, ProcessEndedError, run_in_fork
from autoparallel.graph.graph import Dim, Ref, Sym, hint, leaves, map_leaves, size_expression
from autoparallel.graph.operators import operator_of
from autoparallel.rules.rule import OpCall
from autoparallel.support.torch_private import is_custom_op

__all__ = [
    "MEANINGS",
    "OpFailedError",
    "Pattern",
    "Probe",
    "ProbeError",
    "Term",
    "Values",
    "integers_of",
    "replace_integers",
]


# Elements of guard memory on each side of an operand, see `Probe.tensors`.
_GUARD = 4096


class ProbeError(Exception):
    """An op cannot be probed. Its text is the rest of a sentence that starts with the op."""


class OpFailedError(ProbeError):
    """The op itself raised an error, or gave results of no use. words: its own words."""

    def __init__(self, words: str) -> None:
        super().__init__(f"failed on probe inputs: {words}")
        self.words = words


@dataclass(frozen=True, slots=True)
class Term:
    """A size: a number times the product of some of the pattern's independent sizes.

    factor: the number. atoms: indices of the independent sizes, sorted, repeats kept.

    >>> Term(2, (0, 1)).at({0: 3, 1: 5})
    30
    """

    factor: int
    atoms: tuple[int, ...] = ()

    def at(self, sizes: Mapping[int, int]) -> int:
        """Return the value where the independent sizes have these values."""
        value = self.factor
        for atom in self.atoms:
            value *= sizes[atom]
        return value

    def of(self, sizes: Mapping[int, Dim]) -> Dim:
        """Return the same for sizes that may be symbolic."""
        known = [sizes[atom] for atom in self.atoms]
        symbols = [size for size in known if isinstance(size, Sym)]
        number = self.factor
        for size in known:
            number *= hint(size)
        # A plain number where it can be, because Sym and int are never equal.
        if not symbols:
            return number
        if len(known) == 1 and self.factor == 1:
            return symbols[0]
        expression: Any = sympy.Integer(self.factor)
        for size in known:
            expression = expression * size_expression(size)
        return Sym(expression, number)


@dataclass(frozen=True, slots=True)
class Pattern:
    """The sizes of a call: of every dim of every operand, and its integer arguments, in order.

    Sizes that share an independent size are related: a product of (m, k) and (k, n) has three.
    """

    operands: tuple[tuple[Term, ...], ...]
    integers: tuple[Term, ...]

    @property
    def atoms(self) -> tuple[int, ...]:
        """The indices of the pattern's independent sizes, sorted."""
        return tuple(sorted({atom for term in self.terms() for atom in term.atoms}))

    def terms(self) -> Iterator[Term]:
        """Yield all sizes of the pattern: those of operands, then the integers."""
        for row in self.operands:
            yield from row
        yield from self.integers

    def solve(self, call: OpCall) -> dict[int, Dim] | None:
        """Return the independent sizes of `call`, by index;
        None if the call does not follow the pattern.
        """
        integers = integers_of(call)
        if len(self.operands) != len(call.operands) or len(self.integers) != len(integers):
            return None
        pairs: list[tuple[Term, Dim]] = []
        for row, operand in zip(self.operands, call.operands, strict=True):
            if len(row) != len(operand.shape):
                return None
            pairs += zip(row, operand.shape, strict=True)
        pairs += zip(self.integers, integers, strict=True)
        sizes: dict[int, Dim] = {}
        while True:
            before = len(sizes)
            for term, actual in pairs:
                unknown = [atom for atom in term.atoms if atom not in sizes]
                # As in elimination: a size with one unknown tells it.
                if len(unknown) == 1:
                    rest = Term(term.factor, tuple(a for a in term.atoms if a in sizes))
                    value = _over(actual, rest.of(sizes))
                    if value is None:
                        return None
                    sizes[unknown[0]] = value
            if len(sizes) == before:
                break
        if len(sizes) != len(self.atoms):
            return None
        # Solved from some of the sizes, it must hold for all of them.
        return sizes if all(term.of(sizes) == actual for term, actual in pairs) else None


def _over(size: Dim, divisor: Dim) -> Dim | None:
    """Return the quotient of two sizes; None where it is no whole number."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if size % divisor == 0 else None
    if divisor == 1:
        return size
    # Symbolic sizes: the quotient must be whole for the hints, and simple for the rest.
    quotient = sympy.cancel(size_expression(size) / size_expression(divisor))
    if hint(size) % hint(divisor):
        return None
    if quotient.is_Integer:
        return int(quotient)
    return Sym(quotient, hint(size) // hint(divisor))


def _is_size(leaf: Any) -> bool:
    """Return whether an argument may be a size: a whole number, and no truth value."""
    return isinstance(leaf, Sym) or (isinstance(leaf, int) and not isinstance(leaf, bool))


def integers_of(call: OpCall) -> list[Dim]:
    """Return the integer arguments of a call, in order, those of keywords last."""
    structure = (call.node.args, call.node.kwargs)
    return [leaf for leaf in leaves(structure) if _is_size(leaf)]


def replace_integers(structure: Any, integers: Iterator[Any]) -> Any:
    """Return the same nested tuples with other integers, taken from the iterator in order."""
    return map_leaves(lambda leaf: next(integers) if _is_size(leaf) else leaf, structure)


@dataclass(frozen=True, slots=True)
class Values:
    """The numbers that operands are filled with.

    low, high: bounds of their magnitude. signs: both signs, or positive alone. bounds: per operand
    of whole numbers that are places along some dim, that dim's size. step: numbers are multiples of
    it, if it is not 0. zeros: the share of numbers that is zero. meanings: per operand, words of
    MEANINGS for whole numbers that are related to each other; "" for others, and none where no
    operand has a meaning.
    """

    low: float = 0.2
    high: float = 0.9
    signs: bool = True
    bounds: tuple[Term | None, ...] = ()
    step: float = 0.0
    zeros: float = 0.0
    meanings: tuple[str, ...] = ()


# Whole numbers that grow along their last dim: where groups begin, from 0, and where they end.
MEANINGS = ("begins", "ends")


class Probe:
    """A call that can be run at other sizes, on the CPU.

    call: as the graph has it. dtype: the type that stands for every floating point type. careful:
    whether what the op may not survive is done in processes of their own. runs: how often the op
    was run.
    """

    def __init__(
        self, call: OpCall, dtype: torch.dtype = torch.float64, careful: bool = False
    ) -> None:
        self.call, self.dtype, self.careful = call, dtype, careful
        self.operation = operator_of(call.node.target)
        self.runs = 0

    @property
    def checks(self) -> bool:
        """Return whether the op refuses operands that do not fit each other.

        Torch's public ops do, and so do those that are written in Python out of such. Others may
        read or write past the end of a tensor instead.
        """
        space, name, _ = self.call.node.target.split(".")
        if space == "aten":
            # By torch's convention these are internal, called after checks were made.
            return not name.startswith(("_", "native_"))
        function = function_op(self.call.node.target)
        if function is not None:
            return function.examined.plain
        return is_custom_op(f"{space}::{name}")

    def survived(self, work: Callable[[], str]) -> str:
        """Return the words that `work` returns; where the op is probed with care and does not
        survive it, how its process ended.
        """
        if not self.careful:
            return work()
        try:
            return run_in_fork(lambda: work().encode(), Limits()).decode()
        except ProcessEndedError as error:
            return f"its process {error}"

    def own(self) -> Pattern:
        """Return the pattern that fits this call's sizes alone, with every size a number."""
        return Pattern(
            tuple(
                tuple(Term(hint(size)) for size in operand.shape) for operand in self.call.operands
            ),
            tuple(Term(hint(value)) for value in integers_of(self.call)),
        )

    def tensors(
        self,
        pattern: Pattern,
        sizes: Mapping[int, int],
        values: Values,
        seed: int,
        guarded: bool = False,
    ) -> list[torch.Tensor]:
        """Return an operand of the pattern's shape each, without gradients.

        sizes: values of the independent sizes. seed: of the numbers. guarded: each lies amid memory
        that is NaN, so that an op that does not check sizes, and reads past the end of an operand,
        gives itself away (and harms nobody).
        """
        generator = torch.Generator().manual_seed(seed)
        operands = []
        for index, (operand, row) in enumerate(
            zip(self.call.operands, pattern.operands, strict=True)
        ):
            shape = tuple(term.at(sizes) for term in row)
            bound = values.bounds[index] if values.bounds else None
            limit = bound.at(sizes) if bound is not None else None
            tensor = self.fill(shape, operand.dtype, values, limit, generator)
            if values.meanings and values.meanings[index]:
                tensor = _growing(tensor, values.meanings[index], generator)
            operands.append(_amid_nothing(tensor) if guarded else tensor)
        return operands

    def fill(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        values: Values,
        limit: int | None,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return random numbers of one operand.

        limit: whole numbers are below it, if it is not None.
        """
        if dtype == torch.bool:
            return torch.randint(0, 2, shape, generator=generator) == 1
        if dtype.is_complex:
            parts = [self.fill(shape, self.dtype, values, limit, generator) for _ in range(2)]
            return torch.complex(*parts)
        if not dtype.is_floating_point:
            # Whole numbers that are no places are small and not 0, so that they may divide or
            # repeat.
            low, high = (1, 3) if limit is None else (0, limit)
            return torch.randint(low, high, shape, generator=generator).to(dtype)
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
        # Magnitudes first, then signs: no number is near 0, where differences vanish.
        numbers = numbers * (values.high - values.low) + values.low
        if values.step:
            numbers = (numbers / values.step).ceil() * values.step
        if values.zeros:
            numbers *= torch.rand(shape, generator=generator) >= values.zeros
        if values.signs:
            numbers *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return numbers.to(self.dtype)

    def arguments(
        self, pattern: Pattern, sizes: Mapping[int, int], tensors: list[torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call's arguments with these operands, and with the pattern's integers."""
        integers = iter([term.at(sizes) for term in pattern.integers])
        operands = iter(tensors)

        def actual(leaf: Any) -> Any:
            """Return one argument as the op is called with it."""
            if isinstance(leaf, Ref):
                return next(operands)
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
                return self.dtype
            if isinstance(leaf, torch.dtype) and leaf.is_complex:
                return self.dtype.to_complex()
            return leaf

        node = self.call.node
        args = map_leaves(actual, replace_integers(node.args, integers))
        kwargs = {
            key: map_leaves(actual, replace_integers(item, integers)) for key, item in node.kwargs
        }
        return args, kwargs

    def guarded_run(
        self, pattern: Pattern, sizes: Mapping[int, int], tensors: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return the results of guarded operands.

        Raises OpFailedError, too where they are not finite.
        """
        results = self.run(pattern, sizes, tensors)
        if not all(bool(result.isfinite().all()) for result in results):
            raise OpFailedError("its results are not finite")
        return results

    def run(
        self, pattern: Pattern, sizes: Mapping[int, int], tensors: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return the results of the op, without gradients.

        Raises OpFailedError with the op's own words.
        """
        self.runs += 1
        args, kwargs = self.arguments(pattern, sizes, tensors)
        try:
            # Probing asks which results change; gradients are for the trial.
            with torch.no_grad():
                returned = self.operation(*args, **kwargs)
        except Exception as error:  # an op is anyone's code, and may fail in any way
            words = f"{type(error).__name__}: {str(error).strip()[:300]}"
            raise OpFailedError(words) from error
        results = (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)
        if not all(isinstance(result, torch.Tensor) for result in results):
            raise OpFailedError("it gives what is no tensor")
        return results


def _growing(tensor: torch.Tensor, meaning: str, generator: torch.Generator) -> torch.Tensor:
    """Return whole numbers that grow along the last dim, to at most its size."""
    size = tensor.shape[-1] if tensor.dim() else 1
    numbers = torch.randint(0, size, tensor.shape, generator=generator).sort(-1).values
    if meaning == "ends":
        return (numbers + 1).to(tensor.dtype)
    return (numbers - numbers[..., :1] if tensor.dim() else numbers).to(tensor.dtype)


def _amid_nothing(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, with memory that is NaN (or far out of range) on both sides."""
    nothing: float | bool = float("nan")
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        nothing = tensor.dtype == torch.bool or torch.iinfo(tensor.dtype).max
    memory = torch.full((tensor.numel() + 2 * _GUARD,), nothing, dtype=tensor.dtype)
    inner = memory[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)
