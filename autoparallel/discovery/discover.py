"""Rules for ops that have none: found by running the op on small tensors, proven by the referee.

The op is run at small sizes that are as free of each other as it lets them be (`shrink`). Slices of
its operands are changed to see which slices of its results change (`dependence`). That proposes
loops, and every strategy that follows from them is put on trial: split, run and join must equal
unsplit, forward and backward (`trial`). What fails is dropped; what is left is the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import torch

from autoparallel.discovery.dependence import Structure, find_structure
from autoparallel.discovery.discovered_rule import DiscoveredRule, Follows
from autoparallel.discovery.kernel_candidates import kernels_for
from autoparallel.discovery.probe_sizes import ProbeSizes, shrink
from autoparallel.discovery.shape_pattern import Probe, ProbeError, Term, integers_of
from autoparallel.discovery.size_choices import sorted_atoms
from autoparallel.discovery.strategy_validation import Example
from autoparallel.discovery.trial import Trial
from autoparallel.graph.graph import hint
from autoparallel.graph.operators import draws
from autoparallel.placement import part_bounds
from autoparallel.rules.rule import Dims, LoopSplit, OpCall
from autoparallel.support.torch_private import schema_of

__all__ = ["ProbeError", "confirmed", "discover"]

_MOST_OPERANDS = 4


def discover(call: OpCall) -> DiscoveredRule:
    """The rule of an op that has none, for every call of this shape pattern.

    Raises ProbeError where the op cannot be probed: it fails, draws numbers, or writes.
    """
    found = None
    errors = []
    for dtype in (torch.float64, torch.float32):
        probe = Probe(call, dtype)
        _refuse(probe)
        try:
            found = _best(probe)
            break
        except ProbeError as error:
            errors.append(error)
            if not any(operand.dtype.is_floating_point for operand in call.operands):
                break
    if found is None:
        raise errors[0]
    return found


def confirmed(found: DiscoveredRule, call: OpCall) -> bool:
    """Whether a rule that was found before still holds, on one set of sizes."""
    probe = Probe(call, getattr(torch, found.dtype))
    shrunk = ProbeSizes(found.pattern, sorted_atoms(found.pattern, call), found.values)
    try:
        trial = Trial(probe, shrunk)
        rule = found.rule(trial.cases[0].call)
        if rule is None or found.rule(call) is None:
            return False
        choices = trial.strategies(trial.cases[0], rule, trial.tiles(rule, 2), 2)
        return not any(trial.wrong(trial.cases[0], rule, choice, 2) for choice in choices)
    except Exception:  # a file may say anything, and what it says may fit nothing
        return False


def _refuse(probe: Probe) -> None:
    """Raises ProbeError for ops that no rule can help, by what their schemas say."""
    if draws(probe.call.node.target):
        raise ProbeError("draws random numbers, which every rank would draw differently")
    if schema_of(probe.operation).is_mutable:
        raise ProbeError("writes to its inputs")
    if "c10d" in probe.call.node.target.partition(".")[0]:
        raise ProbeError("communicates by itself")
    if not probe.call.operands:
        raise ProbeError("reads no tensors")


def _best(probe: Probe) -> DiscoveredRule:
    """By the freest sizes, or, where the op fails there or some loops stay whole, by tied ones."""
    shrunk = shrink(probe)
    try:
        found = _Author(probe, shrunk).found()
    except ProbeError:
        if shrunk.tied is None:
            raise
        return _Author(probe, shrunk.tied).found()
    if found.whole and shrunk.tied is not None:
        other = _Author(probe, shrunk.tied).found()
        if _split_dims(other) > _split_dims(found):
            return other
    return found


def _split_dims(found: DiscoveredRule) -> int:
    """Number of dims that can be split: how much a rule allows."""
    whole = {name for name, _ in found.whole}
    rows = (*found.operands, *found.results)
    return sum(bool(set(names) - whole) for dims in rows for names in dims)


class _Author:
    """Writes the rule of one call."""

    def __init__(self, probe: Probe, shrunk: ProbeSizes) -> None:
        self.probe, self.shrunk = probe, shrunk
        self.trial = Trial(probe, shrunk)

    def found(self) -> DiscoveredRule:
        structure = find_structure(self.probe, self.shrunk)
        made = DiscoveredRule(
            self.probe.call.node.target,
            self.shrunk.pattern,
            tuple(structure.loops.items()),
            structure.operands,
            structure.results,
            whole=tuple((loop, "") for loop in structure.loops),
            values=self.shrunk.values,
            dtype=str(self.probe.dtype).removeprefix("torch."),
            note=self.note(),
        )
        for loop in structure.carried:
            made = self.split(made, loop)
        for loop in structure.loops:
            if loop not in structure.carried and _only_in(structure, loop, results=True):
                made = self.split(made, loop)
        for group in self.groups(structure):
            made = self.join(made, group)
        made = self.sums(made)
        return self.verified(made)

    def note(self) -> str:
        error = self.trial.backward_error
        return f"proven forward only: backward failed: {error}" if error else ""

    # -- loops

    def split(self, made: DiscoveredRule, loop: str) -> DiscoveredRule:
        """The rule with `loop` free to be split, if that is right; else with the reason."""
        free = replace(made, whole=tuple(pair for pair in made.whole if pair[0] != loop))
        if not self.probe.checks and _breaks_ties(made, loop):
            why = "the op may not check that its operands still fit each other"
            return _kept(made, loop, why)
        atoms = set(dict(made.loops)[loop].atoms)
        asked = any(atoms & set(term.atoms) for term in self.shrunk.pattern.integers)
        if self.probe.checks or not asked:
            why = self.trial.try_loop(free, loop)
            if not why:
                return free
        for follows in self.followers(made, loop):
            other = replace(free, follows=follows)
            if not self.trial.try_loop(other, loop) and not self.broken(made, other):
                return other
        for kernel in kernels_for(self.probe, self.shrunk, made, loop):
            other = replace(free, kernels=(*made.kernels, (loop, kernel)))
            if not self.trial.try_loop(other, loop):
                return other
        return _kept(made, loop, _reason(made, loop))

    def broken(self, made: DiscoveredRule, other: DiscoveredRule) -> bool:
        """Whether integers that follow break the split of a loop that was right without."""
        dims = {(follows.result, follows.dim) for follows in other.follows[len(made.follows) :]}
        loops = {loop for result, dim in dims for loop in made.results[result][dim]}
        free = [name for name, _ in made.loops if name in loops - set(dict(made.whole))]
        return any(self.trial.try_loop(other, loop) for loop in free)

    def followers(self, made: DiscoveredRule, loop: str) -> Iterator[tuple[Follows, ...]]:
        """Integers that may follow the local part of a result's dim that has the loop."""
        dims = [
            (result, dim)
            for result, row in enumerate(made.results)
            for dim, names in enumerate(row)
            if loop in names
        ]
        atoms = set(dict(made.loops)[loop].atoms)
        fixed = {follows.integer for follows in made.follows}
        terms = self.shrunk.pattern.integers
        positional = len(integers_of(_args_alone(self.probe.call)))
        ties = [
            at
            for at, term in enumerate(terms[:positional])
            if at not in fixed and set(term.atoms) & atoms
        ]
        numbers = [
            at
            for at, term in enumerate(terms[:positional])
            if at not in fixed and not term.atoms and term.factor > 1
        ]
        choices = [tuple(ties)] if ties else []
        choices += [(at,) for at in (*ties, *numbers)]
        for chosen in dict.fromkeys(choices):
            for result, dim in dims:
                yield (*made.follows, *(Follows(at, result, dim) for at in chosen))

    def groups(self, structure: Structure) -> list[list[str]]:
        """Loops of operands alone, those of one size together: they may be summed over as one."""
        found: dict[Term, list[str]] = {}
        for loop, term in structure.loops.items():
            if loop not in structure.carried and _only_in(structure, loop, results=False):
                found.setdefault(term, []).append(loop)
        return list(found.values())

    def join(self, made: DiscoveredRule, group: list[str]) -> DiscoveredRule:
        """Loops that are one loop summed over, as many of them as can be."""
        left = list(group)
        for count in range(len(group), 0, -1):
            for chosen in combinations(group, count):
                if not all(loop in left for loop in chosen):
                    continue
                if count > 1 and _twice(made, chosen):
                    continue
                merged = _renamed(made, chosen)
                tried = self.split(merged, chosen[0])
                if chosen[0] not in dict(tried.whole):
                    made = tried
                    left = [loop for loop in left if loop not in chosen]
                elif count == 1:
                    made = tried
        return made

    # -- pending sums

    def sums(self, made: DiscoveredRule) -> DiscoveredRule:
        """Sets of operands through which a pending sum passes."""
        numbers = [
            index
            for index, operand in enumerate(self.probe.call.operands)
            if operand.dtype != torch.bool and self.shrunk.values.bounds[index] is None
        ]
        found: list[tuple[int, ...]] = []
        few = len(numbers) <= _MOST_OPERANDS
        for count in range(1, len(numbers) + 1):
            if not few and count not in (1, 2, len(numbers)):
                continue
            for group in combinations(numbers, count):
                if not few and any(set(small) <= set(group) for small in found):
                    continue
                if not self.trial.try_sum(made, group):
                    found.append(group)
        return replace(made, linear=tuple(found))

    # -- the last word

    def verified(self, made: DiscoveredRule) -> DiscoveredRule:
        """The rule without what fails on sizes, blocks and runs that no choice was made on."""
        for case in self.trial.final():
            for ranks in case.ranks:
                made = self.checked(made, case.example, ranks)
        return self.emptied(made)

    def emptied(self, made: DiscoveredRule) -> DiscoveredRule:
        """The rule with the word on parts without elements: as few ranks as leave one without."""
        if not self.probe.checks:
            return made
        example = self.trial.cases[0]
        rule = replace(made, takes_empty=True).rule(example.call)
        assert rule is not None
        for loop in rule.loops:
            if loop in rule.whole:
                continue
            size = hint(rule.sizes[loop])
            ranks = next(n for n in range(2, size + 2) if part_bounds(size, n, n - 1)[0] == size)
            for strategy in self.trial.strategies(example, rule, [LoopSplit(loop)], ranks):
                if strategy.tile and self.trial.wrong(example, rule, strategy, ranks):
                    return made
        return replace(made, takes_empty=True)

    def checked(self, made: DiscoveredRule, example: Example, ranks: int) -> DiscoveredRule:
        trial = self.trial
        while True:
            rule = made.rule(example.call)
            if rule is None:
                raise ProbeError("behaves differently at other sizes")
            for strategy in trial.strategies(example, rule, trial.tiles(rule, ranks), ranks):
                why = trial.wrong(example, rule, strategy, ranks)
                if not why:
                    continue
                if strategy.tile is not None:
                    made = _kept(made, strategy.tile.loop, _reason(made, strategy.tile.loop))
                    break
                group = tuple(index for index, p in enumerate(strategy.operands) if str(p) == "P")
                if group not in made.linear:
                    raise ProbeError(f"is not what it is taken for: {strategy}: {why}")
                made = replace(made, linear=tuple(g for g in made.linear if g != group))
                break
            else:
                return made


def _args_alone(call: OpCall) -> OpCall:
    return OpCall(replace(call.node, kwargs=()), call.operands)


def _only_in(structure: Structure, loop: str, results: bool) -> bool:
    """Whether only results, or only operands, have the loop."""
    rows = structure.operands if results else structure.results
    return not any(loop in names for dims in rows for names in dims)


def _twice(made: DiscoveredRule, chosen: tuple[str, ...]) -> bool:
    """Whether one operand has two of the loops."""
    return any(
        sum(name in chosen for names in dims for name in names) > 1 for dims in made.operands
    )


def _renamed(made: DiscoveredRule, chosen: tuple[str, ...]) -> DiscoveredRule:
    """The rule with the chosen loops as one, called as the first of them."""

    def row(dims: Dims) -> Dims:
        return tuple(
            tuple(chosen[0] if name in chosen else name for name in names) for names in dims
        )

    gone = set(chosen[1:])
    return replace(
        made,
        operands=tuple(map(row, made.operands)),
        loops=tuple(pair for pair in made.loops if pair[0] not in gone),
        whole=tuple(pair for pair in made.whole if pair[0] not in gone),
    )


def _breaks_ties(made: DiscoveredRule, loop: str) -> bool:
    """Whether an operand has a size related to the loop's, and does not have the loop."""
    atoms = set(dict(made.loops)[loop].atoms)
    return any(
        any(atoms & set(term.atoms) for term in row) and not any(loop in names for names in dims)
        for row, dims in zip(made.pattern.operands, made.operands, strict=True)
    )


def _reason(made: DiscoveredRule, loop: str) -> str:
    """Why a loop is whole, in words that a plan can show."""
    if any(loop in names for dims in made.operands for names in dims):
        return "its parts by themselves give other results, and no kernel is known that mends it"
    return "a part of it cannot be made by itself"


def _kept(made: DiscoveredRule, loop: str, why: str) -> DiscoveredRule:
    """The rule with the loop whole."""
    rest = tuple(pair for pair in made.whole if pair[0] != loop)
    kernels = tuple(pair for pair in made.kernels if pair[0] != loop)
    return replace(made, whole=(*rest, (loop, why)), kernels=kernels)
