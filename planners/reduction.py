"""Exact reductions of a problem before it is solved: fewer states, variables and tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planners.problem import Problem
from planners.table_memo import Form, Memo, Operand

# The scope of a table as variable indices, in the order of the table's axes, and its number.
Term = tuple[tuple[int, ...], int]


class ContradictionError(Exception):
    """No assignment has a finite cost; candidates: variables that by themselves cannot agree.

    candidates: indices of variables, not necessarily the fewest. Internal: solvers turn it into an
    InfeasibleError with names.
    """

    def __init__(self, candidates: list[int]) -> None:
        super().__init__(candidates)
        self.candidates = candidates


@dataclass(frozen=True)
class Network:
    """The choices that are left to make, by variable index: states, and tables between them.

    states[i]: the states of variable i that can be part of a finite assignment, ascending. terms:
    tables over variables with at least two states left, by number in the memo. offset_terms:
    constants to add to the cost. blamed[i]: the variables whose states made variable i lose some of
    its own, as keys of a dict.
    """

    states: tuple[NDArray[np.intp], ...]
    terms: tuple[Term, ...]
    offset_terms: tuple[float, ...]
    blamed: dict[int, dict[int, None]]

    @cached_property
    def sizes(self) -> list[int]:
        """The number of states left, per variable."""
        return [len(states) for states in self.states]

    @cached_property
    def form(self) -> Form:
        """The numbers of states and the scopes, which elimination orders depend on."""
        return Form(tuple(self.sizes), tuple([scope for scope, _ in self.terms]))

    def priced(
        self, offset_terms: tuple[float, ...], blamed: dict[int, dict[int, None]]
    ) -> Network:
        """Return the network of the same tables with other constants."""
        network = Network(self.states, self.terms, offset_terms, blamed)
        network.__dict__.update(sizes=self.sizes, form=self.form)  # cached
        return network

    def neighbors(self) -> list[dict[int, None]]:
        """Return, per variable, those it shares a table with, as keys of a dict.

        Dictionaries keep the order of insertion, which sets do not: results must be reproducible.
        """
        neighbors: list[dict[int, None]] = [{} for _ in self.states]
        for scope, _ in self.terms:
            for place, first in enumerate(scope):
                for second in scope[place + 1 :]:
                    neighbors[first][second] = None
                    neighbors[second][first] = None
        return neighbors


def reduce(problem: Problem, memo: Memo, allowed: Sequence[int] | None = None) -> Network:
    """Drop states that no finite assignment can have, then substitute variables of one state.

    A state is dropped when its unary cost is +inf, or when some table has no finite entry for it
    and any states left of the others (arc consistency; AC-3, Mackworth 1977). Variables that only
    add to a table are taken out of it, so that it does not connect them. Every assignment of finite
    cost keeps its cost.
    allowed: per variable, the number of the domain that it is limited to, all of it possible by its
    unary cost; None for no limits.
    Raises ContradictionError when a variable is left without a state.
    """
    unaries = [memo.table(variable.unary) for variable in problem.variables]
    tables = [memo.table(factor.table) for factor in problem.factors]
    scopes = problem.scopes()
    blamed: dict[int, dict[int, None]] = {}
    starts = [memo.finite_domain(number) for number in unaries] if allowed is None else allowed
    domains = _consistent_domains(list(starts), scopes, tables, memo, blamed)
    items = _Items(len(unaries), [*unaries, *tables], scopes, domains, memo.contents(domains))
    last: _Reduced | None = memo.reduced[0] if memo.reduced else None
    if last is None or last.items != items:
        last = _Reduced.of(items)
    pieces = [memo.pieces(*item) for item in last.distinct]
    offsets = [pieces[place].offset for place in last.places]
    taken_apart = [each.tables for each in pieces]
    if last.network is None or last.taken_apart != taken_apart:
        distinct = dict.fromkeys(domains)
        states_of_domain = {domain: np.flatnonzero(memo.domains[domain]) for domain in distinct}
        states = tuple([states_of_domain[domain] for domain in domains])
        last.network = Network(states, last.terms(taken_apart), (), {})
        last.taken_apart = taken_apart
    memo.reduced[:] = [last]
    return last.network.priced(tuple([offset for offset in offsets if offset]), blamed)


@dataclass(frozen=True, slots=True)
class _Items:
    """The tables of a problem by their numbers in a memo, with what is possible of them.

    count: of variables, whose tables come first. scopes: of the others. domains: per variable.
    contents: of the domains. Problems that differ in prices alone have equal ones, where the memos
    that they are known to have been emptied before.
    """

    count: int
    numbers: list[int]
    scopes: list[tuple[int, ...]]
    domains: list[int]
    contents: tuple[bytes, ...]


@dataclass(slots=True)
class _Reduced:
    """A _Reduced object says how the tables of a problem are reduced, whatever their entries are.

    distinct: numbers of tables with the domains that they are restricted to. places: of every
    table's pair among these. taken_apart: the pieces of each distinct pair, and network: without
    offsets, as they were last.
    """

    items: _Items
    distinct: list[tuple[int, tuple[int, ...]]]
    places: list[int]
    taken_apart: list[tuple[Operand, ...]] = field(default_factory=list)
    network: Network | None = None

    @staticmethod
    def of(items: _Items) -> _Reduced:
        """Return how these tables are reduced."""
        domains = items.domains
        known: dict[tuple[int, tuple[int, ...]], int] = {}
        scopes = [*((variable,) for variable in range(items.count)), *items.scopes]
        pairs = [
            (number, tuple([domains[variable] for variable in scope]))
            for number, scope in zip(items.numbers, scopes, strict=True)
        ]
        places = [known.setdefault(pair, len(known)) for pair in pairs]
        return _Reduced(items, list(known), places)

    def terms(self, taken_apart: list[tuple[Operand, ...]]) -> tuple[Term, ...]:
        """Return the terms, by the pieces of each distinct pair."""
        scopes = [*((variable,) for variable in range(self.items.count)), *self.items.scopes]
        return tuple(
            [
                # Axes are ascending: all of them are the scope itself.
                (scope if len(axes) == len(scope) else tuple([scope[a] for a in axes]), table)
                for scope, place in zip(scopes, self.places, strict=True)
                for table, axes in taken_apart[place]
            ]
        )


def _consistent_domains(
    domains: list[int],
    scopes: list[tuple[int, ...]],
    tables: list[int],
    memo: Memo,
    blamed: dict[int, dict[int, None]],
) -> list[int]:
    """Return the domain of every variable, from those to begin with; fills `blamed` in passing.

    Tables are revisited until no domain changes. Domains and revisions are numbers in the memo, so
    that the same revision in another layer is looked up.
    """
    empty = [place for place, domain in enumerate(domains) if not memo.domains[domain].any()]
    if empty:
        raise ContradictionError(empty[:1])
    # A table without +inf can never make a variable lose a state.
    strict = [place for place, number in enumerate(tables) if memo.has_infinity[number]]
    touching: dict[int, list[int]] = {}
    for factor in strict:
        for variable in scopes[factor]:
            touching.setdefault(variable, []).append(factor)
    queue = deque(strict)
    queued = [False] * len(tables)
    for factor in strict:
        queued[factor] = True
    while queue:
        factor = queue.popleft()
        queued[factor] = False
        scope = scopes[factor]
        revised = memo.revised(tables[factor], tuple([domains[variable] for variable in scope]))
        for variable, domain in zip(scope, revised, strict=True):
            if domain == domains[variable]:
                continue
            domains[variable] = domain
            for other in scope:
                if other != variable:
                    blamed.setdefault(variable, {})[other] = None
            if not memo.domains[domain].any():
                raise ContradictionError(closure([variable], blamed))
            for touched in touching[variable]:
                if not queued[touched] and touched != factor:
                    queued[touched] = True
                    queue.append(touched)
    return domains


def closure(starts: list[int], blamed: dict[int, dict[int, None]]) -> list[int]:
    """Return the variables that these variables' loss of states goes back to, with themselves.

    >>> closure([0], {0: {2: None}, 2: {1: None}, 5: {0: None}})
    [0, 1, 2]
    """
    reached = dict.fromkeys(starts)
    pending = list(starts)
    while pending:
        for other in blamed.get(pending.pop(), {}):
            if other not in reached:
                reached[other] = None
                pending.append(other)
    return sorted(reached)
