"""Greedy orders of elimination: the variable that is cheapest to eliminate next goes next.

Finding the best order is NP-hard (Arnborg, Corneil & Proskurowski 1987); greedy orders by weight
and by fill are near it on narrow graphs.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

from planners.reduction import Network

__all__ = ["SCORES", "TooWideError", "greedy_order", "hubs_of", "inserted", "variable_classes"]

# By what the next variable may be chosen, see `_Graph`, in the order in which they are tried.
SCORES = ("weight", "balance", "fill", "thin", "thinner")
# How often fill counts beside the size of the joint table, and how often it is divided by the
# variable's own size.
_POWERS = {"balance": (1, 2), "thin": (2, 1), "thinner": (2, 0)}
# Variables with more neighbours are not worth scoring by fill: they go late anyway.
_MAX_FILL_DEGREE = 60
# So many neighbours make a variable a hub, as the mode of a block that may be recomputed is one.
_HUB_NEIGHBORS = 20


class TooWideError(ValueError):
    """Elimination would need a table of more entries than allowed.

    entries: of the first table over the limit (of all tables together, if no single one is), the
    least of all orders tried. limit: the number of entries allowed for one table. The message says
    to raise `max_table_entries` or to use the integer program.
    """

    def __init__(self, entries: int, limit: int) -> None:
        self.entries = entries
        self.limit = limit
        super().__init__(
            f"variable elimination needs tables of 2**{math.log2(entries):.1f} entries, over the"
            f" limit of 2**{math.log2(limit):.1f}: raise max_table_entries, or solve the integer"
            " program"
        )


def greedy_order(
    network: Network,
    classes: dict[int, int],
    score: str,
    max_table_entries: int,
    hubs: Sequence[int] = (),
) -> list[int]:
    """Greedy order, a class of variables at a time.

    score: by what variables are chosen, see `_Graph`. Why classes: the end of a
    chain is always the cheapest next step, and a sweep from it gives every layer other messages.
    Taking equal variables of all layers together keeps layers equal.
    Of two neighbours in a class one has to wait, so a chain of equals is halved again and again.
    hubs: variables that are ordered by themselves. A hub is a neighbour of all that lies around it,
    so that with it in the graph everything there seems to be connected; without it, the order sees
    what is near to what. Each hub goes where its own table is no larger than the next one.
    Raises TooWideError as soon as a table gets over the limit.
    """
    graph = _Graph(network, score, hubs)
    members: dict[int, list[int]] = {}
    for variable, number in classes.items():
        if variable not in graph.hubs:
            members.setdefault(number, []).append(variable)

    def score_of(number: int) -> tuple[int, int]:
        own = members[number]
        if len(own) == 1:
            return graph.scores[own[0]]
        return max([graph.scores[variable] for variable in own])

    heap = [(score_of(number), number) for number in members]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        lowest, number = heapq.heappop(heap)
        if not members[number] or lowest != score_of(number):
            continue  # out of date: every change pushes the class again
        waiting: dict[int, None] = {}
        changed = {number: None}
        for variable in members[number]:
            if variable in waiting:
                continue
            around = sorted(graph.neighbors[variable])
            entries = math.prod([graph.sizes[other] for other in around])
            if entries > max_table_entries:
                raise TooWideError(entries, max_table_entries)
            order.append(variable)
            for other in graph.eliminate(variable, around):
                changed[classes[other]] = None
            for other in around:
                if classes[other] == number:
                    waiting[other] = None
        members[number] = [variable for variable in members[number] if variable in waiting]
        for touched in changed:
            if members[touched]:
                heapq.heappush(heap, (score_of(touched), touched))
    return inserted(network, order, hubs, max_table_entries) if hubs else order


def hubs_of(network: Network) -> list[int]:
    """Return the variables of two states and more that have very many neighbours.

    Example: `hubs_of(reduce(problem, Memo()))`
    """
    return [
        variable
        for variable, around in enumerate(network.neighbors())
        if len(around) >= _HUB_NEIGHBORS and network.sizes[variable] > 1
    ]


def inserted(
    network: Network, order: Sequence[int], others: Sequence[int], max_table_entries: int
) -> list[int]:
    """Return an order with other variables in their places: each goes as soon as its own table is
    no larger than that of the next one.

    Raises TooWideError as soon as a table gets over the limit.

    Example: `inserted(network, order, hubs_of(network), 2**26)`
    """
    sizes, neighbors = network.sizes, network.neighbors()
    waiting = dict.fromkeys(others)
    result: list[int] = []

    def joint(variable: int) -> int:
        """Return the entries of the joint table of a variable and its neighbours."""
        return sizes[variable] * math.prod([sizes[other] for other in neighbors[variable]])

    def eliminate(variable: int) -> None:
        """Take a variable next, and join its neighbours."""
        around = neighbors[variable]
        entries = joint(variable) // sizes[variable]
        if entries > max_table_entries:
            raise TooWideError(entries, max_table_entries)
        result.append(variable)
        for one in around:
            del neighbors[one][variable]
            neighbors[one].update((near, None) for near in around if near != one)

    for variable in order:
        for near in [other for other in neighbors[variable] if other in waiting]:
            if joint(near) <= joint(variable):
                del waiting[near]
                eliminate(near)
        eliminate(variable)
    for left in sorted(waiting, key=joint):
        eliminate(left)
    return result


class _Graph:
    """The interaction graph under elimination: who shares a table with whom, and each one's score.

    scores[v]: the variable of the lowest score is eliminated first. By "weight" a score is (0,
    weight), the logarithm of the joint table's size; by "fill" it is (fill, weight), where fill is
    the size of the tables between neighbours that are not connected yet; by "balance" it is the
    logarithm of fill * result / own size: a variable of few states between large ones waits, as it
    keeps them apart at little cost. By "thin" and "thinner" fill counts twice, and the own size
    once or not at all. weights are fixed-point base-2 logarithms. hubs: variables that are no part
    of it.
    """

    def __init__(self, network: Network, score: str, hubs: Sequence[int] = ()) -> None:
        # Fixed-point logarithms: sums of them do not depend on the order of adding.
        self.logs = [round(math.log2(size) * 2**20) for size in network.sizes]
        self.sizes = network.sizes
        self.score, self.filling = score, score != "weight"
        self.neighbors = network.neighbors()
        self.hubs = dict.fromkeys(hubs)
        for hub in hubs:
            for other in self.neighbors[hub]:
                del self.neighbors[other][hub]
            self.neighbors[hub] = {}
        self.weights = [
            self.logs[variable] + sum([self.logs[other] for other in around])
            for variable, around in enumerate(self.neighbors)
        ]
        self.scores = [self._score(variable) for variable in range(len(self.logs))]

    def eliminate(self, variable: int, around: list[int]) -> Iterable[int]:
        """Remove a variable, join all its neighbours, and return whose score may have changed."""
        logs, neighbors, weights = self.logs, self.neighbors, self.weights
        # The neighbours become a clique. Besides their own scores, a new connection lowers the fill
        # of every common neighbour of its two ends.
        changed = dict.fromkeys(around)
        for place, first in enumerate(around):
            known = neighbors[first]
            del known[variable]
            weights[first] -= logs[variable]
            for second in around[place + 1 :]:
                if second not in known:
                    known[second] = None
                    neighbors[second][first] = None
                    weights[first] += logs[second]
                    weights[second] += logs[first]
                    if self.filling:
                        few, many = sorted((known, neighbors[second]), key=len)
                        changed.update(dict.fromkeys([v for v in few if v in many]))
        changed.pop(variable, None)
        for other in changed:
            self.scores[other] = self._score(other)
        return changed

    def _score(self, variable: int) -> tuple[int, int]:
        """Return the score of a variable, see the class."""
        weight = self.weights[variable]
        if not self.filling:
            return 0, weight
        around = list(self.neighbors[variable])
        if len(around) > _MAX_FILL_DEGREE:
            return 2**62, weight
        fill = 0
        for place, first in enumerate(around):
            known = self.neighbors[first]
            for second in around[place + 1 :]:
                if second not in known:
                    fill += self.sizes[first] * self.sizes[second]
        if self.score == "fill":
            return fill, weight
        # The logarithm of an integer's length in bits would be too coarse; it is rounded to fixed
        # point, as the weights are.
        to_come, own = _POWERS[self.score]
        logarithm = to_come * round(math.log2(1 + fill) * 2**20)
        return logarithm + weight - own * self.logs[variable], weight


def variable_classes(network: Network, free: list[int]) -> dict[int, int]:
    """Return the class of every variable: equal ones have equal tables and surroundings.

    Colour refinement (Weisfeiler-Leman) by a few rounds. Classes are numbered by first appearance.
    """
    around: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {v: [] for v in free}
    own: dict[int, list[int]] = {variable: [] for variable in free}
    for scope, table in network.terms:
        if len(scope) == 1:
            own[scope[0]].append(table)
        else:
            for axis, variable in enumerate(scope):
                others = scope[:axis] + scope[axis + 1 :]
                around[variable].append((table, axis, others))
    sizes = network.sizes
    colors = _numbered({v: (sizes[v], tuple(sorted(own[v]))) for v in free})
    # More rounds would tell apart the layers by their distance from the ends of the model.
    for _ in range(3):
        looks = {}
        for variable in free:
            seen = sorted(
                [
                    (table, axis, tuple([colors[other] for other in others]))
                    for table, axis, others in around[variable]
                ]
            )
            looks[variable] = (colors[variable], tuple(seen))
        colors = _numbered(looks)
    return colors


def _numbered(looks: Mapping[int, tuple[object, ...]]) -> dict[int, int]:
    """Return a number for each look, the same for equal ones, by first appearance."""
    numbers: dict[tuple[object, ...], int] = {}
    return {variable: numbers.setdefault(look, len(numbers)) for variable, look in looks.items()}
