"""Whole models on 64 GPUs in three limits each: proven to be within a hundredth of the best."""

from __future__ import annotations

import pytest
import torch

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.train.models import GPT, GPTConfig

pytestmark = pytest.mark.broad
MODELS = {"gpt2-xl": GPTConfig.gpt2_xl, "gpt3": GPTConfig.gpt3}


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *(("gpt2-xl", limit) for limit in ("20GiB", "8GiB", "6GiB")),
        *(("gpt3", limit) for limit in ("76GiB", "66GiB", "60GiB")),
    ],
)
def test_the_gap_is_below_one_percent(name: str, limit: str) -> None:
    """A batch of 64 sequences as long as the model takes, Adam with a master copy."""
    with torch.device("meta"):
        model = GPT(MODELS[name]()).to(torch.bfloat16)
        inputs = model.example_inputs(batch=64)
    plan = autoparallel.make_plan(
        model,
        mesh=Mesh(dp=8, tp=8),
        example_inputs=inputs,
        optimizer="mixed_adam",
        hardware="dgx-a100",
        memory_limit=limit,
    )
    assert plan.memory_limit is not None
    assert sum(size for _, size in plan.memory) <= plan.memory_limit
    assert plan.lower_bound <= plan.cost * (1 + 1e-12)
    assert plan.cost <= 1.01 * plan.lower_bound
