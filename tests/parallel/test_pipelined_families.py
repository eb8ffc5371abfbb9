"""Known models on two, three and four stages, with every schedule, on processes."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any

import families
import pipeline_models
import pytest
import torch
import zoo
from families import Float64, relative_error, worst_gradient
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan

TOLERANCE = 1e-11
STEPS = 20
# Micro-batches of which DualPipeV takes no fewer than there are stages: of nine rows, uneven ones.
MESHES: dict[str, dict[str, Any]] = {
    "pp2": {"mesh": Mesh(pp=2), "microbatches": 4},
    "pp3": {"mesh": Mesh(pp=3), "microbatches": 6},
    "pp4": {"mesh": Mesh(pp=4), "microbatches": 8},
    "pp2 x dp2": {"mesh": Mesh(pp=2, dp=2), "microbatches": 4},
    "pp2 x tp2": {"mesh": Mesh(pp=2, tp=2), "microbatches": 4, "data_parallel": False},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "looped": {"schedule": "gpipe", "stages_per_rank": 2},
    "interleaved": {"schedule": "1f1b", "stages_per_rank": 2},
    "zero bubble": {"schedule": "zero_bubble"},
    "zero bubble, two on each": {"schedule": "zero_bubble", "stages_per_rank": 2},
    "zbv": {"schedule": "zbv", "stages_per_rank": 2},
    "dualpipev": {"schedule": "dualpipev", "stages_per_rank": 2},
}
FAMILIES = ("gpt", "bert", "llama", "t5", "bart", "mixtral", "vit", "Skips")
Case = tuple[str, str, str]


def model_of(family: str) -> nn.Module:
    if family in ("gpt", "bert"):
        return families.build(family, layers=4)
    if family == "Skips":
        torch.manual_seed(7)
        return pipeline_models.Skips().double()
    model = zoo.build(family, layers=2 if family in ("t5", "bart") else 4)
    if family == "mixtral":
        model.config._experts_implementation = "batched_mm"  # grouped products have no float64
    return model


def batch_of(family: str) -> dict[str, Any]:
    """Nine rows, of which some have more labels that are ignored than others."""
    if family == "Skips":
        return pipeline_models.batch_of(family, rows=9)
    inputs = (families if family in ("gpt", "bert") else zoo).inputs_for(family)
    return {name: torch.cat([x, x.flip(0), x.roll(1, 0)]) for name, x in inputs.items()}


@cache
def planned(family: str, schedule: str, mesh: str) -> Plan:
    options = SCHEDULES[schedule] | MESHES[mesh]
    with Float64():
        return autoparallel.make_plan(model_of(family), example_inputs=batch_of(family), **options)


def plan_all(cases: tuple[Case, ...]) -> None:
    for case in cases:
        planned(*case)


def trained(model: nn.Module, family: str, steps: int) -> dict[str, Any]:
    """Losses of AdamW's steps, the first step's outputs and the gradients of the first and last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(steps):
        output = model(**batch_of(family))
        get = output.get if isinstance(output, dict) else partial(getattr, output)
        loss = output if isinstance(output, torch.Tensor) else get("loss")
        if not step:
            found["logits"] = loss.detach() if output is loss else whole(get("logits")).detach()
        loss.backward()
        found["losses"].append(loss.detach())
        if step in (0, steps - 1):
            named = model.named_parameters()
            found["gradients"].append(
                {path: whole(x.grad).clone() for path, x in named if x.grad is not None}
            )
        optimizer.step()
        optimizer.zero_grad()
    return found


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_ranks(rank: int, cases: tuple[Case, ...], steps: int) -> list[dict[str, Any]]:
    return [
        trained(autoparallel.apply_plan(model_of(case[0]), planned(*case)), case[0], steps)
        for case in cases
    ]


def reference(family: str, steps: int) -> dict[str, Any]:
    model = model_of(family)  # as ranks build it: what is drawn depends on the type
    with Float64():
        return trained(model, family, steps)


def compare(cases: tuple[Case, ...], steps: int) -> None:
    """Run cases of one family and mesh, and compare with one process."""
    family, _, mesh = cases[0]
    expected, before = reference(family, steps), partial(plan_all, cases)
    world_size = MESHES[mesh]["mesh"].world_size
    ranks = run_processes(on_ranks, world_size, cases, steps, before=before, timeout_seconds=1200.0)
    for place, (_, schedule, _) in enumerate(cases):
        held: list[dict[str, torch.Tensor]] = [{} for _ in expected["gradients"]]
        for rank in ranks:
            found = rank[place]
            torch.testing.assert_close(
                found["losses"], expected["losses"], rtol=TOLERANCE, atol=TOLERANCE, msg=schedule
            )
            assert relative_error(found["logits"], expected["logits"]) < TOLERANCE, schedule
            for all_held, own in zip(held, found["gradients"], strict=True):
                for path, gradient in own.items():
                    # Ranks that share a parameter have the same gradient, bit for bit.
                    assert torch.equal(all_held.setdefault(path, gradient), gradient), path
        for own, gradients in zip(held, expected["gradients"], strict=True):
            error, where = worst_gradient(own, gradients)
            assert error < 1e-9, (schedule, where)


def in_turn(mesh: str, family: str) -> tuple[Case, ...]:
    """Cases of a family: two schedules, so that all families together have each of them twice."""
    names = list(SCHEDULES)
    first = FAMILIES.index(family) + list(MESHES).index(mesh)
    return tuple((family, names[(first + step) % len(names)], mesh) for step in (0, 4))


@pytest.mark.broad
@pytest.mark.parametrize(("mesh", "family"), list(product(MESHES, FAMILIES)), ids=str)
def test_families_on_many_stages(mesh: str, family: str) -> None:
    """Loss, outputs and every gradient, with tied weights, skips, encoders and experts."""
    compare(in_turn(mesh, family), 1)


@pytest.mark.broad
@pytest.mark.parametrize("mesh", ["pp3", "pp4"])
def test_every_schedule_trains_on_many_stages(mesh: str) -> None:
    """Twenty steps of AdamW with each schedule."""
    compare(tuple(("gpt", schedule, mesh) for schedule in SCHEDULES), STEPS)


@pytest.mark.broad
def test_experts_train_on_stages_and_batches() -> None:
    """Twenty steps of AdamW, with experts that are split over the ranks of a stage."""
    cases = tuple(("mixtral", schedule, "pp2 x dp2") for schedule in ("1f1b", "gpipe"))
    for case in cases:
        assert any("experts" in kernel for op in planned(*case).ops for kernel in op.kernels)
    compare(cases, STEPS)


def test_three_stages() -> None:
    """An encoder and a decoder, whose states go through all stages of the latter."""
    compare((("t5", "zero bubble", "pp3"),), 1)
