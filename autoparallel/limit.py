"""Planning under a memory limit: the fastest plan that fits, or by how much none does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autoparallel.builder import build_network
from autoparallel.cost.memory import Account, account
from autoparallel.errors import MemoryLimitError, PlanError
from autoparallel.graph.capture import Captured
from autoparallel.mesh import Mesh
from autoparallel.network import Network
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.reading import read_plan
from autoparallel.units import bytes_text
from planners import InfeasibleError, OverLimitError, Solution, limited

__all__ = ["plan_within"]

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "buffers",
    "inputs",
    "temporary",
)
# Each attempt plans with a limit lowered by what the plan before took too much.
_MOST_ATTEMPTS = 5
# How many times as many ranks are tried for a model that does not fit.
_MOST_RANKS = 64
_LARGEST_ITEMS = 5


def plan_within(
    captured: Captured, model: str, network: Network, pins: Mapping[str, Layout] = {}
) -> Plan:
    """The plan of least cost among those that fit into the memory limit of the options.

    The planner limits the sum of what is kept. What a plan takes besides (buffers, inputs, what is
    there for a moment only) is known when it is made: then the limit is lowered and it is planned
    again. Raises MemoryLimitError where nothing fits.
    """
    allowed = network.options.memory_limit
    assert allowed is not None
    limit = float(allowed)
    best: tuple[Plan, Account] | None = None
    for _ in range(_MOST_ATTEMPTS):
        try:
            solution = limited.solve(network.problem(1.0, pins, limit))
        except OverLimitError as error:
            raise _does_not_fit(captured, model, network, pins, error) from error
        except InfeasibleError as error:
            raise PlanError(
                "no plan is possible", why=str(error), fix="loosen the options or the pins"
            ) from error
        best = _read(captured, model, network, solution)
        over = best[1].total - allowed
        if over <= 0:
            return best[0]
        limit = min(limit, solution.usage) - over
    assert best is not None
    raise MemoryLimitError(
        f"no plan was found that takes at most {bytes_text(allowed)} on each of {network.mesh}",
        why=f"the last of {_MOST_ATTEMPTS} takes {bytes_text(best[1].total)}: {_shares(best[1])}",
        fix=f"allow {bytes_text(best[1].total)}, or use more ranks",
    )


def _read(
    captured: Captured, model: str, network: Network, solution: Solution
) -> tuple[Plan, Account]:
    plan = read_plan(captured, model, network.mesh, network, solution, 1.0)
    taken = account(plan, [frozenset(group) for group in plan.recomputed])
    rows = tuple((name, getattr(taken, name)) for name in CATEGORIES)
    return replace(plan, memory=rows), taken


def _shares(taken: Account) -> str:
    rows = sorted(((getattr(taken, name), name) for name in CATEGORIES), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {bytes_text(size)}" for size, name in rows if size)


def _does_not_fit(
    captured: Captured,
    model: str,
    network: Network,
    pins: Mapping[str, Layout],
    error: OverLimitError,
) -> MemoryLimitError:
    """What the plan that needs least takes, and what limit or how many ranks would do."""
    allowed = network.options.memory_limit
    assert allowed is not None
    least = limited.solve(network.problem(1.0, pins, error.usage * (1 + 1e-9) + 1))
    _, taken = _read(captured, model, network, least)
    largest = [
        f"{item.category.replace('_', ' ')}: {item.name}"
        f"{f' ({item.count} of them)' if item.count > 1 else ''} {bytes_text(item.nbytes)}"
        for item in taken.items[:_LARGEST_ITEMS]
    ]
    ranks = _enough_ranks(network, allowed)
    more = f"use {ranks.world_size} ranks ({ranks})" if ranks else "use more ranks"
    found = MemoryLimitError(
        f"the model does not fit: no plan takes at most {bytes_text(allowed)} per rank on "
        f"{network.mesh}",
        where="\n".join(largest),
        why=f"the least that a plan takes is {bytes_text(taken.total)}, "
        f"{bytes_text(taken.total - allowed)} more than allowed: {_shares(taken)}",
        fix=f'pass memory_limit="{_at_least(taken.total)}", or {more}, or a smaller batch',
    )
    found.least = taken.total
    return found


def _at_least(nbytes: int) -> str:
    """A size that is not smaller, in MiB or GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if nbytes >= 10 * unit:
            return f"{-(-nbytes // unit)}{name}"
    return f"{-(-nbytes // 2**10)}KiB"


def _enough_ranks(network: Network, allowed: int) -> Mesh | None:
    """The mesh with more ranks on its first axis, by doubling, on which a plan may fit."""
    (name, size), *others = network.mesh.axes
    factor = 2
    while factor <= _MOST_RANKS:
        mesh = Mesh(**{name: size * factor, **dict(others)})
        wider = build_network(network.graph, mesh, network.hardware, network.options)
        try:
            limited.solve(wider.problem(1.0, {}, float(allowed)), most_solves=1, enough=1.0)
        except OverLimitError:
            factor *= 2
            continue
        except InfeasibleError:
            return None
        return mesh
    return None
