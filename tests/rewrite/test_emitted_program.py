"""A rank's program is read from a plan alone, and from the parallel module that runs it."""

from __future__ import annotations

import pytest
import torch
from broken_models import build, inputs
from torch import nn

import autoparallel
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime.ranks import absent_ranks, thread_ranks

INPUTS = torch.ones(6, 8)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 30), nn.Dropout(0.1), nn.ReLU(), nn.Linear(30, 8))


def test_the_program_of_each_rank_is_what_it_runs() -> None:
    """On meshes of one and two axes, without devices."""
    for mesh in (Mesh(tp=4), Mesh(dp=2, tp=3)):
        plan = autoparallel.make_plan(mlp(), mesh=mesh, example_inputs=INPUTS)
        for ranks in thread_ranks(mesh):
            source = emit(plan.captured.graph, plan, ranks).source
            assert autoparallel.emitted_program(plan, ranks.rank) == source
            absent = absent_ranks(mesh, ranks.rank)
            assert (absent.coordinates, absent.names) == (ranks.coordinates, ranks.names)


def test_a_module_shows_the_program_of_its_mode() -> None:
    """That of train mode draws random numbers, that of eval mode does not."""
    parallel = autoparallel.autoparallelize(mlp(), 1, example_inputs=INPUTS)
    assert parallel.emitted_program == autoparallel.emitted_program(parallel.plan)
    assert "rng.dropout(" in parallel.emitted_program
    parallel.eval()
    with pytest.raises(PlanError, match="no program in eval mode"):
        _ = parallel.emitted_program
    parallel(INPUTS)
    assert "rng.dropout(" not in parallel.emitted_program


def test_plans_without_graphs_and_ranks_that_are_not_there_are_refused() -> None:
    """With what to do instead."""
    plan = autoparallel.make_plan(mlp(), 2, example_inputs=INPUTS)
    with pytest.raises(PlanError, match="has no graph") as caught:
        autoparallel.emitted_program(Plan.from_json(plan.to_json()))
    assert "make_plan(model, ...)" in caught.value.fix
    with pytest.raises(PlanError, match="rank 2 of") as caught:
        autoparallel.emitted_program(plan, 2)
    assert "from 0 to 1" in caught.value.why


def test_a_model_in_parts_shows_every_kind_of_part() -> None:
    """Equal parts once, under the paths of all of them, from the plan and from the module."""
    plan = autoparallel.make_plan(build("Branches"), 1, example_inputs=inputs())
    assert plan.breaks
    text = autoparallel.emitted_program(plan)
    for part in plan.parts:
        assert all(path in text for path in part.paths)
    assert text.count("def forward(") == 3  # the embedding, the blocks, and the head
    parallel = autoparallel.apply_plan(build("Branches"), plan)
    assert parallel.emitted_program.count("def forward(") == text.count("def forward(")
