"""The order in which to eliminate the variables of a network, and the cost of each step.

Nothing is computed on tables here, see `schedules`.
"""

import itertools

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
from planners.schedules import KnownOrder, Orders, Outline, Schedule

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
    same = orders.get(form)
    if same is not None:
        known = same.outline.schedule(network)
        if known.largest <= max_table_entries:
            return known
    free = [variable for variable, size in enumerate(network.sizes) if size > 1]
    kept = dict.fromkeys(free)
    # The last order is of the most similar network; the first one mostly knows most variables. What
    # was found by fewer scores is no measure of what all of them find.
    sought_alike = [order for (_, sought), order in orders.items() if sought == scores]
    for earlier in (*sought_alike[-1:], *sought_alike[:1]):
        order = [variable for variable in earlier.order if variable in kept]
        had = dict.fromkeys(order)
        new = [variable for variable in free if variable not in had]
        if len(new) * _MOST_NEW <= len(free):
            try:
                order = inserted(network, order, new, max_table_entries) if new else order
            except TooWideError:
                continue
            outline = Outline.of(network, order)
            known = outline.schedule(network)
            if known.largest <= max_table_entries and known.work <= _AS_GOOD * earlier.work:
                orders[form] = KnownOrder(order, earlier.work, outline)
                return known
    alone = {variable: place for place, variable in enumerate(free)}
    alike: dict[int, int] = {}
    search_work = _ENTRIES_PER_VARIABLE * len(free)
    best: Schedule | None = None
    best_order, best_outline = list[int](), Outline(())
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
        if best is None and score in _LATER:
            continue
        if best is not None and best.work <= search_work * worthwhile:
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
        outline = Outline.of(network, order)
        candidate = outline.schedule(network)
        if candidate.entries > min(16 * max_table_entries, _MOST_ENTRIES):
            needed.append(candidate.entries)
        elif best is None or candidate.work < best.work:
            best, best_order, best_outline = candidate, order, outline
    if best is None:
        apart = _order_apart(network, max_table_entries)
        if apart is None:
            raise TooWideError(min(needed), max_table_entries)
        best_order, best_outline = apart, Outline.of(network, apart)
        best = best_outline.schedule(network)
    if best.work > _MUCH_WORK and best.largest > max_table_entries // 4:
        raise TooWideError(best.largest, max_table_entries // 4)
    orders[form] = KnownOrder(best_order, best.work, best_outline)
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
        entries += own.entries
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
