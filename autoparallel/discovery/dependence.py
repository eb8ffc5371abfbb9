"""The loops of an unknown op, from which results change when one slice of an operand changes.

A dim of an operand and one of a result share a loop where slice i of the one changes only slice i
of the other. Where the dims are of different sizes, they may share a part of it: blocks of the dim
(a fused weight), runs of it (a head), or both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from autoparallel.discovery.observed_dependence import ObservedDependence, Place, Tie
from autoparallel.discovery.probe_sizes import ProbeSizes
from autoparallel.discovery.shape_pattern import (
    Pattern,
    Probe,
    Term,
)
from autoparallel.discovery.size_choices import assignment
from autoparallel.rules.rule import Dims

__all__ = ["Structure", "find_structure"]


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


def find_structure(probe: Probe, shrunk: ProbeSizes) -> Structure:
    """Return the loops that the op shows at two sets of sizes; a dim that looks different at them
    gets a loop of its own.

    probe: the call. shrunk: small sizes for it. The loops' sizes are checked at a third set of
    sizes. Raises ProbeError or OpFailedError where the op cannot be run there.
    """
    observed = [ObservedDependence(probe, shrunk, which) for which in (0, 1)]
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


def _named(
    pattern: Pattern,
    known: list[dict[int, int]],
    observed: list[ObservedDependence],
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
    ties: list[Tie], points: dict[Place, list[int]], opaque: set[Place]
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
