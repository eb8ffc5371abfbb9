"""Slices of an op's results that change with one slice of an operand, at one set of sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import torch

from autoparallel.discovery.probe_sizes import ProbeSizes
from autoparallel.discovery.shape_pattern import (
    OpFailedError,
    Probe,
    ProbeError,
    Values,
)
from autoparallel.discovery.size_choices import assignment

__all__ = ["ObservedDependence", "Place", "Tie"]

# Sets of random numbers at most: a slice may change nothing by chance (a maximum, a ReLU).
_DRAWS = 4

# A dim: the tensor's number (operands first, then results), and the dim's.
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tie:
    """Two dims that run together in some of their strides.

    The element (place // low_one) % size of dim `one` is the element (place // low_two) % size of
    dim `two`: below `low` lie inner loops, above low * size outer ones.
    """

    one: Place
    low_one: int
    two: Place
    low_two: int
    size: int


class ObservedDependence:
    """The dependences that are seen at one set of sizes.

    sizes: values of the pattern's independent sizes. count: number of operands. shapes: of operands
    and results. ties: dims that run together.
    """

    def __init__(self, probe: Probe, shrunk: ProbeSizes, which: int) -> None:
        self.probe, self.pattern = probe, shrunk.pattern
        self.sizes = assignment(shrunk.order, which)
        self.count = len(probe.call.operands)
        self.ties: list[Tie] = []
        self.shapes: list[tuple[int, ...]] = []
        self.observe(shrunk.values)

    def observe(self, values: Values) -> None:
        """Change each slice of each operand in turn, and note which slices of the results
        differ.
        """
        probe, pattern, sizes = self.probe, self.pattern, self.sizes
        changed: dict[tuple[Place, Place], torch.Tensor] = {}
        for seed in range(1, 1 + _DRAWS):
            seen_before = sum(int(matrix.sum()) for matrix in changed.values())
            tensors = probe.tensors(pattern, sizes, values, seed)
            others = probe.tensors(pattern, sizes, values, seed + 1000)
            whole = probe.run(pattern, sizes, tensors)
            if not self.shapes:
                self.shapes = [tuple(t.shape) for t in (*tensors, *whole)]
            for operand, tensor in enumerate(tensors):
                other = _different(tensor, others[operand])
                for dim, size in enumerate(tensor.shape):
                    # A dim of size 1 has no loop, and its one slice is the whole tensor.
                    if size == 1:
                        continue
                    results_by_slice: dict[int, tuple[torch.Tensor, ...]] = {}
                    for i in range(size):
                        changed_tensor = tensor.clone()
                        changed_tensor.select(dim, i).copy_(other.select(dim, i))
                        # Slice i alone is replaced, so that every result that differs depends on
                        # it.
                        inputs = [*tensors[:operand], changed_tensor, *tensors[operand + 1 :]]
                        # Numbers may be out of the op's domain: other slices and seeds still tell.
                        with suppress(OpFailedError):
                            results_by_slice[i] = probe.run(pattern, sizes, inputs)
                    self.compare(changed, (operand, dim), size, whole, results_by_slice)
            # More numbers show nothing new.
            if seen_before == sum(int(matrix.sum()) for matrix in changed.values()):
                break
        for (one, two), matrix in changed.items():
            self.ties += _ties(one, two, matrix)
        self.untouched(changed)

    def compare(
        self,
        changed: dict[tuple[Place, Place], torch.Tensor],
        place: Place,
        size: int,
        before: tuple[torch.Tensor, ...],
        after: dict[int, tuple[torch.Tensor, ...]],
    ) -> None:
        """Note in `changed` which slices of the results differ where slice i of an operand does:
        after[i].
        """
        for index, one in enumerate(before):
            others = [results[index] for results in after.values()]
            if any(other.shape != one.shape for other in others):
                raise ProbeError("gives results whose sizes depend on the numbers that it reads")
            if not others:
                continue
            # Exactly unequal, and not beyond a tolerance: an op that does not read a number gives
            # the same bits.
            differs = torch.stack(others) != one
            for dim, length in enumerate(one.shape):
                if length == 1:
                    continue
                key = (place, (self.count + index, dim))
                if key not in changed:
                    changed[key] = torch.zeros(size, length, dtype=torch.bool)
                # differs has the operand's slices first, and then the result's dims.
                rest = [d + 1 for d in range(one.dim()) if d != dim]
                rows = differs.any(rest) if rest else differs
                changed[key][list(after)] |= rows

    def untouched(self, changed: dict[tuple[Place, Place], torch.Tensor]) -> None:
        """Tie dims of equal size to an operand whose numbers change nothing: it gives its shape
        alone.
        """
        touching = {one[0] for (one, _), matrix in changed.items() if bool(matrix.any())}
        for (one, two), matrix in changed.items():
            if one[0] not in touching and matrix.shape[0] == matrix.shape[1]:
                self.ties.append(Tie(one, 1, two, 1, matrix.shape[0]))
        self.constant(changed, touching)

    def constant(
        self, changed: dict[tuple[Place, Place], torch.Tensor], touching: set[int]
    ) -> None:
        """Tie dims of a result that no operand changes to the operand's dim of equal size.

        Such a result is a code of success for each matrix of a batch, say. touching: operands that
        change some result. A dim at the same place is preferred, since sizes may be equal.
        """
        touched = {two[0] for (_, two), matrix in changed.items() if bool(matrix.any())}
        alike: dict[Place, list[Place]] = {}
        for (one, two), matrix in changed.items():
            if two[0] not in touched and one[0] in touching and matrix.shape[0] == matrix.shape[1]:
                alike.setdefault(two, []).append(one)
        for two, ones in alike.items():
            one = min(ones, key=lambda place: (abs(place[1] - two[1]), place))
            self.ties.append(Tie(one, 1, two, 1, self.shapes[two[0]][two[1]]))

    def cuts(self, opaque: set[Place]) -> dict[Place, list[int]]:
        """Return, per dim, the strides at which its loops begin: 1, ..., the dim's size.

        opaque: dims that are left as they are; those whose cuts are not each a multiple of the one
        before are added to it.
        """
        while True:
            ties = [tie for tie in self.ties if tie.one not in opaque and tie.two not in opaque]
            points_of: dict[Place, set[int]] = {
                (tensor, dim): {1, size}
                for tensor, shape in enumerate(self.shapes)
                for dim, size in enumerate(shape)
                if size > 1
            }
            for tie in ties:
                points_of[tie.one] |= {tie.low_one, tie.low_one * tie.size}
                points_of[tie.two] |= {tie.low_two, tie.low_two * tie.size}
            self.spread(ties, points_of)
            broken = {
                place
                for place, points in points_of.items()
                if any(high % low for low, high in pairwise(sorted(points)))
            }
            # Ties of a broken dim no longer count, which may mend others: all is computed anew.
            if not broken - opaque:
                return {place: sorted(points) for place, points in points_of.items()}
            opaque |= broken

    def spread(self, ties: list[Tie], points_of: dict[Place, set[int]]) -> None:
        """Cut each of two dims that run together where the other is cut.

        points_of: the places of cuts by dim, filled here.
        """
        changed = True
        while changed:
            changed = False
            for tie in ties:
                ways = (
                    (tie.one, tie.low_one, tie.two, tie.low_two),
                    (tie.two, tie.low_two, tie.one, tie.low_one),
                )
                for source, low, target, low_target in ways:
                    # A cut inside of the tie, in steps of the inner strides, is the same cut of the
                    # other dim.
                    for point in tuple(points_of[source]):
                        if point % low or not low < point < low * tie.size:
                            continue
                        if point // low * low_target not in points_of[target]:
                            points_of[target].add(point // low * low_target)
                            changed = True


def _different(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return other numbers in every place, of the same kind and range."""
    if tensor.dtype == torch.bool:
        return ~tensor
    return torch.where(other == tensor, other.flip(0) if other.dim() else other, other)


def _ties(one: Place, two: Place, matrix: torch.Tensor) -> Iterator[Tie]:
    """Yield the largest parts of two dims that run together.

    matrix[i, j]: slice i changes slice j.
    """
    rows, columns = matrix.nonzero(as_tuple=True)
    n, m = matrix.shape
    # Too few changes were seen to tell anything.
    if len(rows) < max(2, min(n, m) // 2):
        return
    ties: list[Tie] = []
    # Larger parts first: a smaller tie inside of a larger one says less.
    for size in sorted(d for d in range(2, min(n, m) + 1) if n % d == 0 and m % d == 0)[::-1]:
        for low_one in _divisors(n // size):
            for low_two in _divisors(m // size):
                if bool((rows // low_one % size == columns // low_two % size).all()):
                    tie = Tie(one, low_one, two, low_two, size)
                    if all(_apart(tie, other) for other in ties):
                        ties.append(tie)
    yield from ties


def _apart(tie: Tie, other: Tie) -> bool:
    """Return whether two ties are about other strides of both dims, so that both can hold."""
    return all(
        low >= other_low * other.size or other_low >= low * tie.size
        for low, other_low in ((tie.low_one, other.low_one), (tie.low_two, other.low_two))
    )


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number, from the smallest."""
    return [d for d in range(1, number + 1) if number % d == 0]
