"""Small sizes for a call, as free of each other as the op lets them be.

Sizes that are equal by chance forge rules, so every size is given a value of its own unless the op
demands otherwise: that it equals another, or is a multiple or a product of others. Whether it does
is not guessed from its name but tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from autoparallel.discovery.place_bounds import with_bounds
from autoparallel.discovery.shape_pattern import (
    MEANINGS,
    OpFailedError,
    Pattern,
    Probe,
    ProbeError,
    Term,
    Values,
    integers_of,
)
from autoparallel.discovery.size_choices import CHOICES, assignment, ratio
from autoparallel.graph.graph import Dim, Sym, hint

__all__ = ["ProbeSizes", "related_terms", "shrink"]

# Both signs, positive alone (logarithms, roots), and above 1 (acosh).
_DOMAINS = (Values(), Values(signs=False), Values(1.1, 2.0, signs=False))
# Multiples that an op may demand of a size: pairs, quads, vectors of 16 bytes.
_FACTORS = (1, 2, 3, 4, 6, 8, 12, 16)
# Larger ratios are taken for chance.
_MOST_MULTIPLE = 8
# An op may be slow, and is run many times.
_MOST_ELEMENTS = 1 << 17
_MOST_TOGETHER = 8
_MOST_CONSTANT = 64


@dataclass(frozen=True, slots=True)
class ProbeSizes:
    """Small sizes for a call, and numbers to fill its operands with.

    pattern: how the call's sizes follow from independent ones. order: the independent sizes, from
    the smallest to the largest of the call. values: magnitudes, signs and bounds of the numbers.
    tied: the same before sizes that may differ were set free of each other, if there were any.
    """

    pattern: Pattern
    order: tuple[int, ...]
    values: Values
    tied: ProbeSizes | None = None


def shrink(probe: Probe) -> ProbeSizes:
    """Return the freest pattern at whose sizes the op runs and
    gives as many results of the same ranks.

    An op that may not check its operands is run at no sizes that break a relation of the call's.
    Raises ProbeError, with the op's own words, where it runs at none.
    """
    search = _Search(probe)
    pattern = search.first()
    if not probe.checks:
        plain = (None,) * len(probe.call.operands)
        return ProbeSizes(pattern, search.ordered(pattern), replace(search.values, bounds=plain))
    freed = search.relaxed(pattern)
    values = with_bounds(probe, freed, search.ordered(freed), search.values)
    tied = None
    if freed != pattern:
        order = search.ordered(pattern)
        tied = ProbeSizes(pattern, order, with_bounds(probe, pattern, order, search.values))
    return ProbeSizes(freed, search.ordered(freed), values, tied)


def related_terms(probe: Probe) -> str:
    """Return the call's sizes by their relations alone, as text:
    equal for calls whose sizes are equally related.

    Numbers of integers that are no sizes are kept, because they may decide what the op does.
    """
    pattern = next(_Search(probe).candidates(True, True, 1))
    symbolic = ["s" if isinstance(slot.size, Sym) else "" for slot in _Search(probe).slots]
    words = [
        f"{mark}{term.factor}{''.join(f'*{atom}' for atom in term.atoms)}"
        for mark, term in zip(symbolic, pattern.terms(), strict=True)
    ]
    return " ".join(words)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place where a size stands: a dim of an operand, or (operand -1) an integer argument."""

    operand: int
    index: int
    size: Dim


class _Search:
    """A search for the freest pattern that runs.

    slots: all places where a size stands. rank: the largest of the operands. actual: the size in
    the call of each independent size, by which they are ordered. values: numbers that the op takes.
    error: why it failed first.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe, self.values = probe, _DOMAINS[0]
        call = probe.call
        self.slots = [
            _Slot(at, dim, size)
            for at, operand in enumerate(call.operands)
            for dim, size in enumerate(operand.shape)
        ]
        self.slots += [_Slot(-1, at, value) for at, value in enumerate(integers_of(call))]
        self.rank = max((len(operand.shape) for operand in call.operands), default=0)
        self.actual: dict[int, float] = {}
        self.error = ""

    # -- patterns to start from

    def first(self) -> Pattern:
        """Return the first pattern that runs, from independent sizes
        to those that keep every relation.
        """
        as_called = self.probe.own()
        elements = [torch.Size([term.factor for term in row]).numel() for row in as_called.operands]
        symbolic = any(isinstance(slot.size, Sym) for slot in self.slots)
        first_error = ""
        for values in (*_DOMAINS, *self.meaningful()):
            self.values = values
            for small in (False, True):
                for related in (False, True) if self.probe.checks else (True,):
                    for factor in _FACTORS:
                        for pattern in self.candidates(small, related, factor):
                            if self.runs(pattern):
                                return pattern
            # The last resort is the call itself, if it is small and no size is symbolic.
            if not symbolic and sum(elements) <= _MOST_ELEMENTS and self.runs(as_called):
                return as_called
            first_error = first_error or self.error
        raise ProbeError(f"failed on probe inputs: {first_error}")

    def meaningful(self) -> Iterator[Values]:
        """Yield numbers whose whole ones are related, as the offsets of groups are."""
        operands = self.probe.call.operands
        whole = [
            index
            for index, operand in enumerate(operands)
            if operand.dtype in (torch.int32, torch.int64)
        ]
        for index in reversed(whole):
            for meaning in MEANINGS:
                words = tuple(meaning if at == index else "" for at in range(len(operands)))
                yield replace(_DOMAINS[0], meanings=words)

    def candidates(self, small: bool, related: bool, factor: int) -> Iterator[Pattern]:
        """Yield a pattern in which equal sizes are one size.

        small: so are integers that could name a dim. related: larger sizes are multiples and
        products of smaller ones where their numbers are. factor: a factor of every other size,
        where it divides it.
        """
        sizes: dict[Dim, list[_Slot]] = {}
        fixed: dict[_Slot, Term] = {}
        dims = {slot.size for slot in self.slots if slot.operand >= 0}
        for slot in self.slots:
            number = hint(slot.size)
            constant = number <= 1 and not isinstance(slot.size, Sym)
            if slot.operand < 0 and isinstance(slot.size, int):
                # Such an integer is more likely a dim's number than a size.
                names_dim = number < max(self.rank, 2)
                tied = slot.size in dims or (
                    related
                    and any(
                        isinstance(size, int) and size > 1 and not (size % number and number % size)
                        for size in dims
                        if number > 1
                    )
                )
                constant = constant or (names_dim and not small) or not tied
            # Sizes of 0 and 1, and integers that no dim explains, are what they are.
            if constant:
                fixed[slot] = Term(number)
            else:
                sizes.setdefault(slot.size, []).append(slot)
        if factor > 1 and not any(isinstance(s, int) and s % factor == 0 for s in sizes):
            return
        terms: dict[Dim, Term] = {}
        divisors = [
            size
            for size, slots in sizes.items()
            if isinstance(size, int) and any(slot.operand < 0 for slot in slots)
        ]
        # From the smallest, so that the smaller sizes that a product is made of are known.
        for size in sorted(sizes, key=hint):
            terms[size] = self.term(size, terms, divisors, related, factor)
        rows = [(slot, fixed.get(slot) or terms[slot.size]) for slot in self.slots]
        yield _pattern(self.probe, dict(rows))

    def fresh(self, size: Dim, bias: float = 0.0) -> int:
        """Return a new independent size for a size of the call.

        bias: its place among equal ones in the order.
        """
        atom = len(self.actual)
        self.actual[atom] = hint(size) + bias
        return atom

    def term(
        self,
        size: Dim,
        known: Mapping[Dim, Term],
        divisors: list[int],
        related: bool,
        factor: int,
    ) -> Term:
        """Return a size by smaller ones if it is related to them, else by itself,
        as a new independent one.
        """
        if related:
            larger: list[Dim] = list(known)[::-1]
            for one, two in combinations(larger, 2):
                if ratio(size, one, two) == 1:
                    return Term(
                        known[one].factor * known[two].factor,
                        tuple(sorted(known[one].atoms + known[two].atoms)),
                    )
            for one in larger:
                times = ratio(size, one)
                if times is not None and 1 < times <= _MOST_MULTIPLE:
                    return Term(known[one].factor * times, known[one].atoms)
            for one, two in combinations(larger, 2):
                times = ratio(size, one, two)
                if times is not None and 1 < times <= _MOST_MULTIPLE:
                    return Term(
                        times * known[one].factor * known[two].factor,
                        tuple(sorted(known[one].atoms + known[two].atoms)),
                    )
            for number in reversed(divisors):
                if number not in known or not isinstance(size, int) or size == number:
                    continue
                if size % (number * factor) == 0:
                    atoms = (*known[number].atoms, self.fresh(size // (number * factor)))
                    return Term(factor * known[number].factor, tuple(sorted(atoms)))
        counts = size in divisors
        if factor > 1 and isinstance(size, int) and not counts and size % factor == 0:
            return Term(factor, (self.fresh(size // factor),))
        return Term(1, (self.fresh(size),))

    # -- what runs

    def ordered(self, pattern: Pattern) -> tuple[int, ...]:
        """Return the pattern's independent sizes, from the smallest to the largest of the call."""
        return tuple(sorted(pattern.atoms, key=lambda atom: (self.actual[atom], atom)))

    def runs(self, pattern: Pattern) -> bool:
        """Return whether the op runs at small sizes of this pattern,
        with results like the call's.
        """
        order = self.ordered(pattern)
        # All choices of sizes that discovery uses later must run.
        for which in range(CHOICES):
            sizes = assignment(order, which)
            elements = 0
            for row in pattern.operands:
                elements += torch.Size([term.at(sizes) for term in row]).numel()
            if elements > _MOST_ELEMENTS:
                self.error = self.error or f"{elements} numbers are more than are probed"
                return False
            # Guarded: an op that reads past the end of an operand finds NaN there.
            results = self.finite(pattern, sizes)
            if results is None or not self.alike(results):
                return False
        return True

    def finite(self, pattern: Pattern, sizes: Mapping[int, int]) -> tuple[torch.Tensor, ...] | None:
        """Return the results; None, with the reason noted,
        if the op fails or they are not finite.
        """
        tensors = self.probe.tensors(pattern, sizes, self.values, 0, guarded=True)
        try:
            return self.probe.guarded_run(pattern, sizes, tensors)
        except OpFailedError as error:
            self.error = error.words
            return None

    def alike(self, results: tuple[torch.Tensor, ...]) -> bool:
        """Return whether the results are as many, of the same ranks,
        and equal in size where the call's are.
        """
        wanted = self.probe.call.results
        if len(results) != len(wanted) or any(
            len(expected.shape) != result.dim()
            for expected, result in zip(wanted, results, strict=True)
        ):
            self.error = self.error or "at small sizes it gives other results"
            return False
        seen: dict[tuple[int, Dim], int] = {}
        for expected, result in zip(wanted, results, strict=True):
            for dim, (size, now) in enumerate(zip(expected.shape, result.shape, strict=True)):
                if (size == 1) != (now == 1) or seen.setdefault((dim, size), now) != now:
                    self.error = self.error or "at small sizes its results are of other shapes"
                    return False
        return True

    # -- freeing what is tied by chance

    def relaxed(self, pattern: Pattern) -> Pattern:
        """Return the pattern with sizes set free one by one, then two by two,
        as long as the op still runs.
        """
        terms = dict(zip(self.slots, pattern.terms(), strict=True))
        changed = True
        while changed:
            changed = False
            groups: dict[Term, list[_Slot]] = {}
            for slot, term in terms.items():
                if term.atoms:
                    groups.setdefault(term, []).append(slot)
            for term, group in groups.items():
                for chosen in self.subsets(term, group, groups):
                    factors = (1,) if len(chosen) == len(group) else (1, term.factor)
                    free = self.freed(terms, factors, chosen)
                    if free is not None:
                        terms, changed = free, True
                        break
                if changed:
                    break
        return self.settled(_pattern(self.probe, terms))

    def settled(self, pattern: Pattern) -> Pattern:
        """Return the pattern with integers that no dim follows fixed:
        they may mean more than sizes.
        """
        followed = {atom for row in pattern.operands for term in row for atom in term.atoms}
        fixed = tuple(
            term
            if isinstance(size, Sym)
            or followed.issuperset(term.atoms)
            or hint(size) > _MOST_CONSTANT
            else Term(hint(size))
            for term, size in zip(pattern.integers, integers_of(self.probe.call), strict=True)
        )
        other = replace(pattern, integers=fixed)
        # Only where the op runs with them: they may have to fit smaller dims.
        return other if other != pattern and self.runs(other) else pattern

    def subsets(
        self, term: Term, group: list[_Slot], groups: Mapping[Term, list[_Slot]]
    ) -> Iterator[tuple[_Slot, ...]]:
        """Yield slots that may turn out to be free of the others together. Not integers alone."""
        shared = any(other != term and set(other.atoms) & set(term.atoms) for other in groups)
        limit = len(group) if shared or term.factor != 1 else len(group) // 2
        if len(group) > _MOST_TOGETHER:
            limit = 1
        for count in range(1, limit + 1):
            for chosen in combinations(group, count):
                if count == len(group) and len(term.atoms) == 1 and term.factor == 1:
                    continue
                # An integer that no dim follows would be free of everything.
                if any(slot.operand >= 0 for slot in chosen):
                    yield chosen
        if limit == 1:
            for dim in sorted({slot.index for slot in group if slot.operand >= 0}):
                chosen = tuple(slot for slot in group if slot.operand >= 0 and slot.index == dim)
                if 1 < len(chosen) < len(group):
                    yield chosen

    def freed(
        self, terms: dict[_Slot, Term], factors: tuple[int, ...], chosen: tuple[_Slot, ...]
    ) -> dict[_Slot, Term] | None:
        """Return the terms with a new size at the chosen slots, if the op runs so; else None."""
        size = chosen[0].size
        for factor in dict.fromkeys(factors):
            if isinstance(size, Sym) and factor != 1:
                continue
            if hint(size) % factor:
                continue
            # A little larger than the size that it was tied to, so that the order of the call's
            # sizes stays.
            atom = Term(factor, (self.fresh(hint(size) // factor, 0.5),))
            freed_terms = {slot: atom if slot in chosen else old for slot, old in terms.items()}
            if self.runs(_pattern(self.probe, freed_terms)):
                return freed_terms
        return None


def _pattern(probe: Probe, terms: Mapping[_Slot, Term]) -> Pattern:
    """Return the pattern that has these sizes at the call's places."""
    rows: list[list[Term]] = [[] for _ in probe.call.operands]
    integers: list[Term] = []
    for slot, term in terms.items():
        (rows[slot.operand] if slot.operand >= 0 else integers).append(term)
    return Pattern(tuple(map(tuple, rows)), tuple(integers))
