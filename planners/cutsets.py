"""Cutsets: variables without which a problem is narrow enough to be eliminated."""

from __future__ import annotations

from collections.abc import Sequence

from planners.greedy_orders import SCORES, TooWideError, greedy_order
from planners.interaction_graph import components, interaction_graph
from planners.ordering import only
from planners.problem import Problem
from planners.reduction import ContradictionError, Network, reduce
from planners.table_memo import Memo
from planners.variables import Factor

__all__ = ["MAX_TABLE_ENTRIES", "apart", "cutset"]

MAX_TABLE_ENTRIES = 2**18
_MOST_SPARED = 32
# The ways to look for an order that tell most of what is narrow.
_SCORES = SCORES[:3]


def cutset(problem: Problem, max_table_entries: int = MAX_TABLE_ENTRIES) -> tuple[str, ...]:
    """Return variables without which the problem is narrow, and few of them.

    max_table_entries: of the largest table of a narrow problem. Variables with the most neighbours
    are taken first, twice as many each time; then the number is bisected, and those that can be
    spared are put back. Parts that no factor connects have a cutset each: one that is narrow by
    itself needs none. Returns names; empty if the problem is narrow as it is.

    >>> import numpy as np
    >>> from planners.variables import Variable
    >>> table = np.array([[0.0, 2.0], [2.0, 0.0]])
    >>> pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    >>> variables = tuple(Variable(name, np.array([1.0, 0.5])) for name in "abc")
    >>> cutset(Problem(variables, tuple(Factor(pair, table) for pair in pairs)), 3)
    ('a',)
    """
    names: list[str] = []
    for part in _components(problem.weighed(0.0)):
        names += _cutset(part, max_table_entries)
    return tuple(names)


def _components(problem: Problem) -> list[Problem]:
    """Return the parts of the problem that no factor connects.

    Variables that share no factor stay with the first part: they are decided by themselves
    wherever they are.
    """
    parts = components(interaction_graph(problem))
    connected = [part for part in parts if len(part) > 1]
    if len(connected) < 2:
        return [problem]
    connected[0] = sorted([*connected[0], *(part[0] for part in parts if len(part) == 1)])
    home = {variable: index for index, part in enumerate(connected) for variable in part}
    factors: list[list[Factor]] = [[] for _ in connected]
    for factor, scope in zip(problem.factors, problem.scopes(), strict=True):
        factors[home[scope[0]]].append(factor)
    return [
        Problem(tuple(problem.variables[v] for v in part), tuple(own))
        for part, own in zip(connected, factors, strict=True)
    ]


def apart(problem: Problem, names: Sequence[str]) -> list[tuple[Problem, list[str]]]:
    """Return the parts that no factor connects, each with its share of a cutset.

    Example: `apart(problem, cutset(problem, 2**18))`
    """
    parts = _components(problem.weighed(0.0))
    shares = [set(part.names) for part in parts]
    return [
        (part, [name for name in names if name in share])
        for part, share in zip(parts, shares, strict=True)
    ]


def _cutset(problem: Problem, max_table_entries: int) -> tuple[str, ...]:
    """Return the cutset of a problem that is one part."""
    try:
        network = reduce(problem, Memo())
    except ContradictionError:
        return ()
    narrowness = _Narrowness(network, max_table_entries)
    sizes, neighbors = network.sizes, network.neighbors()
    ranked: list[int] = []
    while not narrowness.without(ranked):
        taken = set(ranked)
        degrees = {
            variable: sum(sizes[other] > 1 and other not in taken for other in around)
            for variable, around in enumerate(neighbors)
            if variable not in taken and sizes[variable] > 1
        }
        if not degrees:
            break
        order = sorted(degrees, key=lambda variable: (-degrees[variable], -sizes[variable]))
        ranked += order[: max(1, len(ranked))]
    low, high = len(ranked) // 2, len(ranked)
    while low + 1 < high:
        middle = (low + high) // 2
        if narrowness.without(ranked[:middle]):
            high = middle
        else:
            low = middle
    chosen = ranked[:high]
    for variable in chosen[:_MOST_SPARED][::-1]:
        fewer = [other for other in chosen if other != variable]
        if narrowness.without(fewer, ways=2):
            chosen = fewer
    return tuple(problem.names[variable] for variable in chosen)


class _Narrowness:
    """Says whether a network is narrow when some of its variables are decided.

    limit: the entries of the largest table. The network is reduced once, and orders are looked for
    by the way that was right the last time first.
    """

    def __init__(self, network: Network, limit: int) -> None:
        self.network, self.limit = network, limit
        self.scores = list(_SCORES)

    def without(self, decided: Sequence[int], ways: int = len(_SCORES)) -> bool:
        """Say whether elimination of the variables that are left keeps within the limit.

        ways: how many ways to look for an order are tried, those first that were right before.
        """
        out = set(decided)
        network = only(self.network, [v for v in range(len(self.network.states)) if v not in out])
        free = [variable for variable, size in enumerate(network.sizes) if size > 1]
        alone = {variable: place for place, variable in enumerate(free)}
        for score in self.scores[:ways]:
            try:
                greedy_order(network, alone, score, self.limit)
            except TooWideError:
                continue
            self.scores.remove(score)
            self.scores.insert(0, score)
            return True
        return False
