"""Plans that nobody would choose, which are random states of a model's cost network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from autoparallel.capture.example_inputs import split_example
from autoparallel.capture.graph_breaks import trace
from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.captured import Captured
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.plan import Plan
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.rules.lookup import find_rule
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from planners import Solution, exact

__all__ = ["any_plans", "network_of"]


def network_of(
    model: nn.Module, inputs: Any, mesh: Mesh, captured: Captured | None = None, **options: Any
) -> tuple[Captured, CostNetwork]:
    """Return a model's graph, and its cost network on a mesh, with memory counted where there is a
    limit. captured: the graph, where it is known.
    """
    if captured is None:
        args, kwargs = split_example(inputs)
        captured = trace(model, args, kwargs, known=find_rule)
    chosen = Options(**{"data_parallel": True, **options})
    graph = with_larger_hints(captured, chosen.tokens)
    return captured, build_network(graph, mesh, find_hardware(chosen.hardware), chosen)


def any_plans(
    captured: Captured, network: CostNetwork, seeds: range
) -> Iterator[tuple[Plan, Solution]]:
    """Yield a plan for each seed, with the solution that it was read from.

    What ops, parameters and blocks choose is drawn by adding noise to the costs; how values get
    from one to the other is then the cheapest, with memory charged at some price.
    """
    problem = network.problem(1.0, {}, None)
    drawn = {*network.costs, *network.storages}
    drawn |= {name for name in problem.names if name.startswith("block:")}
    scale = sum(float(v.unary[np.isfinite(v.unary)].mean()) for v in problem.variables)
    scale /= len(problem.variables)
    usage = sum(float(np.abs(v.usage).mean()) for v in problem.variables if v.usage is not None)
    usage /= len(problem.variables)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        price = float(rng.choice([0.0, 0.1, 1.0, 10.0])) * scale / usage if usage else 0.0
        plain = problem.weighed(price)
        noise = float(rng.choice([0.1, 3.0, 30.0])) * scale
        noisy = plain.with_unary(
            {
                variable.name: variable.unary + noise * rng.exponential(size=variable.size)
                for variable in plain.variables
                if variable.name in drawn
            }
        )
        found = exact.solve(noisy).assignment
        given = {name: state for name, state in found.items() if name in drawn}
        rest = exact.solve(plain.pinned(given)).assignment
        solution = Solution.of(problem, rest, "drawn", multiplier=price)
        plan = plan_of_solution(captured, "drawn", network.mesh, network, solution, 1.0)
        yield plan, solution
