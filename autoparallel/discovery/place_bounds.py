"""Operands of whole numbers that are places along a dim: the size below which they must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from autoparallel.discovery.shape_pattern import OpFailedError, Pattern, Probe, Term, Values
from autoparallel.discovery.size_choices import assignment

__all__ = ["with_bounds"]


def with_bounds(probe: Probe, pattern: Pattern, order: tuple[int, ...], values: Values) -> Values:
    """Return the values with a bound for each operand of whole numbers that are places.

    The op takes them below that dim's size, and refuses that size itself. probe: the call.
    pattern, order: its sizes, and the independent ones in order.
    """
    bounds: list[Term | None] = []
    for index, operand in enumerate(probe.call.operands):
        numbers = operand.dtype.is_floating_point or operand.dtype.is_complex
        plain = numbers or operand.dtype == torch.bool
        # Related numbers are no places.
        plain = plain or bool(values.meanings and values.meanings[index])
        bounds.append(None if plain else _bound(probe, pattern, order, values, index))
    return replace(values, bounds=tuple(bounds))


def _bound(
    probe: Probe, pattern: Pattern, order: tuple[int, ...], values: Values, index: int
) -> Term | None:
    """Return the size below which an operand's numbers must be; None where no size is one."""
    sizes = assignment(order, 0)
    terms = {
        term.at(sizes): term
        for at, row in enumerate((*pattern.operands, pattern.integers))
        for term in row
        if at != index and term.at(sizes) > 1
    }
    # From the smallest: the first size that is refused is the bound, if the number below is taken.
    for size in sorted(terms):
        if not _accepts(probe, pattern, sizes, values, index, size - 1):
            return None
        if not _accepts(probe, pattern, sizes, values, index, size):
            return terms[size]
    return None


def _accepts(
    probe: Probe,
    pattern: Pattern,
    sizes: Mapping[int, int],
    values: Values,
    index: int,
    value: int,
) -> bool:
    """Return whether the op runs where one number of the operand is `value`."""
    tensors = probe.tensors(pattern, sizes, values, 0, guarded=True)
    tensors[index].view(-1)[:1] = value

    def words() -> str:
        """Return "" where the op runs, or else its words."""
        try:
            probe.guarded_run(pattern, sizes, tensors)
        except OpFailedError as error:
            return error.words
        return ""

    return not probe.survived(words)
