"""On meshes of several axes and within limits: nothing that other solvers find is cheaper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from any_plans import network_of
from families import build, inputs_for
from torch import nn

from autoparallel.mesh import Mesh
from autoparallel.planning import network_solver
from autoparallel.planning.network_solver import NetworkSolver
from planners import TooWideError, exact, exhaustive, ilp
from planners import lagrangian as limited

broad = pytest.mark.broad


class Tiny(nn.Module):
    """So few ops that all plans can be tried."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, 2 * features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).sum()


@pytest.mark.parametrize(
    ("name", "layers", "mesh"),
    [
        ("gpt", 1, {"dp": 2, "tp": 2}),
        pytest.param("gpt", 2, {"dp": 2, "tp": 2}, marks=broad),
        pytest.param("gpt", 4, {"tp": 4}, marks=broad),
        pytest.param("gpt", 2, {"dp": 2, "tp": 4}, marks=broad),
        pytest.param("bert", 2, {"dp": 2, "tp": 2}, marks=broad),
        pytest.param("bert", 4, {"tp": 4}, marks=broad),
        pytest.param("hf-llama", 2, {"dp": 2, "tp": 2}, marks=broad),
        pytest.param("hf-llama", 4, {"tp": 4}, marks=broad),
        pytest.param("hf-gpt2", 3, {"dp": 2, "tp": 2}, marks=broad),
    ],
)
def test_equals_the_integer_program(name: str, layers: int, mesh: dict[str, int]) -> None:
    """HiGHS finds the same cost, and its bound proves it."""
    inputs = inputs_for(name, batch=4, sequence=8)
    _, network = network_of(build(name, layers), inputs, Mesh(**mesh), hardware="dgx-a100")
    problem = network.problem()
    own, other = exact.solve(problem), ilp.solve(problem)
    assert own.cost == pytest.approx(other.cost, rel=1e-7)
    assert other.lower_bound <= own.cost * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "mesh", "share"),
    [
        ("mlp", {"dp": 2, "tp": 2}, 0.7),
        pytest.param("gpt", {"tp": 2}, 0.8, marks=broad),
        pytest.param("gpt", {"dp": 2, "tp": 2}, 0.8, marks=broad),
        pytest.param("bert", {"tp": 2}, 0.8, marks=broad),
    ],
)
def test_equals_the_integer_program_in_a_limit(
    name: str, mesh: dict[str, int], share: float
) -> None:
    """The plan is within its proven gap of what HiGHS proves, and no bound is above a plan."""
    options: dict[str, Any] = {"memory_limit": 10**12, "recompute": "auto"}
    inputs = inputs_for(name, batch=4, sequence=8)
    _, network = network_of(build(name, 2), inputs, Mesh(**mesh), **options)
    free = network.problem(limit=1e12)
    most = limited.solve(free).usage
    least = exact.solve(free.usage_alone()).cost
    problem = network.problem(limit=least + share * (most - least))
    own, other = limited.solve(problem), ilp.solve(problem)
    assert problem.fits(own.usage)
    assert problem.fits(other.usage)
    assert own.lower_bound <= other.cost * (1 + 1e-9)
    assert other.lower_bound <= own.cost * (1 + 1e-9)
    assert own.cost <= other.cost + own.gap * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("share", [None, 0.2, 0.6])
def test_equals_trying_everything(share: float | None) -> None:
    """Of a product and a sum on 2 x 2 ranks, with and without a limit."""
    options: dict[str, Any] = {} if share is None else {"memory_limit": 10**12}
    _, network = network_of(Tiny(4), torch.zeros(4, 4), Mesh(dp=2, tp=2), tokens=1, **options)
    problem = network.problem()
    if share is None:
        assert exact.solve(problem).cost == pytest.approx(exhaustive.solve(problem).cost)
        return
    most = exact.solve(problem.weighed(0.0))
    least = exact.solve(problem.usage_alone()).cost
    limit = least + share * (problem.spent(most.assignment).usage - least)
    problem = network.problem(limit=limit)
    own, best = limited.solve(problem), exhaustive.solve(problem)
    assert problem.fits(own.usage)
    assert own.lower_bound <= best.cost * (1 + 1e-9)
    assert best.cost <= own.cost * (1 + 1e-9) <= best.cost * 1.1


def test_a_wide_network_of_two_axes_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of states alone leave a gap; with some variables fixed, nothing is left of it."""
    inputs = inputs_for("gpt", batch=4, sequence=8)
    _, network = network_of(build("gpt", 1), inputs, Mesh(dp=2, tp=2), hardware="dgx-a100")
    problem = network.problem()
    best = exact.solve(problem).cost

    def too_wide(*_: Any, **__: Any) -> None:
        raise TooWideError(2**30, 2**26)

    monkeypatch.setattr(network_solver, "exact", SimpleNamespace(solve=too_wide))
    solver = NetworkSolver(network)
    assert solver.coarse(problem).gap > 1e-3 * best
    solution = solver(problem)
    assert solution.cost == pytest.approx(best, rel=1e-9)
    assert solution.lower_bound == pytest.approx(best, rel=1e-9)
