"""Ops that micro-batches can compute in parts are, and plans are no worse for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pipeline_models import MODELS, batch_of

from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.captured import Captured
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.planning.pipeline_choices import in_parts
from autoparallel.planning.plan_model import trace_model
from autoparallel.planning.schedule_figures import shares_of
from autoparallel.strategy.build_network import build_network
from planners import InfeasibleError, Problem, exact

OPTIONS = Options(data_parallel=True, hardware="dgx-a100")


def problem_of(kind: str, parts: bool) -> Problem:
    """Return the problem of four micro-batches on two stages of two axes each."""
    captured = trace_model(MODELS[kind]().double(), (), batch_of(kind, rows=16), OPTIONS)
    assert isinstance(captured, Captured)
    graph = with_larger_hints(in_parts(captured), OPTIONS.tokens)
    mesh, shares = Mesh(microbatch=4, dp=2, tp=2), shares_of(2, 4, OPTIONS)
    hardware, shares = find_hardware("dgx-a100"), replace(shares, in_parts=parts)
    return build_network(graph, mesh, hardware, OPTIONS, shares=shares).problem()


@pytest.mark.parametrize("kind", ["Language", "Skips"])
def test_nothing_is_lost(kind: str) -> None:
    """The optimum is that of all states, of which few are left."""
    few, every = (problem_of(kind, parts) for parts in (True, False))
    assert exact.solve(few).cost == pytest.approx(exact.solve(every).cost, rel=1e-12)
    states = [sum(variable.size for variable in each.variables) for each in (few, every)]
    assert states[0] < 0.6 * states[1]


def test_whole_batch() -> None:
    """Where an op needs the whole batch, there are no such plans."""
    with pytest.raises(InfeasibleError):
        exact.solve(problem_of("Contrastive", parts=True))
    assert exact.solve(problem_of("Contrastive", parts=False)).cost > 0
