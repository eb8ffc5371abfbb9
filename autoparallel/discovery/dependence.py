"""The loops of an unknown op, from which results change when one slice of an operand changes.

A dim of an operand and one of a result share a loop where slice i of the one changes only slice i
of the other. Where the dims are of different sizes, they may share a part of it: blocks of the dim
(a fused weight), runs of it (a head), or both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch

from autoparallel.discovery.probe_sizes import ProbeSizes
from autoparallel.discovery.shape_pattern import (
    OpFailedError,
    Pattern,
    Probe,
    ProbeError,
    Term,
    Values,
)
from autoparallel.discovery.size_choices import assignment
from autoparallel.rules.rule import Dims

__all__ = ["Structure", "find_structure"]

# Sets of random numbers at most: a slice may change nothing by chance (a maximum, a ReLU).
_DRAWS = 4
# A dim: the tensor's number (operands first, then results), and the dim's.
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Structure:
    """The loops of a call, named in order of appearance.

    operands, results: as in ShardingRule. loops: their sizes in the pattern's independent sizes.
    carried: loops that an operand and a result share.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    loops: dict[str, Term]
    carried: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Tie:
    """Two dims that run together in some of their strides.

    The element (place // low_one) % size of dim `one` is the element (place // low_two) % size of
    dim `two`: below `low` lie inner loops, above low * size outer ones.
    """

    one: Place
    low_one: int
    two: Place
    low_two: int
    size: int


def find_structure(probe: Probe, shrunk: ProbeSizes) -> Structure:
    """Return the loops that the op shows at two sets of sizes; a dim that looks different at them
    gets a loop of its own.

    probe: the call. shrunk: small sizes for it. The loops' sizes are checked at a third set of
    sizes. Raises ProbeError or OpFailedError where the op cannot be run there.
    """
    observed = [_Observed(probe, shrunk, which) for which in (0, 1)]
    third = assignment(shrunk.order, 2)
    tensors = probe.tensors(shrunk.pattern, third, shrunk.values, 1)
    results = probe.run(shrunk.pattern, third, tensors)
    shapes = [tuple(tensor.shape) for tensor in (*tensors, *results)]
    opaque: set[Place] = set()
    while True:
        # Dims are only ever added to `opaque`, so that the loop ends.
        before = len(opaque)
        cuts = [one.cuts(opaque) for one in observed]
        if len(opaque) > before:
            continue
        uneven = {
            place
            for place in cuts[0]
            if len(cuts[0][place]) != len(cuts[1].get(place, ())) and place not in opaque
        }
        if uneven:
            opaque |= uneven
            continue
        known = [*(one.sizes for one in observed), third]
        structure = _named(shrunk.pattern, known, observed, cuts, opaque, shapes)
        unlike = _unlike(structure, third, shapes) - opaque
        if not unlike:
            return structure
        opaque |= unlike


def _unlike(
    structure: Structure, sizes: dict[int, int], shapes: list[tuple[int, ...]]
) -> set[Place]:
    """Return dims of several loops whose sizes do not multiply to what is seen at `sizes`."""
    unlike: set[Place] = set()
    for tensor, row in enumerate((*structure.operands, *structure.results)):
        for dim, names in enumerate(row):
            product = 1
            for name in names:
                product *= structure.loops[name].at(sizes)
            if len(names) > 1 and product != shapes[tensor][dim]:
                unlike.add((tensor, dim))
    return unlike


class _Observed:
    """The dependences that are seen at one set of sizes.

    sizes: values of the pattern's independent sizes. count: number of operands. shapes: of operands
    and results. ties: dims that run together.
    """

    def __init__(self, probe: Probe, shrunk: ProbeSizes, which: int) -> None:
        self.probe, self.pattern = probe, shrunk.pattern
        self.sizes = assignment(shrunk.order, which)
        self.count = len(probe.call.operands)
        self.ties: list[_Tie] = []
        self.shapes: list[tuple[int, ...]] = []
        self.observe(shrunk.values)

    def observe(self, values: Values) -> None:
        """Change each slice of each operand in turn,
        and note which slices of the results differ.
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
        """Tie dims of equal size to an operand whose numbers change nothing:
        it gives its shape alone.
        """
        touching = {one[0] for (one, _), matrix in changed.items() if bool(matrix.any())}
        for (one, two), matrix in changed.items():
            if one[0] not in touching and matrix.shape[0] == matrix.shape[1]:
                self.ties.append(_Tie(one, 1, two, 1, matrix.shape[0]))
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
            self.ties.append(_Tie(one, 1, two, 1, self.shapes[two[0]][two[1]]))

    def cuts(self, opaque: set[Place]) -> dict[Place, list[int]]:
        """Return return, per dim, the strides at which its loops begin: 1, ..., the dim's size.

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

    def spread(self, ties: list[_Tie], points_of: dict[Place, set[int]]) -> None:
        """Cut each of two dims that run together where the other is cut.

        found: points by dim, filled here.
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


def _ties(one: Place, two: Place, matrix: torch.Tensor) -> Iterator[_Tie]:
    """Yield the largest parts of two dims that run together.

    matrix[i, j]: slice i changes slice j.
    """
    rows, columns = matrix.nonzero(as_tuple=True)
    n, m = matrix.shape
    # Too few changes were seen to tell anything.
    if len(rows) < max(2, min(n, m) // 2):
        return
    ties: list[_Tie] = []
    # Larger parts first: a smaller tie inside of a larger one says less.
    for size in sorted(d for d in range(2, min(n, m) + 1) if n % d == 0 and m % d == 0)[::-1]:
        for low_one in _divisors(n // size):
            for low_two in _divisors(m // size):
                if bool((rows // low_one % size == columns // low_two % size).all()):
                    tie = _Tie(one, low_one, two, low_two, size)
                    if all(_apart(tie, other) for other in ties):
                        ties.append(tie)
    yield from ties


def _apart(tie: _Tie, other: _Tie) -> bool:
    """Return whether two ties are about other strides of both dims, so that both can hold."""
    return all(
        low >= other_low * other.size or other_low >= low * tie.size
        for low, other_low in ((tie.low_one, other.low_one), (tie.low_two, other.low_two))
    )


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number, from the smallest."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _named(
    pattern: Pattern,
    known: list[dict[int, int]],
    observed: list[_Observed],
    cuts: list[dict[Place, list[int]]],
    opaque: set[Place],
    shapes: list[tuple[int, ...]],
) -> Structure:
    """Return loops from the pieces of dims that run together, with sizes that hold for any call.

    known: three sets of sizes. found: what was observed at two of them, and cuts: of those. opaque:
    dims that have one loop. shapes: of all tensors at the third set.
    """
    # A forest: pieces that run together have one root.
    parents: dict[tuple[Place, int], tuple[Place, int]] = {}

    def root(piece: tuple[Place, int]) -> tuple[Place, int]:
        """Return the piece that stands for all pieces that run
        together with this one (union-find).
        """
        while parents.setdefault(piece, piece) != piece:
            piece = parents[piece]
        return piece

    first, points = observed[0], cuts[0]
    count = first.count
    tied: set[tuple[Place, int]] = set()
    others = set(_pairs(observed[1].ties, cuts[1], opaque))
    for pair in _pairs(first.ties, points, opaque):
        # Seen at one set of sizes alone, it was chance.
        if pair in others:
            tied.update(pair)
            parents[root(pair[1])] = root(pair[0])
    names: dict[tuple[Place, int], str] = {}
    loops: dict[str, Term] = {}
    carried: dict[str, None] = {}
    rows: list[Dims] = []
    for tensor, shape in enumerate(first.shapes):
        dims: list[tuple[str, ...]] = []
        for dim, size in enumerate(shape):
            place = (tensor, dim)
            row: list[str] = []
            for at in reversed(range(len(points[place]) - 1 if size > 1 else 0)):
                key = root((place, at))
                name = names.setdefault(key, f"l{len(names)}")
                if name not in loops and tensor < count and len(points[place]) == 2:
                    loops[name] = pattern.operands[tensor][dim]
                elif name not in loops:
                    values = [each[place][at + 1] // each[place][at] for each in cuts]
                    if len(points[place]) == 2:
                        values.append(shapes[tensor][dim])
                    loops[name] = _term(pattern, known[: len(values)], values)
                if (place, at) in tied:
                    carried[name] = None
                row.append(name)
            dims.append(tuple(row))
        rows.append(tuple(dims))
    # A size that an integer argument says must follow from the call.
    asked = {atom for term in pattern.integers for atom in term.atoms}
    places = [names for dims in rows for names in dims]
    for name in {name: None for dims in rows[count:] for names in dims for name in names}:
        alone = places.count((name,)) == 1 and sum(name in names for names in places) == 1
        # A result's own dim may have any size: it is read off the result.
        if alone and not asked & set(loops[name].atoms):
            loops[name] = Term(0)
    return Structure(tuple(rows[:count]), tuple(rows[count:]), loops, tuple(carried))


def _pairs(
    ties: list[_Tie], points: dict[Place, list[int]], opaque: set[Place]
) -> Iterator[tuple[tuple[Place, int], tuple[Place, int]]]:
    """Yield pieces of dims, counted from the inner one, that run together by these ties."""
    for tie in ties:
        if tie.one in opaque or tie.two in opaque:
            continue
        for at, low in enumerate(points[tie.one][:-1]):
            if low % tie.low_one or not tie.low_one <= low < tie.low_one * tie.size:
                continue
            other = low // tie.low_one * tie.low_two
            if other in points[tie.two]:
                yield (tie.one, at), (tie.two, points[tie.two].index(other))


def _term(pattern: Pattern, sizes: list[dict[int, int]], values: list[int]) -> Term:
    """Return the size that has these values at these sizes;
    factor 0 where no product of sizes has.
    """
    if len(set(values)) == 1:
        return Term(values[0])
    for known in pattern.terms():
        if known.atoms and [known.at(each) for each in sizes] == values:
            return known
    # Products of up to three independent sizes, the simplest first.
    products = [atoms for count in (1, 2, 3) for atoms in combinations(pattern.atoms, count)]
    for atoms in products:
        quotients = {
            divmod(value, Term(1, atoms).at(known))
            for value, known in zip(values, sizes, strict=True)
        }
        if len(quotients) == 1:
            factor, rest = quotients.pop()
            if rest == 0:
                return Term(factor, atoms)
    return Term(0)
