"""The order in which to eliminate the variables of a network, and the cost of each step.

Nothing is computed on tables here: a schedule names every step by what goes into it, so that steps
that will give the same table have the same recipe.
"""

import itertools
import math
from dataclasses import dataclass

from planners.greedy_orders import (
    SCORES,
    TooWideError,
    greedy_order,
    hubs_of,
    inserted,
    variable_classes,
)
from planners.interaction_graph import components, network_graph
from planners.reduction import Network
from planners.table_memo import Operand, Orders

# Predicted cost of a step, in table entries read: this fixed part and the entries of its tables.
_ENTRIES_PER_STEP = 10_000
# The time of finding and scheduling another order, per variable and in the same unit.
_ENTRIES_PER_VARIABLE = 5_000
# The most entries of all resulting tables together: 2 GiB of float64.
_MOST_ENTRIES = 2**28
# Schedules of more work than this, in the same unit, take longer than some ten seconds.
_MUCH_WORK = 2**34
# How many times the time of finding an order the work must be for another to be looked for.
_WORTHWHILE = {"weight": 1, "balance": 4, "thin": 32, "thinner": 32, "fill": 100}
# Orders by these are hardly ever the only ones that are narrow enough, but often the quickest.
_LATER = ("thin", "thinner")
# An order that was found for a similar network is taken if its work has grown by no more than this.
_AS_GOOD = 1.5
# One in so many variables may be new to it: states that were dominated there, and are not here.
_MOST_NEW = 8


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

    @property
    def work(self) -> int:
        """The table entries that are read: tables are added up from the smallest on, so that the
        sum grows as late as possible, and its least is taken.
        """
        shape = self.shape
        total = [1] * len(shape)
        read = math.prod(shape)
        for axes in sorted(
            (axes for _, axes in self.operands),
            key=lambda axes: math.prod([shape[axis] for axis in axes]),
        ):
            for axis in axes:
                total[axis] = shape[axis]
            read += math.prod(total)
        return read


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
        return sum(_ENTRIES_PER_STEP + recipe.work for recipe in self.recipes)


def schedule(
    network: Network,
    max_table_entries: int,
    orders: Orders | None = None,
    scores: tuple[str, ...] = SCORES,
) -> Schedule:
    """Return the cheapest of up to twenty greedy orders, as a schedule.

    The next variable is the one whose step has the smallest joint table (min-weight). If that
    leaves many distinct steps, whole classes of equal variables are also tried; if it leaves big
    ones, the variable that connects its neighbours least (min-fill) is, by itself and together with
    the size of its result, which takes longer to find. Where variables have very many neighbours,
    orders that leave these aside come first, see `greedy_order`.
    network: a reduced problem. max_table_entries: the largest result of a step. orders: those found
    for earlier problems; one of the same form takes the same order, one that differs a
    little takes the last order, or the first, if that is hardly more work than it was, and a new
    order is added.
    scores: by what variables may be chosen, see `greedy_orders`.
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
    # The last order is of the most similar network; the first one mostly knows most variables. What
    # was found by fewer scores is no measure of what all of them find.
    sought_alike = [order for (_, sought), order in orders.items() if sought == scores]
    same = [orders[form]] if form in orders else []
    for earlier in (*same, *sought_alike[-1:], *sought_alike[:1]):
        order = [variable for variable in earlier[0] if variable in kept]
        had = dict.fromkeys(order)
        new = [variable for variable in free if variable not in had]
        if len(new) * _MOST_NEW <= len(free):
            try:
                order = inserted(network, order, new, max_table_entries) if new else order
            except TooWideError:
                continue
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
    hubs = hubs_of(network)
    # With hubs in their own places orders are found sooner, and mostly better ones.
    for aside, score, by_class in itertools.product((True, False), scores, (False, True)):
        if aside and not hubs:
            continue
        # Another order is looked for only while the work it may save exceeds the time of finding
        # it, which is far longer where neighbours are compared, and hubs are among them.
        worthwhile = _WORTHWHILE[score]
        if hubs and not aside and score != SCORES[0]:
            worthwhile = max(_WORTHWHILE.values())
        if best_work <= search_work * worthwhile or (best is None and score in _LATER):
            continue
        if by_class and not alike:
            alike = variable_classes(network, free)
        # Without equal variables, orders by class are those by variable.
        if by_class and len(dict.fromkeys(alike.values())) == len(free):
            continue
        try:
            classes = alike if by_class else alone
            order = greedy_order(network, classes, score, max_table_entries, hubs if aside else ())
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
