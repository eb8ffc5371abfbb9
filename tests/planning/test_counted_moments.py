"""Bytes may be counted at any call's backward, and no plan takes less than is counted then."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from any_plans import any_plans, network_of
from families import build, inputs_for
from torch import nn

import autoparallel
from autoparallel.analysis.abstract_execution import AbstractExecution
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.memory import memory_of
from autoparallel.errors import MemoryLimitError
from autoparallel.mesh import Mesh
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.build_network import rebuilt
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.train.models import GPT, GPTConfig
from planners import Factor, Problem, Solution, Variable, exact
from planners.two_usages import mean_usage, usage_of

AUTO: dict[str, Any] = {"memory_limit": 10**12, "recompute": "auto", "tokens": 1}


def places(network: CostNetwork) -> list[str]:
    """The call at whose backward bytes are counted, and some of the last block."""
    assert network.recomputation is not None
    block = network.recomputation.blocks[-1]
    inside = [node.name for node in network.graph.nodes[block.start : block.stop]]
    return [network.moment.call, *inside[::5], inside[-1]]


# A result that is saved, converted at a view and converted again behind it is counted twice: up to
# 1.4 % of these accounts. Bounds under a limit are that much too high for such plans, at most.
_TWICE = pytest.mark.xfail(reason="a copy at a view that is converted again counts", strict=True)


@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 40), marks=(pytest.mark.broad, _TWICE))]
)
def test_no_plan_takes_less_than_is_counted(seeds: range) -> None:
    """Whatever is recomputed. Blocks that are run again count where they are, and nowhere else."""
    inputs = inputs_for("gpt", batch=8, sequence=16)
    captured, network = network_of(build("gpt", 2), inputs, Mesh(dp=2, tp=2), **AUTO)
    networks = [rebuilt(network, counted_at=call) for call in places(network)]
    problem, shares, modes = network.problem(), [], set[str]()
    scopes = [factor.scope for factor in problem.factors]
    assert all([one.scope for one in other.factors] == scopes for other in networks)
    drawn = {*network.costs, *network.storages, *(f"block:blocks.{at}" for at in range(2))}
    assert drawn <= set(problem.names)
    for _, noisy in any_plans(captured, network, seeds):
        # Copies that nobody needs cost nothing where bytes cost nothing, and are none of the plan.
        given = {name: state for name, state in noisy.assignment.items() if name in drawn}
        chosen = exact.solve(problem.weighed(1e-12).pinned(given)).assignment
        solution = Solution.of(problem, chosen, "", 0.0, 1e-12)
        plan = plan_of_solution(captured, "", network.mesh, network, solution, 1.0)
        modes |= {mode for _, mode in plan.recompute} or {"none"}
        walk = AbstractExecution(network.graph, plan, plan.recomputed, remade=plan.remade)
        account, live = memory_of(plan, graph=network.graph), Liveness(walk)
        stays = account.total - account.temporary - account.activations
        for counted in networks:
            call = counted.moment.call
            (at,) = (i for i, moment in enumerate(walk.moments) if moment.node == call)
            usage = usage_of(counted.problem(), solution) + counted.fixed_nbytes
            shares.append(usage / (stays + int(live.backward[at])))
            # Token ids that are cut out again for the backward pass are counted as if kept.
            assert shares[-1] <= 1.001, call
    assert len(modes) > 1
    # It would be no use if it were little.
    assert np.mean(shares) > 0.8


def test_a_limit_knows_of_blocks_that_are_run_again() -> None:
    """What a block takes when it is run again is more than what all of them keep: where it decides
    alone, the plan is proven within the gap that was asked for.
    """
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=2, hidden=256, heads=8, vocabulary=1000, positions=128))
    plan = autoparallel.make_plan(
        model,
        mesh=Mesh(dp=2, tp=2),
        hardware="dgx-a100",
        example_inputs=model.example_inputs(batch=8),
        memory_limit=28_000_000,
    )
    assert plan.recompute
    assert plan.cost - plan.lower_bound <= 0.01 * plan.cost


def test_what_a_refusal_says_is_enough_is_enough() -> None:
    """The plan that takes least by one moment alone is tried, too, where several are counted."""
    model, given = build("mlp", 2), inputs_for("mlp", batch=8, sequence=16)
    options: dict[str, Any] = {"mesh": Mesh(dp=2, tp=2), "hardware": "dgx-a100"}
    plan = partial(autoparallel.make_plan, model, example_inputs=given, **options)
    with pytest.raises(MemoryLimitError) as refused:
        plan(memory_limit=1)
    least = int(refused.value.least)
    assert sum(size for _, size in plan(memory_limit=least).memory) <= least


class Turned(nn.Module):
    """A product whose result is read as a view, and saved by the square of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, 16)."""
        turned = self.up(x).view(-1, 4, 8)
        return self.down(turned * turned).sum()


def test_views_count_what_they_are_views_of() -> None:
    """Once: where a view is converted before it is saved, its own memory is not needed."""
    inputs = torch.zeros(8, 16)
    _, network = network_of(Turned(), inputs, Mesh(tp=2), memory_limit=10**9, tokens=1)
    assert network.activations is not None
    (view,) = (node for node in network.graph.calls if "view" in node.name)
    assert network.activations.passed == {view.operands()[0]}
    assert network.activations.counted_elsewhere(view) == (False,)


def test_means_of_two_usages() -> None:
    """A state of either usage alone is over the limit; a mean of both sees the one between."""
    costs = np.array([0.0, 1.0, 0.0])
    early, late = np.array([9.0, 4.0, 0.0]), np.array([0.0, 4.0, 9.0])
    first, second = (Problem((Variable("a", costs, usage),), (), 5.0) for usage in (early, late))
    mean = mean_usage(first, second, 0.5)
    assert mean.limit == 5.0
    assert [mean.fits(usage) for usage in (4.5, 5.1)] == [True, False]
    assert usage_of(mean, Solution({"a": 1}, 0.0, 0.0, "")) == 4.0
    assert usage_of(second, Solution({"a": 2}, 0.0, 0.0, "")) == 9.0
    assert mean_usage(first, second, 0.0) is first
    b = Variable("b", np.zeros(2))
    table = np.ones((3, 2))
    with_factors = [
        Problem((Variable("a", costs), b), (Factor(("a", "b"), table, usage),), 5.0)
        for usage in (None, 4 * table)
    ]
    (factor,) = mean_usage(*with_factors, 0.25).factors
    assert factor.usage is not None
    assert (factor.usage == table).all()
