"""Writes the rule of an op: from loops that seem to hang together to those a trial confirms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import torch

from autoparallel.discovery.dependence import Structure, find_structure
from autoparallel.discovery.discovered_rule import DiscoveredRule, Follows
from autoparallel.discovery.example_calls import Example
from autoparallel.discovery.kernel_candidates import kernels_for
from autoparallel.discovery.probe_sizes import ProbeSizes
from autoparallel.discovery.shape_pattern import Probe, ProbeError, Term, integers_of
from autoparallel.discovery.trial import Trial
from autoparallel.graph.graph import hint
from autoparallel.placement import part_bounds
from autoparallel.rules.loop_splits import LoopSplit
from autoparallel.rules.rule import Dims, OpCall

__all__ = ["RuleAuthor"]

# With more operands, not every subset is tried for pending sums.
_MOST_OPERANDS = 4


class RuleAuthor:
    """Writes the rule of one call. trial: everything that a rule of it is tried on."""

    def __init__(self, probe: Probe, shrunk: ProbeSizes) -> None:
        self.probe, self.shrunk = probe, shrunk
        self.trial = Trial(probe, shrunk)

    def written(self) -> DiscoveredRule:
        """Return the rule: all loops start whole, and each is set free
        where a trial finds no fault.
        """
        structure = find_structure(self.probe, self.shrunk)
        draft = DiscoveredRule(
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
            draft = self.split(draft, loop)
        for loop in structure.loops:
            if loop not in structure.carried and _only_in(structure, loop, results=True):
                draft = self.split(draft, loop)
        for group in self.groups(structure):
            draft = self.join(draft, group)
        draft = self.sums(draft)
        return self.verified(draft)

    def note(self) -> str:
        """Return a note for the plan where the op has no backward,
        and only its forward is proven.
        """
        error = self.trial.backward_error
        return f"proven forward only: backward failed: {error}" if error else ""

    # -- loops

    def split(self, draft: DiscoveredRule, loop: str) -> DiscoveredRule:
        """Return the rule with `loop` free to be split, if that is right; else whole,
        with the reason.
        """
        set_free = replace(draft, whole=tuple(pair for pair in draft.whole if pair[0] != loop))
        # An op that does not check its operands could read past the end of one.
        if not self.probe.checks and _breaks_ties(draft, loop):
            unsafe = "the op may not check that its operands still fit each other"
            return _kept(draft, loop, unsafe)
        atoms = set(dict(draft.loops)[loop].atoms)
        asked = any(atoms & set(term.atoms) for term in self.shrunk.pattern.integers)
        if self.probe.checks or not asked:
            unsafe = self.trial.try_loop(set_free, loop)
            if not unsafe:
                return set_free
        for follows in self.followers(draft, loop):
            other = replace(set_free, follows=follows)
            if not self.trial.try_loop(other, loop) and not self.broken(draft, other):
                return other
        # Kernels come last: they communicate, and a plain split does not.
        for kernel in kernels_for(self.probe, self.shrunk, draft, loop):
            other = replace(set_free, kernels=(*draft.kernels, (loop, kernel)))
            if not self.trial.try_loop(other, loop):
                return other
        return _kept(draft, loop, _reason(draft, loop))

    def broken(self, draft: DiscoveredRule, other: DiscoveredRule) -> bool:
        """Return whether integers that follow break the split of a loop that was right without."""
        dims = {(follows.result, follows.dim) for follows in other.follows[len(draft.follows) :]}
        loops = {loop for result, dim in dims for loop in draft.results[result][dim]}
        free = [name for name, _ in draft.loops if name in loops - set(dict(draft.whole))]
        return any(self.trial.try_loop(other, loop) for loop in free)

    def followers(self, draft: DiscoveredRule, loop: str) -> Iterator[tuple[Follows, ...]]:
        """Yield integer arguments that may follow the local size of a
        result's dim that has the loop.
        """
        dims = [
            (result, dim)
            for result, row in enumerate(draft.results)
            for dim, names in enumerate(row)
            if loop in names
        ]
        atoms = set(dict(draft.loops)[loop].atoms)
        fixed = {follows.integer for follows in draft.follows}
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
        # Candidates in order: all integers tied to the loop's size at once, each alone, then plain
        # counts.
        choices += [(at,) for at in (*ties, *numbers)]
        for chosen in dict.fromkeys(choices):
            for result, dim in dims:
                yield (*draft.follows, *(Follows(at, result, dim) for at in chosen))

    def groups(self, structure: Structure) -> list[list[str]]:
        """Return loops of operands alone, those of one size together:
        they may be summed over as one.
        """
        by_size: dict[Term, list[str]] = {}
        for loop, term in structure.loops.items():
            if loop not in structure.carried and _only_in(structure, loop, results=False):
                by_size.setdefault(term, []).append(loop)
        return list(by_size.values())

    def join(self, draft: DiscoveredRule, group: list[str]) -> DiscoveredRule:
        """Return the rule with loops joined that are one loop summed over,
        as many of them as can be.
        """
        left = list(group)
        # The largest sets first: a loop that is summed with others is none by itself.
        for count in range(len(group), 0, -1):
            for chosen in combinations(group, count):
                if not all(loop in left for loop in chosen):
                    continue
                if count > 1 and _twice(draft, chosen):
                    continue
                merged = _renamed(draft, chosen)
                tried = self.split(merged, chosen[0])
                if chosen[0] not in dict(tried.whole):
                    draft = tried
                    left = [loop for loop in left if loop not in chosen]
                elif count == 1:
                    draft = tried
        return draft

    # -- pending sums

    def sums(self, draft: DiscoveredRule) -> DiscoveredRule:
        """Return the rule with the sets of operands through which a pending sum passes."""
        numbers = [
            index
            for index, operand in enumerate(self.probe.call.operands)
            if operand.dtype != torch.bool and not self.is_meant(index)
        ]
        groups: list[tuple[int, ...]] = []
        few = len(numbers) <= _MOST_OPERANDS
        for count in range(1, len(numbers) + 1):
            if not few and count not in (1, 2, len(numbers)):
                continue
            for group in combinations(numbers, count):
                # Larger sets of what passes by itself are left out: with many operands the subsets
                # are too many.
                if not few and any(set(small) <= set(group) for small in groups):
                    continue
                if not self.trial.try_sum(draft, group):
                    groups.append(group)
        return replace(draft, linear=tuple(groups))

    def is_meant(self, index: int) -> bool:
        """Return whether an operand's numbers are places or offsets, of which no sum has sense."""
        values = self.shrunk.values
        return values.bounds[index] is not None or bool(values.meanings and values.meanings[index])

    # -- the last word

    def verified(self, draft: DiscoveredRule) -> DiscoveredRule:
        """Return the rule without strategies that fail on sizes,
        blocks and runs that no choice was made on.
        """
        # All that was decided was decided on two sets of sizes; these are others.
        for case in self.trial.final():
            for ranks in case.ranks:
                draft = self.checked(draft, case.example, ranks)
        return self.emptied(draft)

    def emptied(self, draft: DiscoveredRule) -> DiscoveredRule:
        """Return the rule with `takes_empty` set if it holds: as few ranks as leave one without
        elements, whose gradients depend on what those of the others do.
        """
        if not self.probe.checks:
            return draft
        example = self.trial.cases[0]
        rule = replace(draft, takes_empty=True).rule(example.call)
        assert rule is not None
        for loop in rule.loops:
            if loop in rule.whole:
                continue
            size = hint(rule.sizes[loop])
            # So many ranks that the last one gets nothing.
            ranks = next(n for n in range(2, size + 2) if part_bounds(size, n, n - 1)[0] == size)
            for strategy in self.trial.strategies(example, rule, [LoopSplit(loop)], ranks):
                if strategy.tile and self.trial.wrong(example, rule, strategy, ranks, twice=True):
                    return draft
        return replace(draft, takes_empty=True)

    def checked(self, draft: DiscoveredRule, example: Example, ranks: int) -> DiscoveredRule:
        """Return the rule without strategies that fail on one example.

        Raises ProbeError if it fails unsplit.
        """
        trial = self.trial
        while True:
            rule = draft.rule(example.call)
            if rule is None:
                raise ProbeError("behaves differently at other sizes")
            for strategy in trial.strategies(example, rule, trial.tiles(rule, ranks), ranks):
                why = trial.wrong(example, rule, strategy, ranks)
                if not why:
                    continue
                if strategy.tile is not None:
                    draft = _kept(draft, strategy.tile.loop, _reason(draft, strategy.tile.loop))
                    break
                group = tuple(index for index, p in enumerate(strategy.operands) if str(p) == "P")
                if not group and draft.replicates and str(strategy.results[0]) == "R":
                    # The backward pass is not linear: the sum of the ranks' gradients is another.
                    draft = replace(draft, replicates=False)
                    break
                # Neither a loop nor a sum: running it unsplit is wrong, and no rule can be right.
                if group not in draft.linear:
                    raise ProbeError(f"is not what it is taken for: {strategy}: {why}")
                draft = replace(draft, linear=tuple(g for g in draft.linear if g != group))
                break
            else:
                return draft


def _args_alone(call: OpCall) -> OpCall:
    """Return the call without keyword arguments:
    a rule's local_args change positional ones alone.
    """
    return OpCall(replace(call.node, kwargs=()), call.operands)


def _only_in(structure: Structure, loop: str, results: bool) -> bool:
    """Return whether only results, or only operands, have the loop."""
    rows = structure.operands if results else structure.results
    return not any(loop in names for dims in rows for names in dims)


def _twice(draft: DiscoveredRule, chosen: tuple[str, ...]) -> bool:
    """Return whether one operand has two of the loops, which one loop could not stand for."""
    return any(
        sum(name in chosen for names in dims for name in names) > 1 for dims in draft.operands
    )


def _renamed(draft: DiscoveredRule, chosen: tuple[str, ...]) -> DiscoveredRule:
    """Return the rule with the chosen loops as one, named as the first of them."""

    def row(dims: Dims) -> Dims:
        """Return the dims of one tensor with the new name."""
        return tuple(
            tuple(chosen[0] if name in chosen else name for name in names) for names in dims
        )

    merged = set(chosen[1:])
    return replace(
        draft,
        operands=tuple(map(row, draft.operands)),
        loops=tuple(pair for pair in draft.loops if pair[0] not in merged),
        whole=tuple(pair for pair in draft.whole if pair[0] not in merged),
    )


def _breaks_ties(draft: DiscoveredRule, loop: str) -> bool:
    """Return whether an operand has a size related to the loop's, and does not have the loop."""
    atoms = set(dict(draft.loops)[loop].atoms)
    return any(
        any(atoms & set(term.atoms) for term in row) and not any(loop in names for names in dims)
        for row, dims in zip(draft.pattern.operands, draft.operands, strict=True)
    )


def _reason(draft: DiscoveredRule, loop: str) -> str:
    """Return the reason why a loop is whole, in words that a plan can show."""
    if any(loop in names for dims in draft.operands for names in dims):
        return "its parts by themselves give other results, and no kernel is known that mends it"
    return "a part of it cannot be made by itself"


def _kept(draft: DiscoveredRule, loop: str, why: str) -> DiscoveredRule:
    """Return the rule with the loop whole, and with the reason for it."""
    rest = tuple(pair for pair in draft.whole if pair[0] != loop)
    kernels = tuple(pair for pair in draft.kernels if pair[0] != loop)
    return replace(draft, whole=(*rest, (loop, why)), kernels=kernels)
