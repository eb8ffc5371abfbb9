"""Exports of plans with stages: to programs with pipelines of their own, or refused in words."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
import torch

from autoparallel import Mesh, make_plan
from autoparallel.errors import PlanError
from autoparallel.exports.launch_settings import megatron_arguments, torchtitan_toml
from autoparallel.exports.targets import TARGETS, export
from autoparallel.plan import Plan
from autoparallel.train.models import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_trace")


@pytest.fixture(scope="module")
def planned() -> tuple[GPT, Plan]:
    """Return a model on two ranks of two stages each, with data and tensor parallelism."""
    with torch.device("meta"):
        model = GPT(GPTConfig(4, 1024, 8, 512, 256, 0.0))
    plan = make_plan(
        model,
        mesh=Mesh(pp=2, dp=2, tp=2),
        example_inputs=model.example_inputs(8, 256),
        microbatches=2,
        stages_per_rank=2,
        hardware="dgx-a100",
        data_parallel=False,
    )
    return model, plan


def test_megatron_is_told_of_stages(planned: tuple[GPT, Plan]) -> None:
    _, plan = planned
    # Without data parallelism, products are split on both axes, of which Megatron has one.
    result = megatron_arguments(plan)
    lines = result.text.splitlines()
    assert "--pipeline-model-parallel-size 2" in lines
    assert "--num-virtual-stages-per-pipeline-rank 2" in lines
    assert any("--micro-batch-size" in line and "2 micro-batches" in line for line in lines)
    assert any("ops at which stages start" in sentence for sentence in result.missing)
    assert not any("schedule" in sentence for sentence in result.missing)
    assert plan.pipeline is not None
    other = replace(plan, pipeline=replace(plan.pipeline, schedule="gpipe"))
    assert any("gpipe" in sentence for sentence in megatron_arguments(other).missing)


def test_micro_batches_are_no_axis_of_ranks(planned: tuple[GPT, Plan]) -> None:
    """The settings name as many ranks as there are."""
    _, plan = planned
    table = tomllib.loads(torchtitan_toml(plan).text)["parallelism"]
    degrees = [size for name, size in table.items() if name.endswith("_degree")]
    assert torch.tensor(degrees).prod() == plan.world_size == 8
    assert table["pipeline_parallel_degree"] == 2


def test_torchtitan_is_told_the_schedule(planned: tuple[GPT, Plan]) -> None:
    """By the name that torch gives its class, which torchtitan asks torch for."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    _, plan = planned
    name = tomllib.loads(torchtitan_toml(plan).text)["parallelism"]["pipeline_parallel_schedule"]
    assert get_schedule_class(name).__name__ == "ScheduleInterleaved1F1B"


@pytest.mark.parametrize("target", [name for name in TARGETS if name[0:4] not in ("mega", "torc")])
def test_others_are_refused_in_words(target: str, planned: tuple[GPT, Plan]) -> None:
    model, plan = planned
    with pytest.raises(PlanError, match="not told of a plan with stages") as refused:
        export(plan, target, model, example_inputs=model.example_inputs(8, 256))
    text = str(refused.value)
    assert "emitted_program" in text if target == "python" else "'megatron'" in text
    assert "pp" in text
