"""The error for a model that does not fit into the memory of a rank, and what would do."""

from __future__ import annotations

from autoparallel.analysis.memory_account import Account
from autoparallel.errors import MemoryLimitError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import MICROBATCH, PIPELINE, Mesh
from autoparallel.options import Options
from autoparallel.plan import Plan
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.strategy.build_network import rebuilt
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.support.units import bytes_text
from planners import InfeasibleError

__all__ = ["does_not_fit"]

# For a model that does not fit, up to so many times as many ranks are tried.
_MOST_RANKS = 64
# So many of the largest items of memory are named in the error.
_LARGEST_ITEMS = 5


def _shares(account: Account) -> str:
    """Return the categories of memory with their sizes, the largest first."""
    rows = sorted(((size, name) for name, size in account.rows), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {bytes_text(size)}" for size, name in rows if size)


def does_not_fit(
    captured: Captured, network: CostNetwork, plan: Plan, account: Account, counted: float
) -> MemoryLimitError:
    """Return the error that says what the plan that needs least takes, and what would do.

    What would do is a larger limit, more ranks, or a smaller batch. network: that of the plan, with
    the limit. account: all of the plan's memory. counted: those bytes of it that the planner's
    tables count.

    Example: `raise does_not_fit(captured, network, plan, memory_of(plan), solution.usage)`
    """
    allowed = network.options.memory_limit
    assert allowed is not None
    largest = [
        f"{item.category.replace('_', ' ')}: {item.name}"
        f"{f' ({item.count} of them)' if item.count > 1 else ''} {bytes_text(item.nbytes)}"
        for item in account.items[:_LARGEST_ITEMS]
    ]

    def error(more: str = "use more ranks") -> MemoryLimitError:
        """Return the error that advises this, too."""
        error = MemoryLimitError(
            f"the model does not fit: no plan was found that takes at most {bytes_text(allowed)} "
            f"per rank on {_mesh_of(network)}",
            where="\n".join([*([account.where] if account.where else []), *largest]),
            why=f"the plan found that needs least takes {bytes_text(account.total)}, "
            f"{bytes_text(account.total - allowed)} more than allowed: {_shares(account)}",
            fix=f'pass memory_limit="{_at_least(account.total)}", or {more}, or a smaller batch',
        )
        error.least = account.total
        return error

    def advised() -> MemoryLimitError:
        """Return the error that says how many ranks would do, which takes networks for more."""
        if network.only is not None:
            # A network of all states of still more ranks takes too long for an advice.
            return error()
        if network.shares.ranks > 1:
            return error("use more stages or more ranks in each, or recompute more")
        fixed_nbytes = account.total - counted
        ranks = _enough_ranks(captured, network, plan.options, counted, fixed_nbytes)
        return error(f"use {ranks.world_size} ranks ({ranks})") if ranks else error()

    plain = error()
    plain.advised = advised
    return plain


def _mesh_of(network: CostNetwork) -> Mesh:
    """Return the mesh of all ranks, with the axis of stages where there is one."""
    axes = dict(network.mesh.axes)
    if MICROBATCH not in axes:
        return network.mesh
    del axes[MICROBATCH]
    return Mesh(**{PIPELINE: network.shares.ranks}, **axes)


def _at_least(nbytes: int) -> str:
    """Return a size that is not smaller, in whole GiB, MiB or KiB, of at least two digits.

    >>> _at_least(40 * 2**30), _at_least(5 * 2**30 + 1)
    ('40GiB', '5121MiB')
    """
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if nbytes >= 10 * unit:
            return f"{-(-nbytes // unit)}{name}"
    return f"{-(-nbytes // 2**10)}KiB"


def _enough_ranks(
    captured: Captured,
    network: CostNetwork,
    options: Options,
    counted_nbytes: float,
    fixed_nbytes: float,
) -> Mesh | None:
    """Return the mesh with more ranks on its first axis on which a plan should fit.

    counted_nbytes: bytes of a plan that the planner counts. fixed_nbytes: the others, taken to be
    no more on a larger mesh. Return None where no such mesh has a plan.
    """
    # The outermost axis is the one across nodes, along which machines are added.
    (name, size), *others = network.mesh.axes
    allowed, factor = options.memory_limit, 2
    assert allowed is not None
    # More ranks share the counted bytes at best evenly: fewer than this cannot do.
    while factor <= _MOST_RANKS and counted_nbytes / factor + fixed_nbytes > allowed:
        factor *= 2
    while factor <= _MOST_RANKS:
        mesh = Mesh(**{name: size * factor, **dict(others)})
        wider = rebuilt(network, options=options, mesh=mesh)
        try:
            constrain(wider, captured)
        except PlanError:
            # What is demanded of fewer ranks cannot be had of so many.
            return None
        try:
            least = NetworkSolver(wider)(wider.problem().usage_alone())
        except InfeasibleError:
            return None
        if least.cost + fixed_nbytes <= allowed:
            return mesh
        factor *= 2
    return None
