"""Pipelines that can be no shorter than a plan are not estimated, which no estimate contradicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from any_plans import network_of
from broad_cases import broad
from families import build, inputs_for

from autoparallel.capture.graph_breaks import trace
from autoparallel.cost.hardware import find_hardware
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.planning.least_pipeline import least_seconds, seconds_alone
from autoparallel.planning.pipeline_choices import in_parts
from autoparallel.planning.pipeline_estimates import Estimator
from autoparallel.planning.pipeline_meshes import best_mesh
from autoparallel.planning.schedule_figures import shares_of
from autoparallel.rules.lookup import find_rule
from autoparallel.train.models import GPT, GPTConfig

OPTIONS = Options(data_parallel=True, hardware="dgx-a100")


def captured_of() -> Any:
    """A deep GPT, traced."""
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=8, hidden=1024, heads=8, vocabulary=1000, positions=512))
    return trace(model, (), model.example_inputs(batch=64), known=find_rule)


@pytest.mark.parametrize("name", ["gpt", *broad("hf-llama", "hf-bert", "mlp")])
@pytest.mark.parametrize("mesh", [*broad(Mesh(tp=2)), Mesh(dp=2, tp=4)], ids=str)
def test_no_part_of_an_op_takes_less_than_its_share(name: str, mesh: Mesh) -> None:
    """Whatever is split, and on devices that are all the same."""
    options: dict[str, Any] = {"hardware": "dgx-a100", "data_parallel": True}
    model, inputs = build(name, 2), inputs_for(name, batch=8, sequence=16)
    _, network = network_of(model, inputs, mesh, **options)
    _, alone = network_of(model, inputs, Mesh(tp=1), **options)
    slowest = find_hardware("dgx-a100").slowest(mesh.world_size)
    for op, (whole,) in alone.costs.items():
        least = min(cost.seconds for cost in network.costs[op])
        assert least * mesh.world_size >= whole.seconds * slowest * (1 - 1e-9), op


def test_no_estimate_is_below_the_least() -> None:
    """For few and many micro-batches, and few and many stages on each rank."""
    captured = in_parts(captured_of())
    alone = seconds_alone(captured.graph, OPTIONS)
    shares = []
    for ranks, inside, each in ((2, Mesh(tp=4), 1), (2, Mesh(dp=2), 4), (4, Mesh(dp=2), 2)):
        asked = replace(OPTIONS, stages_per_rank=each)
        estimator = Estimator(captured, asked)
        for count in (4, 16):
            found = estimator.estimate(inside, shares_of(ranks, count, asked), count)
            least = least_seconds(alone, asked, ranks, inside, count)
            assert found is not None
            shares.append(least / found.seconds)
    # It would be no use if it were little.
    assert 0.7 < max(shares) <= 1.0


def test_pipelines_that_can_be_no_shorter_are_not_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is any network made for them."""
    captured = captured_of()
    world_size = 16
    least = least_seconds(seconds_alone(captured.graph, OPTIONS), OPTIONS, 1, Mesh(dp=16), 1)
    estimated: list[Mesh] = []

    def noted(_: Estimator, of: Any) -> None:
        estimated.append(of.inside)

    monkeypatch.setattr(Estimator, "_estimated", noted)
    assert best_mesh(captured, world_size, OPTIONS, least) is None
    assert not estimated
    assert best_mesh(captured, world_size, OPTIONS, 2 * least) is None
    assert estimated


def test_nothing_is_told_where_caches_make_small_parts_quick() -> None:
    """A part that lies in a cache takes less than its share of what does not."""
    captured = captured_of()
    found = find_hardware("dgx-a100")
    assert seconds_alone(captured.graph, OPTIONS) > 0.0
    with pytest.MonkeyPatch.context() as patched:
        quick = replace(found, memory_by_size=((2**20, 1e13),))
        patched.setattr("autoparallel.planning.least_pipeline.find_hardware", lambda _: quick)
        assert seconds_alone(captured.graph, OPTIONS) == 0.0
