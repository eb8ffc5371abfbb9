"""From a captured model to a plan: build the network, solve it, read the solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from autoparallel.analysis.memory_account import Account
from autoparallel.analysis.timeline import step_and_waits
from autoparallel.cost.hardware import find_hardware
from autoparallel.cost.op_costs import nbytes
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout, layout_text
from autoparallel.plan import Plan
from autoparallel.planning.eased_plans import Eased
from autoparallel.planning.many_axes import narrowed
from autoparallel.planning.memory_limit import plan_within, unlimited
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.request import require_known
from autoparallel.planning.solution_to_plan import (
    layouts_together,
    plan_of_solution,
    solution_of_plan,
    with_reasons,
)
from autoparallel.planning.step_search import StepSearch
from autoparallel.planning.unsplit_reasons import cost_of_splitting, is_left_whole
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.stage_shares import WHOLE_MODEL, StageShares
from autoparallel.support.paused_collection import paused_collection
from planners import InfeasibleError, Problem, Solution
from planners.effort import current

__all__ = ["search"]

# The shares that must be split for a plan to be accepted without more weight on products: of the
# FLOPs of products with a weight, and of the bytes of matrices.
ENOUGH_SPLIT = (0.99, 0.95)
# What a second of products is made to count, one after the other, until enough is split.
_WEIGHTS = tuple(8.0**power for power in range(8))


@paused_collection()
def search(
    captured: Captured,
    model: str,
    mesh: Mesh,
    options: Options,
    stored: Mapping[str, Layout] | None = None,
    pins: Mapping[str, Layout] | None = None,
    product_weight: float | None = None,
    start: Plan | None = None,
    beat: float = math.inf,
    shares: StageShares = WHOLE_MODEL,
    judge: Callable[[Plan], Account] | None = None,
    eased: Sequence[Eased] = (),
    step: Callable[[Plan], float] | None = None,
) -> Plan:
    """Return the plan of the shortest predicted step of one traced program on one mesh.

    captured: the program. model: the name that the plan gives it. stored: layouts, by path, that
    parameters have already and keep. pins: layouts, by path, that parameters are to have. start: a
    plan of the same program and mesh to begin with; the result takes no longer. beat: a longer step
    than this, in seconds, is of no use: the search for a shorter one ends where none can be.
    shares: what a micro-batch of a pipeline bears, on a mesh with an axis of micro-batches; seconds
    are then those of one of them on all stages. judge, eased, step: see
    `plan_within`.
    product_weight: what a second of matrix products counts in the cost. By default it is 1 with
    data parallelism; without it, a model too small to be worth splitting is split all the same:
    products are weighted more, step by step, until 99% of their FLOPs and 95% of the bytes of
    matrices are split, or more weight splits no more.
    Raises UnsupportedOpError for ops without a rule, MemoryLimitError where nothing fits, and
    PlanError for an unknown pin, for pins that contradict each other, and where no plan is left.
    """
    # Example inputs are often tiny. Planned for as they are, a plan would save latency alone.
    graph = with_larger_hints(captured, options.tokens)
    hardware = find_hardware(options.hardware)
    # Whether a limit plays a part is found without it.
    free = options if options.memory_limit is None else unlimited(options)
    asked = pins or options.constraints or product_weight or start or judge
    few = None
    if options.data_parallel and shares == WHOLE_MODEL and not asked:
        few = narrowed(graph, mesh, hardware, options, stored, captured.part)
    if few is not None:
        network = few.network
    else:
        also = None if start is None else layouts_together(start, graph)
        network = build_network(
            graph, mesh, hardware, free, stored, captured.part, shares, also=also
        )
    paths = {node.target: node.name for node in graph.nodes if node.kind == "parameter"}
    require_known(pins, captured.aliases)
    # Tied parameters are one node of the graph, under the first of their paths.
    pinned: dict[str, Layout] = {}
    for path, pin in (pins or {}).items():
        name = paths.get(captured.aliases[path])
        if name is not None and pinned.setdefault(name, pin) != pin:
            raise PlanError(
                f"{path} is tied to {captured.aliases[path]}, which is pinned to "
                f"{layout_text(pinned[name])}",
                fix="pin one of the two, or both alike",
            )
    constrain(network, captured, pinned)
    if options.memory_limit is not None:
        plan = plan_within(
            captured, model, network, options, pinned, start, beat, judge, eased, step
        )
        return plan if few is None else few.told(plan)
    # The plan to begin with is told as states of this network, or refused.
    begin = solution_of_plan(network, start) if start is not None else None
    solve = NetworkSolver(network, begin)
    best: tuple[float, float, Solution, Problem] | None = None
    weights = _WEIGHTS if mesh.world_size > 1 and not options.data_parallel else (1.0,)
    for weight in weights if product_weight is None else (product_weight,):
        problem = network.problem(weight, pinned)
        try:
            solution = solve(problem)
        except InfeasibleError as error:
            raise _impossible(error) from error
        missing = _missing(network, solution)
        # More weight must split more to be worth its price; rounding alone does not count.
        if best is None or missing < best[1] - 1e-9:
            best = (weight, missing, solution, problem)
        if not missing:
            break
    assert best is not None
    weight, _, solution, problem = best
    plan = _shortest(captured, model, network, solve, problem, solution, weight, beat)
    return plan if few is None else few.told(plan)


def _shortest(
    captured: Captured,
    model: str,
    network: CostNetwork,
    solve: NetworkSolver,
    problem: Problem,
    solution: Solution,
    weight: float,
    beat: float,
) -> Plan:
    """Return the plan of the shortest step, beginning with the optimum of the sum.

    Where the sum is no sum of seconds, because products weigh more or activations count as whole,
    its optimum is what was asked for.
    """
    options, width = network.options, solve.is_wide
    if weight == 1.0 and (options.sequence_parallel or options.data_parallel):
        enough = _missing(network, solution)
        search = StepSearch(
            captured,
            model,
            network,
            solve,
            problem,
            solution,
            # Without data parallelism, what is split stays split.
            lambda other: (
                options.data_parallel or _missing(network, other.solution) <= enough + 1e-9
            ),
            beat,
        )
        plan, solution = search.run()
    else:
        plan = plan_of_solution(captured, model, network.mesh, network, solution, weight)
        step, _ = step_and_waits(plan, network.hardware, network.shares.once)
        plan = replace(plan, step_seconds=step)
    # It takes an exact solution for every variable, which wide problems have no tables for.
    if width or solve.many or current().is_over:
        return plan
    added = cost_of_splitting(network, problem, solution, solve.memo)
    return with_reasons(plan, network, added)


def _missing(network: CostNetwork, solution: Solution) -> float:
    """Return by what shares of FLOPs and bytes a solution splits less than enough."""
    shares = (_split_share(network, solution), _split_bytes(network, solution))
    return sum(max(enough - share, 0.0) for share, enough in zip(shares, ENOUGH_SPLIT, strict=True))


def _impossible(error: InfeasibleError) -> PlanError:
    """Return the error for options and pins that leave no plan."""
    return PlanError("no plan is possible", why=str(error), fix="loosen the options or the pins")


def _split_share(network: CostNetwork, solution: Solution) -> float:
    """Return the share of the FLOPs of products with a weight that belong to ops that are split.

    It is 1.0 for a model without such products.
    """
    whole = split = 0.0
    for node in network.graph.calls:
        rule = network.rules[node.name]
        if rule is None or not rule.flops:
            continue
        if not any(name in network.weights for name in node.operands()):
            continue
        flops = float(rule.flops * rule.points)
        whole += flops
        if network.costs[node.name][solution.assignment[node.name]].flops < flops:
            split += flops
    return split / whole if whole else 1.0


def _split_bytes(network: CostNetwork, solution: Solution) -> float:
    """Return the share of the bytes of matrices (two dims and more) that are stored split."""
    whole = split = 0
    for node in network.graph.nodes:
        if node.kind == "parameter" and len(node.result.shape) > 1:
            whole += nbytes(node.result)
            if not is_left_whole(network, node, solution.assignment[node.name]):
                split += nbytes(node.result)
    return split / whole if whole else 1.0
