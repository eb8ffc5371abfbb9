"""The order in which to eliminate the variables of a network, and the cost of each step.

Nothing is computed on tables here: a schedule names every step by what goes into it, so that steps
that will give the same table have the same recipe. Finding the best order is NP-hard (Arnborg,
Corneil & Proskurowski 1987); greedy orders by weight and by fill are near it on narrow graphs.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planners.interaction_graph import components, network_graph
from planners.reduction import Network
from planners.table_memo import Operand, Orders

# Predicted cost of a step, in table entries read: this fixed part and the entries of its tables.
_ENTRIES_PER_STEP = 20_000
# The time of finding and scheduling another order, per variable and in the same unit.
_ENTRIES_PER_VARIABLE = 10_000
# The most entries of all resulting tables together: 2 GiB of float64.
_MOST_ENTRIES = 2**28
# Schedules of more work than this, in the same unit, take longer than some ten seconds.
_MUCH_WORK = 2**35
# By what the next variable may be chosen, see `_Graph`; the quickest first.
SCORES = ("weight", "balance", "fill")
# How many times the time of finding an order the work must be for another to be looked for.
_WORTHWHILE = {"weight": 1, "balance": 4, "fill": 100}
# An order that was found for a similar network is taken if its work has grown by no more than this.
_AS_GOOD = 1.5
# Variables with more neighbours are not worth scoring by fill: they go late anyway.
_MAX_FILL_DEGREE = 60


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


@dataclass(frozen=True, slots=True)
class Recipe:
    """One step of elimination up to renaming: the tables to add up, over one joint shape.

    operands: tables with the axes of the joint table that they lie along; a table's number is one
    of the network's, or -1 - r for the result of recipe r. shape: of the joint table; axis 0 is the
    variable that is eliminated, and the result has the other axes.
    """

    operands: tuple[Operand, ...]
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """The number of entries of the resulting table."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Step:
    """Eliminate one variable; the result is a table over its neighbours.

    variable: its index. scope: indices of the neighbours, ascending. recipe: number of the recipe.
    """

    variable: int
    scope: tuple[int, ...]
    recipe: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of elimination in order; they share recipes when the network repeats itself."""

    steps: tuple[Step, ...]
    recipes: tuple[Recipe, ...]

    @property
    def width(self) -> int:
        """The most variables that a step's result is a table over."""
        return max([len(step.scope) for step in self.steps], default=0)

    @property
    def work(self) -> int:
        """The predicted cost of all distinct recipes, in table entries read."""
        return sum(
            _ENTRIES_PER_STEP + math.prod(recipe.shape) * len(recipe.operands)
            for recipe in self.recipes
        )


def schedule(
    network: Network,
    max_table_entries: int,
    orders: Orders | None = None,
    scores: tuple[str, ...] = SCORES,
) -> Schedule:
    """Return the cheapest of up to six greedy orders, as a schedule.

    The next variable is the one whose step has the smallest joint table (min-weight). If that
    leaves many distinct steps, whole classes of equal variables are also tried; if it leaves big
    ones, the variable that connects its neighbours least (min-fill) is, by itself and together with
    the size of its result, which takes longer to find.
    network: a reduced problem. max_table_entries: the largest result of a step. orders: those found
    for earlier problems; one of the same form takes the same order, one that differs a
    little takes the last order, or the first, if that is hardly more work than it was, and a new
    order is added.
    scores: by what variables may be chosen, see `_Graph`.
    Where no order is narrow enough everywhere, parts of the network that share no table take the
    best order of each.
    Raises TooWideError when no order keeps all tables within the limit, or all results together
    within 16 times the limit and 2 GiB; also for a table over a quarter of the limit, where there
    is much work.
    """
    orders = {} if orders is None else orders
    form = network.form, scores
    free = [variable for variable, size in enumerate(network.sizes) if size > 1]
    kept = dict.fromkeys(free)
    # The last order is of the most similar network; the first one mostly knows most variables.
    tries = (orders.get(form), next(reversed(orders.values()), None), *[*orders.values()][:1])
    for earlier in tries:
        if earlier is None:
            continue
        order = [variable for variable in earlier[0] if variable in kept]
        if len(order) == len(free):
            known = _schedule(network, order)
            largest = max([recipe.entries for recipe in known.recipes], default=0)
            most_work = math.inf if form in orders else _AS_GOOD * earlier[1]
            if largest <= max_table_entries and known.work <= most_work:
                orders[form] = order, earlier[1]
                return known
    alone = {variable: place for place, variable in enumerate(free)}
    alike: dict[int, int] = {}
    search_work = _ENTRIES_PER_VARIABLE * len(free)
    best: Schedule | None = None
    best_work, best_order = math.inf, list[int]()
    needed: list[int] = []
    for score, by_class in itertools.product(scores, (False, True)):
        # Another order is looked for only while the work it may save exceeds the time of finding
        # it, which is far longer where neighbours are compared.
        if best_work <= search_work * _WORTHWHILE[score]:
            continue
        if by_class and not alike:
            alike = _classes(network, free)
        # Without equal variables, orders by class are those by variable.
        if by_class and len(dict.fromkeys(alike.values())) == len(free):
            continue
        try:
            order = greedy_order(network, alike if by_class else alone, score, max_table_entries)
        except TooWideError as error:
            needed.append(error.entries)
            continue
        candidate = _schedule(network, order)
        entries = sum(recipe.entries for recipe in candidate.recipes)
        if entries > min(16 * max_table_entries, _MOST_ENTRIES):
            needed.append(entries)
        elif candidate.work < best_work:
            best, best_work, best_order = candidate, candidate.work, order
    if best is None:
        apart = _order_apart(network, max_table_entries)
        if apart is None:
            raise TooWideError(min(needed), max_table_entries)
        best, best_order = _schedule(network, apart), apart
    largest = max([recipe.entries for recipe in best.recipes], default=0)
    if best.work > _MUCH_WORK and largest > max_table_entries // 4:
        raise TooWideError(largest, max_table_entries // 4)
    orders[form] = best_order, best.work
    return best


def _order_apart(network: Network, max_table_entries: int) -> list[int] | None:
    """The orders of the connected components, one after another; None if there is one or none.

    Raises TooWideError where the results of all of them are too much together, or one of them has
    no order that is narrow enough.
    """
    parts = components(network_graph(network))
    if len(parts) < 2:
        return None
    order: list[int] = []
    entries = 0
    for part in parts:
        own = schedule(only(network, part), max_table_entries)
        order += [step.variable for step in own.steps]
        entries += sum(recipe.entries for recipe in own.recipes)
    if entries > min(16 * max_table_entries, _MOST_ENTRIES):
        raise TooWideError(entries, max_table_entries)
    return order


def only(network: Network, variables: list[int]) -> Network:
    """Return the network of these variables; the others count as decided.

    Example: `only(network, [0, 2])`
    """
    kept = set(variables)
    states = [own if v in kept else own[:1] for v, own in enumerate(network.states)]
    terms = [term for term in network.terms if kept.issuperset(term[0])]
    return Network(tuple(states), tuple(terms), (), {})


def greedy_order(
    network: Network, classes: dict[int, int], score: str, max_table_entries: int
) -> list[int]:
    """Greedy order, a class of variables at a time.

    score: by what variables are chosen, see `_Graph`. Why classes: the end of a
    chain is always the cheapest next step, and a sweep from it gives every layer other messages.
    Taking equal variables of all layers together keeps layers equal.
    Of two neighbours in a class one has to wait, so a chain of equals is halved again and again.
    Raises TooWideError as soon as a table gets over the limit.
    """
    graph = _Graph(network, score)
    members: dict[int, list[int]] = {}
    for variable, number in classes.items():
        members.setdefault(number, []).append(variable)

    def score_of(number: int) -> tuple[int, int]:
        return max([graph.scores[variable] for variable in members[number]])

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
    return order


class _Graph:
    """The interaction graph under elimination: who shares a table with whom, and each one's score.

    scores[v]: the variable of the lowest score is eliminated first. By "weight" a score is (0,
    weight), the logarithm of the joint table's size; by "fill" it is (fill, weight), where fill is
    the size of the tables between neighbours that are not connected yet; by "balance" it is the
    logarithm of fill * result / own size: a variable of few states between large ones waits, as it
    keeps them apart at little cost. weights are fixed-point base-2 logarithms.
    """

    def __init__(self, network: Network, score: str) -> None:
        # Fixed-point logarithms: sums of them do not depend on the order of adding.
        self.logs = [round(math.log2(size) * 2**20) for size in network.sizes]
        self.sizes = network.sizes
        self.score, self.filling = score, score != "weight"
        self.neighbors = network.neighbors()
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
        balance = round(math.log2(1 + fill) * 2**20) + weight - 2 * self.logs[variable]
        return balance, weight


def _classes(network: Network, free: list[int]) -> dict[int, int]:
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


def _schedule(network: Network, order: list[int]) -> Schedule:
    """Return the steps of bucket elimination in the given order, by name only.

    Every table waits in the bucket of the first of its variables to be eliminated, and so does
    every result.
    """
    sizes = network.sizes
    position = {variable: place for place, variable in enumerate(order)}
    buckets: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in order]
    for scope, table in network.terms:
        buckets[min([position[variable] for variable in scope])].append((scope, table))
    steps = []
    recipes: dict[tuple[tuple[Operand, ...], tuple[int, ...]], int] = {}
    for variable, bucket in zip(order, buckets, strict=True):
        # A set is sorted at once, so that its order plays no part.
        others = {other for scope, _ in bucket for other in scope}
        others.discard(variable)
        scope = tuple(sorted(others))
        place = {variable: 0}
        for other in scope:
            place[other] = len(place)
        operands = sorted([(table, tuple([place[v] for v in axes])) for axes, table in bucket])
        shape = (sizes[variable], *[sizes[other] for other in scope])
        recipe = recipes.setdefault((tuple(operands), shape), len(recipes))
        steps.append(Step(variable, scope, recipe))
        if scope:
            buckets[min([position[other] for other in scope])].append((scope, -1 - recipe))
    return Schedule(tuple(steps), tuple([Recipe(*recipe) for recipe in recipes]))
