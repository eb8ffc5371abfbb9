"""In which order to eliminate the variables of a network, and what that will cost.

Nothing is computed on tables here: a schedule names every step by what goes into it, so that
steps that will give the same table have the same recipe.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planners.reduction import Network
from planners.table_memo import Operand, Orders

# Predicted cost of a step, in table entries read: a fixed part and the entries of its tables.
_ENTRIES_PER_STEP = 20_000
# What finding and scheduling another order takes per variable, in the same unit.
_ENTRIES_PER_VARIABLE = 10_000
# Of all tables together: 2 GiB.
_MOST_ENTRIES = 2**28
# What takes longer than some ten seconds.
_MUCH_WORK = 2**35
# Variables with more neighbours are not worth scoring by fill: they go late anyway.
_MAX_FILL_DEGREE = 60


class TooWideError(ValueError):
    """Elimination would need a table of more entries than allowed: use the integer program.

    entries: of the first table over the limit (of all tables together, if no single one is), the
    least of all orders tried. limit: what was allowed for one table.
    """

    def __init__(self, entries: int, limit: int) -> None:
        self.entries = entries
        self.limit = limit
        super().__init__(
            f"variable elimination needs tables of 2**{math.log2(entries):.1f} entries, over the"
            f" limit of 2**{math.log2(limit):.1f}: raise max_table_entries, or solve the integer"
            " program"
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """One step up to renaming: which tables to add up, over which joint shape.

    Axis 0 is the variable eliminated. A table's number is one of the network's, or -1 - r for the
    result of recipe r.
    """

    operands: tuple[Operand, ...]
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Of the resulting table."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Step:
    """Eliminate `variable`: the result is a table over `scope` (ascending variable indices)."""

    variable: int
    scope: tuple[int, ...]
    recipe: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps in order; many of them share a recipe when the network repeats itself."""

    steps: tuple[Step, ...]
    recipes: tuple[Recipe, ...]

    @property
    def work(self) -> int:
        """Predicted cost of all distinct recipes, in table entries read."""
        return sum(
            _ENTRIES_PER_STEP + math.prod(recipe.shape) * len(recipe.operands)
            for recipe in self.recipes
        )


def schedule(network: Network, max_table_entries: int, orders: Orders | None = None) -> Schedule:
    """The cheapest of up to four greedy orders.

    Next goes the variable whose step has the smallest joint table (min-weight). If that leaves
    many distinct steps, whole classes of equal variables are also tried; if it leaves big ones,
    the variable that connects its neighbours least (min-fill) is, which takes longer to find.
    orders: those found for earlier problems; one of the same form takes the same order.
    Raises TooWideError when none keeps all tables within the limit, or all results together within
    16 times the limit and 2 GiB; also for a table over a quarter of the limit, where there is much
    work.
    """
    orders = {} if orders is None else orders
    form = (tuple(network.sizes), tuple([scope for scope, _ in network.terms]))
    if form in orders:
        known = _schedule(network, orders[form])
        if max([recipe.entries for recipe in known.recipes], default=0) <= max_table_entries:
            return known
    free = [variable for variable, size in enumerate(network.sizes) if size > 1]
    alone = {variable: place for place, variable in enumerate(free)}
    alike: dict[int, int] = {}
    search_work = _ENTRIES_PER_VARIABLE * len(free)
    best: Schedule | None = None
    best_work = math.inf
    needed: list[int] = []
    for filling, by_class in ((False, False), (False, True), (True, False), (True, True)):
        if best_work <= search_work * (100 if filling else 1):
            continue
        if by_class and not alike:
            alike = _classes(network, free)
        if by_class and len(dict.fromkeys(alike.values())) == len(free):
            continue
        try:
            order = _order(network, alike if by_class else alone, filling, max_table_entries)
        except TooWideError as error:
            needed.append(error.entries)
            continue
        candidate = _schedule(network, order)
        entries = sum(recipe.entries for recipe in candidate.recipes)
        if entries > min(16 * max_table_entries, _MOST_ENTRIES):
            needed.append(entries)
        elif candidate.work < best_work:
            best, best_work = candidate, candidate.work
            orders[form] = order
    if best is None:
        raise TooWideError(min(needed), max_table_entries)
    largest = max([recipe.entries for recipe in best.recipes], default=0)
    if best.work > _MUCH_WORK and largest > max_table_entries // 4:
        raise TooWideError(largest, max_table_entries // 4)
    return best


def _order(
    network: Network, classes: dict[int, int], filling: bool, max_table_entries: int
) -> list[int]:
    """Greedy order, a class of variables at a time.

    Why classes: the end of a chain is always the cheapest next step, and a sweep from it gives
    every layer other messages. Taking equal variables of all layers together keeps layers equal.
    Of two neighbours in a class one has to wait, so a chain of equals is halved again and again.
    Raises TooWideError as soon as a table gets over the limit.
    """
    graph = _Graph(network, filling)
    members: dict[int, list[int]] = {}
    for variable, number in classes.items():
        members.setdefault(number, []).append(variable)

    def score_of(number: int) -> tuple[int, int]:
        return max([graph.scores[variable] for variable in members[number]])

    heap = [(score_of(number), number) for number in members]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        score, number = heapq.heappop(heap)
        if not members[number] or score != score_of(number):
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
    return order


class _Graph:
    """Who shares a table with whom while variables are eliminated, and what each would cost.

    scores[v]: lower goes first. Either the joint table's size alone, or the size of the tables
    between neighbours not yet connected before that.
    """

    def __init__(self, network: Network, filling: bool) -> None:
        # Fixed-point logarithms: sums of them do not depend on the order of adding.
        self.logs = [round(math.log2(size) * 2**20) for size in network.sizes]
        self.sizes = network.sizes
        self.filling = filling
        self.neighbors = network.neighbors()
        self.weights = [
            self.logs[variable] + sum([self.logs[other] for other in around])
            for variable, around in enumerate(self.neighbors)
        ]
        self.scores = [self._score(variable) for variable in range(len(self.logs))]

    def eliminate(self, variable: int, around: list[int]) -> Iterable[int]:
        """Remove a variable, join all its neighbours, and return whose score may have changed."""
        logs, neighbors, weights = self.logs, self.neighbors, self.weights
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
        return fill, weight


def _classes(network: Network, free: list[int]) -> dict[int, int]:
    """Variables by what they and their surroundings look like; numbered by first appearance."""
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
    numbers: dict[tuple[object, ...], int] = {}
    return {variable: numbers.setdefault(look, len(numbers)) for variable, look in looks.items()}


def _schedule(network: Network, order: list[int]) -> Schedule:
    """Bucket elimination by name only: every table waits at its first variable to go."""
    sizes = network.sizes
    position = {variable: place for place, variable in enumerate(order)}
    buckets: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in order]
    for scope, table in network.terms:
        buckets[min([position[variable] for variable in scope])].append((scope, table))
    steps = []
    recipes: dict[Recipe, int] = {}
    for variable, bucket in zip(order, buckets, strict=True):
        others = {other: None for scope, _ in bucket for other in scope}
        others.pop(variable, None)
        scope = tuple(sorted(others))
        place = {variable: 0}
        for other in scope:
            place[other] = len(place)
        operands = sorted([(table, tuple([place[v] for v in axes])) for axes, table in bucket])
        shape = (sizes[variable], *[sizes[other] for other in scope])
        recipe = recipes.setdefault(Recipe(tuple(operands), shape), len(recipes))
        steps.append(Step(variable, scope, recipe))
        if scope:
            buckets[min([position[other] for other in scope])].append((scope, -1 - recipe))
    return Schedule(tuple(steps), tuple(recipes))
