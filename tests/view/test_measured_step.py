"""A measured step has the ops and collectives of the predicted one, by name, on the same tracks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel import Mesh
from autoparallel.analysis.training_step import COMMUNICATION, COMPUTE
from autoparallel.errors import AutoParallelError
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.measured_step import MeasuredStep, measure_step
from autoparallel.view.measured_text import measured_rows, measured_text
from autoparallel.view.trace import trace_json

MESHES = (Mesh(tp=2), Mesh(dp=2))


def model_and_inputs() -> tuple[GPT, dict[str, torch.Tensor]]:
    """A small GPT that is split by columns and rows, where it is to be."""
    model = GPT(GPTConfig(1, hidden=256, heads=4, vocabulary=1000, positions=64, dropout=0.0))
    return model, model.example_inputs(8, 64)


def measured_on(rank: int, folder: str) -> list[MeasuredStep]:
    """A step of a small GPT on either mesh, with an update."""
    steps = []
    for place, mesh in enumerate(MESHES):
        torch.manual_seed(0)
        model, inputs = model_and_inputs()
        plan = autoparallel.make_plan(
            model,
            mesh=mesh,
            example_inputs=inputs,
            hardware="dgx-a100",
            data_parallel=mesh != MESHES[0],
        )
        split = autoparallel.apply_plan(model, plan)
        optimizer = torch.optim.SGD(split.parameters(), lr=1e-3)

        def step(split=split, optimizer=optimizer, inputs=inputs) -> None:  # type: ignore[no-untyped-def]
            split(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps.append(measure_step(step, warmups=1))
        if rank == 0:
            (Path(folder) / f"{place}.json").write_text(plan.to_json())
    return steps


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[autoparallel.Plan, MeasuredStep]]:
    """Plans, traced, and what two processes measured of them."""
    folder = tmp_path_factory.mktemp("measured")
    steps = run_processes(measured_on, 2, str(folder))[0]
    plans = []
    for place in range(len(MESHES)):
        model, inputs = model_and_inputs()
        plan = autoparallel.Plan.from_json((folder / f"{place}.json").read_text())
        plans.append(autoparallel.traced_plan(model, plan, example_inputs=inputs))
    return list(zip(plans, steps, strict=True))


@pytest.mark.parametrize("place", [0, 1], ids=map(str, MESHES))
def test_the_same_collectives_by_the_same_names(
    place: int, measured: list[tuple[autoparallel.Plan, MeasuredStep]]
) -> None:
    """Each redistribution of the plan, in its pass, as often as predicted; none besides."""
    plan, step = measured[place]
    predicted = autoparallel.timeline(plan, as_given=True)
    outside = ("gradients", "what the program does not tell")

    def told(events: object) -> Counter[tuple[str, str]]:
        return Counter(
            (event.phase, event.name)
            for event in events  # type: ignore[attr-defined]
            if event.stream == COMMUNICATION
            and not event.name.endswith(outside)
            # What an op communicates by itself counts as its computing in a prediction.
            and " inside of " not in event.name
            and "gradients on" not in event.name
        )

    assert told(step.named_like(predicted.events)) == told(predicted.events)
    assert sum(told(predicted.events).values()) >= (10 if plan.mesh == Mesh(tp=2) else 0)
    # Gradients are summed in buckets, in the backward pass.
    sums = [event for event in step.events if event.name == "all-reduce of gradients"]
    assert all(event.phase == "backward" for event in sums)
    assert sums


@pytest.mark.parametrize("place", [0, 1], ids=map(str, MESHES))
def test_every_op_is_found_in_both_passes(
    place: int, measured: list[tuple[autoparallel.Plan, MeasuredStep]]
) -> None:
    """Each product forward, backward and for its weight; a line has a product with its bias."""
    plan, step = measured[place]
    found = {(event.phase, event.name) for event in step.events if event.stream == COMPUTE}
    predicted = autoparallel.timeline(plan, as_given=True)
    rows = {name: (one, other) for name, one, other in measured_rows(plan, predicted, step)}
    for op in plan.ops:
        name = op.name if ("forward", op.name) in found else op.name.removesuffix("_product")
        if op.whole_flops:
            assert ("forward", name) in found
            assert {("backward", name), ("backward", f"{name} (weight)")} & found
            assert all(rows[name])
    assert ("update", "optimizer") in found
    assert step.seconds > 0
    assert all(0 <= event.start <= event.end <= step.seconds * (1 + 1e-9) for event in step.events)
    text = measured_text(plan, predicted, step)
    assert "computing, backward" in text
    assert "furthest apart" in text


def test_both_are_in_one_trace(
    measured: list[tuple[autoparallel.Plan, MeasuredStep]],
) -> None:
    """Two processes, with the same two tracks each."""
    plan, step = measured[0]
    predicted = autoparallel.timeline(plan, as_given=True)
    rows = json.loads(trace_json(predicted, step))["traceEvents"]
    names = {
        (row["name"], row["pid"], row["tid"]): row["args"]["name"]
        for row in rows
        if row["ph"] == "M"
    }
    assert names["process_name", 0, 0] == "predicted"
    assert names["process_name", 1, 0] == "measured on cpu"
    assert [names["thread_name", 1, tid] for tid in (0, 1)] == [COMPUTE, COMMUNICATION]
    for pid, events in ((0, predicted.events), (1, step.events)):
        assert sum(row["ph"] == "X" and row["pid"] == pid for row in rows) == len(events)


def test_without_a_split_module_there_is_nothing_to_tell() -> None:
    """It is refused, and Python's tracing is as it was."""
    layer = nn.Linear(4, 4)
    with pytest.raises(AutoParallelError, match="no program of a split module ran"):
        measure_step(lambda: layer(torch.ones(2, 4)), warmups=0)
