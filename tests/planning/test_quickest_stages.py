"""Of stages that cannot take equally long, the shorter ones lie where a step is shortest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.analysis.pipeline_step import link_of_stages, passes_of, step_of
from autoparallel.cost.hardware import find_hardware
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan


def planned(layers: int, **options: Any) -> Plan:
    """Equal layers, so that a stage takes as long as it has layers."""
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(layers)])
    return autoparallel.make_plan(
        model, example_inputs=torch.zeros(4096, 512), hardware="dgx-a100", **options
    )


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (11, {"mesh": Mesh(pp=3), "microbatches": 4, "schedule": "1f1b", "stages_per_rank": 2}),
        (7, {"mesh": Mesh(pp=4), "microbatches": 4, "schedule": "1f1b"}),
        (7, {"mesh": Mesh(pp=2), "microbatches": 4, "schedule": "zbv"}),
    ],
    ids=["interleaved", "one on each rank", "folded"],
)
def test_the_shorter_stage(layers: int, options: dict[str, Any]) -> None:
    """Whichever stage has fewer layers than the others, no step is shorter."""
    plan = planned(layers, **options)
    pipeline = plan.pipeline
    assert pipeline is not None
    link = link_of_stages(plan, pipeline.ranks, find_hardware("dgx-a100"))
    told = pipeline.seconds, pipeline.forward_seconds, pipeline.weight_seconds
    rows = sorted(zip(*told, strict=True))
    steps = []
    for place in range(len(rows)):
        both, forward, weights = zip(*rows[1 : place + 1], rows[0], *rows[place + 1 :], strict=True)
        other = replace(pipeline, seconds=both, forward_seconds=forward, weight_seconds=weights)
        steps.append(step_of(other, passes_of(other, link))[0])
    assert plan.step <= min(steps) * 1.001
