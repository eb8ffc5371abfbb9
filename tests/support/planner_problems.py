"""Random and layered cost networks, plain ones and ones with usage, alternatives and limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planners import Alternative, Factor, InfeasibleError, Problem, Table, Variable, exhaustive

__all__ = [
    "chain_problem",
    "feasible",
    "layered_problem",
    "limited_problem",
    "priced_problem",
    "product_states",
    "random_problem",
    "subproblem",
]


def _costs(rng: np.random.Generator, shape: tuple[int, ...], forbidden: float) -> Table:
    whole = rng.random() < 0.4
    table = rng.integers(0, 6, shape).astype(np.float64) if whole else 5 * rng.random(shape)
    table[rng.random(shape) < forbidden] = np.inf
    return table


def _usage(rng: np.random.Generator, shape: tuple[int, ...]) -> Table | None:
    if rng.random() < 0.4:
        return None
    return rng.integers(-2, 10, shape).astype(np.float64)


def _alternatives(
    rng: np.random.Generator, shape: tuple[int, ...], most: int
) -> tuple[Alternative, ...]:
    count = int(rng.choice([0, 0, 0, 1, most])) if most else 0
    return tuple(
        Alternative(_costs(rng, shape, 0.2) + 1.0, _usage(rng, shape)) for _ in range(count)
    )


def product_states(rng: np.random.Generator, first: Table, second: Table) -> Table:
    """Return the table of a joint choice on two axes, nearly the sum of their two tables."""
    table = first
    for axis in range(second.ndim):
        table = np.expand_dims(table, 2 * axis + 1)
        second = np.expand_dims(second, 2 * axis)
    table = table + second
    shape = [table.shape[2 * a] * table.shape[2 * a + 1] for a in range(table.ndim // 2)]
    return table.reshape(shape) + 0.1 * rng.random(shape)


def priced_problem(
    rng: np.random.Generator, count: int, most_states: int, *, alternatives: int = 2
) -> Problem:
    """Return variables, and factors over two or three of them, with usage; half are in products."""
    forbidden = float(rng.choice([0.0, 0.1, 0.25]))
    product = rng.random() < 0.5
    sizes = [(int(rng.integers(1, most_states + 1)), 1) for _ in range(count)]
    if product:
        sizes = [(int(rng.integers(1, 3)), int(rng.integers(1, 3))) for _ in range(count)]

    def table(places: tuple[int, ...]) -> tuple[Table, Table | None, tuple[Alternative, ...]]:
        shape = tuple(sizes[p][0] * sizes[p][1] for p in places)
        if not product:
            costs = _costs(rng, shape, forbidden)
        else:
            costs = product_states(
                rng,
                _costs(rng, tuple(sizes[p][0] for p in places), forbidden),
                _costs(rng, tuple(sizes[p][1] for p in places), forbidden),
            )
        return costs, _usage(rng, shape), _alternatives(rng, shape, alternatives)

    variables = tuple(Variable(f"v{i}", *table((i,))) for i in range(count))
    factors = []
    for first in range(count):
        for second in range(first + 1, min(count, first + 4)):
            if rng.random() < 0.45:
                scope = [first, second]
                if second + 1 < count and rng.random() < 0.4:
                    scope.append(int(rng.integers(second + 1, count)))
                places = tuple(int(place) for place in rng.permutation(scope))
                factors.append(Factor(tuple(f"v{p}" for p in places), *table(places)))
    return Problem(variables, tuple(factors))


def limited_problem(
    rng: np.random.Generator, count: int, most_states: int, *, alternatives: int = 2
) -> Problem:
    """Return a `priced_problem` with a limit, mostly between the least and the free usage."""
    problem = priced_problem(rng, count, most_states, alternatives=alternatives)
    try:
        free = exhaustive.solve(problem)
        least = exhaustive.solve(problem.usage_alone()).cost
    except InfeasibleError:
        return replace(problem, limit=0.0)
    share = float(rng.choice([-0.05, 0.0, 0.2, 0.5, 0.8, 1.0]))
    return replace(problem, limit=float(np.floor(least + share * (free.usage - least))))


def chain_problem(layers: int, states: int = 4, seed: int = 0) -> Problem:
    """Return equal layers in a row, as of a deep model, without a limit.

    Each layer has a parameter (stored whole or in parts, gathered copies kept or gathered again), a
    residual stream that flows on to the next layer, an operator on both, and a mode that decides
    what the operator keeps. One parameter is read by the first and the last layer, and one variable
    by all.
    """
    rng = np.random.default_rng(seed)
    one, several = (1.0, 0.125), (1.0, 0.125, *rng.uniform(0.1, 1.0, states - 2))
    part, parts = np.array(one), np.array(several)
    store = Variable("", 0.2 * part, 16.0 * part)
    gathers = np.array([[0.0] * states, 0.3 + 0.1 * rng.random(states)])
    kept = np.array([[0.0] * states, [2.0] * states])
    again = np.where(gathers > 0, 0.25, np.inf) + gathers
    work = Variable("", 1.0 + 0.4 * rng.random(states))
    stream = Variable("", 0.1 * parts)
    moves = np.where(np.eye(states) > 0, 0.0, 0.3 + rng.random((states, states)))
    onward = np.where(np.eye(states) > 0, 0.0, 0.5 + rng.random((states, states)))
    saved = parts[:, None, None] * parts[:, None] * np.array([6.0, 1.0])
    redone = np.broadcast_to(np.array([0.0, 0.33]), (states, states, 2)) * parts[:, None]
    mask = 0.05 * rng.random((2, states))
    variables = [Variable("tied", 0.5 * part, 40.0 * part), Variable("mask", np.array([0.0, 0.1]))]
    factors = []
    for layer in range(layers):
        weight, op, flow, mode = (f"{layer}.{name}" for name in ("weight", "op", "flow", "mode"))
        variables += [
            replace(store, name=weight),
            replace(work, name=op),
            replace(stream, name=flow),
            Variable(mode, np.zeros(2)),
        ]
        factors += [
            Factor((weight, op), gathers, kept, (Alternative(again),)),
            Factor((op, flow), moves),
            Factor((flow, op, mode), redone, saved),
            Factor(("mask", op), mask),
        ]
        if layer:
            factors.append(Factor((f"{layer - 1}.flow", flow), onward))
        if layer in (0, layers - 1):
            factors.append(Factor(("tied", op), gathers, kept, (Alternative(again),)))
    return Problem(tuple(variables), tuple(factors))


def _random_table(
    rng: np.random.Generator, shape: tuple[int, ...], kind: str, forbidden: float
) -> Table:
    """Return costs of mixed signs: `real`, `ties` (small whole numbers), `sums` of two vectors."""
    if kind == "ties":
        table = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "sums" and len(shape) == 2:
        table = rng.normal(size=shape[0])[:, None] + rng.normal(size=shape[1])
    else:
        table = rng.normal(size=shape)
    table[rng.random(shape) < forbidden] = np.inf
    return table


def random_problem(rng: np.random.Generator, count: int, most_states: int, reach: int) -> Problem:
    """Return variables, some linked to others at most `reach` places away, parallel or reversed."""
    sizes = rng.integers(1, most_states + 1, count)
    forbidden = float(rng.choice([0.0, 0.1, 0.35]))
    scale = float(rng.choice([1e-6, 1.0, 1e3]))
    variables = tuple(
        Variable(f"v{i}", scale * _random_table(rng, (size,), "real", forbidden / 3))
        for i, size in enumerate(sizes)
    )
    factors = []
    for first in range(count):
        for second in range(first + 1, min(first + reach + 1, count)):
            for _ in range(rng.choice([0, 1, 2], p=[0.4, 0.45, 0.15])):
                pair = (first, second) if rng.random() < 0.5 else (second, first)
                kind = str(rng.choice(["real", "ties", "sums"]))
                table = _random_table(rng, (sizes[pair[0]], sizes[pair[1]]), kind, forbidden)
                factors.append(Factor((f"v{pair[0]}", f"v{pair[1]}"), scale * table))
    return Problem(variables, tuple(factors))


def layered_problem(
    layers: int, *, width: int = 6, states: int = 4, shared: int = 2, everywhere: bool = False
) -> Problem:
    """Return equal layers in a row, and `shared` variables connected to every layer."""
    rng = np.random.default_rng(7)
    unaries = [rng.random(states) * 1e-3 for _ in range(width)]
    inside = {(i, i + 1): rng.random((states, states)) * 1e-3 for i in range(width - 1)}
    inside[0, width - 1] = rng.random((states, states)) * 1e-3
    between = rng.random((states, states)) * 1e-3
    readers = range(width) if everywhere else range(1, width, 2)
    masks = {(g, i): rng.random((3, states)) * 1e-3 for g in range(shared) for i in readers}
    variables = [Variable(f"shared{g}", rng.random(3)) for g in range(shared)]
    factors = []
    for layer in range(layers):
        variables += [Variable(f"{layer}.{i}", unaries[i]) for i in range(width)]
        factors += [Factor((f"{layer}.{i}", f"{layer}.{j}"), t) for (i, j), t in inside.items()]
        factors += [Factor((f"shared{g}", f"{layer}.{i}"), t) for (g, i), t in masks.items()]
        if layer:
            factors.append(Factor((f"{layer - 1}.{width - 1}", f"{layer}.0"), between))
    return Problem(tuple(variables), tuple(factors))


def subproblem(problem: Problem, names: tuple[str, ...]) -> Problem:
    """Return the part of a problem that is about these variables alone."""
    return Problem(
        tuple(v for v in problem.variables if v.name in names),
        tuple(f for f in problem.factors if set(f.scope) <= set(names)),
    )


def feasible(problem: Problem) -> bool:
    """True if the problem allows any assignment."""
    try:
        exhaustive.solve(problem)
    except InfeasibleError:
        return False
    return True
