"""Guesses which generic kernel may split a loop that no plain split does; a trial decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from autoparallel.discovery.discovered_rule import DiscoveredKernel, DiscoveredRule
from autoparallel.discovery.probe_sizes import ProbeSizes
from autoparallel.discovery.shape_pattern import OpFailedError, Probe
from autoparallel.discovery.size_choices import assignment
from autoparallel.graph.graph import leaves
from autoparallel.support.torch_private import schema_of

__all__ = ["kernels_for"]


def kernels_for(
    probe: Probe, shrunk: ProbeSizes, draft: DiscoveredRule, loop: str
) -> Iterator[DiscoveredKernel]:
    """Yield kernels that may split a loop that not all results have.

    probe, shrunk: the call at small sizes. found: the rule so far. loop: the one to be split. Every
    kernel is a guess, which the caller must try.
    """
    having = [any(loop in names for names in dims) for dims in draft.results]
    if any(having) and not all(having):
        yield DiscoveredKernel("alike_elsewhere", "I")
    if len(draft.results) != 1 or any(loop in names for names in draft.results[0]):
        return
    at = [
        (operand, dim)
        for operand, dims in enumerate(draft.operands)
        for dim, names in enumerate(dims)
        if loop in names
    ]
    # Kernels take whole dims alone, not a loop inside of a merged one.
    if any(draft.operands[operand][dim] != (loop,) for operand, dim in at):
        return
    if len(at) == 1:
        yield from _lookups(probe, shrunk, draft, *at[0])
        yield from _combined(draft, *at[0])
    if probe.call.results[0].dtype.is_floating_point and not _counts(probe, shrunk, at):
        yield DiscoveredKernel("weighted_mean", "P", (("where", tuple(at)),))


def _lookups(
    probe: Probe, shrunk: ProbeSizes, draft: DiscoveredRule, table: int, dim: int
) -> Iterator[DiscoveredKernel]:
    """Yield a masked look-up, if the dim is what an operand of whole numbers has its places in."""
    size = draft.pattern.operands[table][dim]
    for index, bound in enumerate(shrunk.values.bounds):
        if bound != size or index == table:
            continue
        places = []
        for names in draft.operands[index]:
            where = [e for e, others in enumerate(draft.results[0]) if names == others and names]
            places.append(where[0] if len(where) == 1 else -1)
        # Each dim of the places must be one dim of the result, where the mask is applied.
        if -1 in places or len(set(places)) < len(places):
            continue
        if not _takes_special(probe, shrunk, index):
            yield DiscoveredKernel(
                "masked_lookup", "P", (("where", (table, index, dim, tuple(places))),)
            )


def _combined(draft: DiscoveredRule, operand: int, dim: int) -> Iterator[DiscoveredKernel]:
    """Yield parts' results gathered and reduced again,
    if the result has the operand's other dims in their order.
    """
    result_dims = []
    for names in draft.operands[operand]:
        where = [e for e, others in enumerate(draft.results[0]) if names == others and names]
        result_dims.append(where[0] if where else -1)
    order = [place for place in result_dims if place >= 0]
    dims_with_loops = [e for e, names in enumerate(draft.results[0]) if names]
    if order == dims_with_loops:
        arguments = (("where", (operand, dim, tuple(result_dims))),)
        yield DiscoveredKernel("combined_parts", "I", arguments, gathers=True)


def _runs(probe: Probe, shrunk: ProbeSizes, index: int, value: float) -> torch.Tensor | None:
    """Return the first result where one number of an operand is `value`; None if the op fails,
    or may not survive it.
    """
    if probe.careful:
        return None
    sizes = assignment(shrunk.order, 0)
    tensors = probe.tensors(shrunk.pattern, sizes, shrunk.values, 0, guarded=True)
    tensors[index].view(-1)[:1] = value
    try:
        return probe.run(shrunk.pattern, sizes, tensors)[0]
    except OpFailedError:
        return None


def _takes_special(probe: Probe, shrunk: ProbeSizes, index: int) -> bool:
    """Return whether places may be other than 0, 1, ...: counted from the end,
    or marks of no place.
    """
    if not probe.checks:
        return True
    # Negative defaults and arguments often mark places: padding_idx=-1, ignore_index=-100.
    numbers = {-1}
    for item in (
        *leaves((probe.call.node.args, probe.call.node.kwargs)),
        *(argument.default_value for argument in schema_of(probe.operation).arguments),
    ):
        if isinstance(item, int) and not isinstance(item, bool) and item < 0:
            numbers.add(item)
    results = (_runs(probe, shrunk, index, number) for number in sorted(numbers))
    return any(result is not None and bool(result.isfinite().all()) for result in results)


def _counts(probe: Probe, shrunk: ProbeSizes, at: list[tuple[int, int]]) -> bool:
    """Return whether some numbers may not count in a mean: zeros, marked places, or NaN."""
    if not _averages_zeros(probe, shrunk, at):
        return True
    for index, operand in enumerate(probe.call.operands):
        if shrunk.values.bounds[index] is not None and _takes_special(probe, shrunk, index):
            return True
        if operand.dtype.is_floating_point:
            result = _runs(probe, shrunk, index, float("nan"))
            if result is not None and bool(result.isfinite().all()):
                return True
    return False


def _averages_zeros(probe: Probe, shrunk: ProbeSizes, at: list[tuple[int, int]]) -> bool:
    """Return whether the result is the mean of its parts' results by their sizes,
    zeros among the numbers.
    """
    sizes = assignment(shrunk.order, 0)
    # Half of the numbers are zeros: a mean over nonzero numbers alone would show here.
    tensors = probe.tensors(shrunk.pattern, sizes, replace(shrunk.values, zeros=0.5), 0)
    size = tensors[at[0][0]].size(at[0][1])
    # Unequal parts where the size is odd, so that a mean of means is told from the mean.
    cut = size // 2
    try:
        whole = probe.run(shrunk.pattern, sizes, tensors)[0]
        if not whole.dtype.is_floating_point:
            return False
        total = torch.zeros_like(whole)
        for start, length in ((0, cut), (cut, size - cut)):
            parts = list(tensors)
            for operand, dim in at:
                parts[operand] = parts[operand].narrow(dim, start, length)
            part = probe.run(shrunk.pattern, sizes, parts)[0]
            if part.shape != whole.shape:
                return False
            total += part * (length / size)
    except OpFailedError:
        return False
    return torch.allclose(whole, total, equal_nan=True)
