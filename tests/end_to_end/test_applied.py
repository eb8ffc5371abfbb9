"""Every plan that is returned can be applied: loss and all gradients equal the unsplit model's.

Planned freely on meshes of two axes, with sizes that divide by nothing, in and out of limits.
"""

from __future__ import annotations

from typing import Any

import pytest
from families import (
    Float64,
    build,
    gradients_of,
    inputs_for,
    loss_and_logits,
    relative_error,
    worst_gradient,
)

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan

pytestmark = pytest.mark.usefixtures("one_trace")
TOLERANCE = 1e-10
broad = pytest.mark.broad


def largest_error(name: str, batch: int = 4, **options: Any) -> tuple[float, Plan]:
    """Of the loss and every gradient, of a plan made with `options`; and the plan."""
    changes = {key: options.pop(key) for key in ("vocabulary", "heads", "hidden") if key in options}
    with Float64():
        model, inputs = build(name, **changes), inputs_for(name, batch, 8)
        high = changes.get("vocabulary", 200)
        inputs = {
            key: tensor.clamp(max=high - 1) if tensor.is_floating_point() is False else tensor
            for key, tensor in inputs.items()
        }
        loss, _ = loss_and_logits(model(**inputs))
        expected = gradients_of(model, inputs)
        plan = autoparallel.make_plan(model, example_inputs=inputs, **options)
        result = autoparallel.simulate(model, example_inputs=inputs, plan=plan)
    own, _ = loss_and_logits(result.output)
    error = relative_error(own.detach(), loss.detach())
    return max(error, worst_gradient(dict(result.gradients), expected)[0]), plan


@pytest.mark.parametrize(
    ("name", "mesh", "options"),
    [
        ("gpt", {"dp": 2, "tp": 4}, {"vocabulary": 131}),
        ("gpt", {"dp": 2, "tp": 2}, {"hardware": "dgx-a100", "recompute": "full"}),
        ("bert", {"dp": 2, "tp": 2}, {"vocabulary": 131, "heads": 6, "hidden": 36}),
        pytest.param("gpt", {"tp": 8}, {"vocabulary": 131}, marks=broad),
        pytest.param("bert", {"dp": 2, "tp": 4}, {"vocabulary": 131}, marks=broad),
        pytest.param("gpt", {"dp": 2, "tp": 3}, {"vocabulary": 131, "batch": 3}, marks=broad),
        pytest.param("gpt", {"dp": 3, "tp": 2}, {"hardware": "dgx-a100"}, marks=broad),
        pytest.param("hf-llama", {"dp": 2, "tp": 4}, {"hardware": "dgx-h100"}, marks=broad),
        pytest.param("hf-gpt2", {"dp": 2, "tp": 2}, {"recompute": "selective"}, marks=broad),
        pytest.param("hf-bert", {"dp": 2, "tp": 2}, {"recompute": "full"}, marks=broad),
        pytest.param("gpt", {"outer": 2, "dp": 2, "tp": 2}, {}, marks=broad),
    ],
    ids=str,
)
def test_as_planned_freely(name: str, mesh: dict[str, int], options: dict[str, Any]) -> None:
    """A vocabulary of 131 on 8 ranks, 6 heads on 4, a batch of 3 on 2."""
    error, plan = largest_error(name, mesh=Mesh(**mesh), **options)
    assert error < TOLERANCE
    assert any(op.flops < op.whole_flops for op in plan.ops)


@pytest.mark.parametrize(
    ("share", "recompute"),
    [
        (0.6, "auto"),
        pytest.param(0.97, "none", marks=broad),
        pytest.param(0.8, "auto", marks=broad),
        pytest.param(0.7, "auto", marks=broad),
        pytest.param(0.62, "full", marks=broad),
    ],
)
def test_in_a_limit(share: float, recompute: str) -> None:
    """Of shares of what a free plan takes. The plan says that it fits."""
    options = {"mesh": Mesh(dp=2, tp=2), "optimizer": "mixed_adam", "recompute": recompute}
    _, free = largest_error("gpt", **{**options, "recompute": "none", "memory_limit": 2**40})
    limit = int(share * sum(size for _, size in free.memory))
    error, plan = largest_error("gpt", memory_limit=limit, **options)
    assert error < TOLERANCE
    assert plan.memory_limit == limit
    assert sum(size for _, size in plan.memory) <= limit
    assert plan.cost >= free.cost * (1 - 1e-9)


@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=broad)])
def test_on_the_mesh_that_is_found(name: str) -> None:
    """mesh="auto" tries all arrangements and returns the fastest plan."""
    error, plan = largest_error(name, world_size=4, mesh="auto")
    assert error < TOLERANCE
    assert plan.world_size == 4
