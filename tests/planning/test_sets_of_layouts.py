"""Sets of layouts of one value that a plan has, and other networks of the same model lack."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pipeline_models import VOCABULARY, Language

import autoparallel
from autoparallel.cost.hardware import Link, find_hardware, write_hardware
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.planning.alternatives import find_alternatives
from autoparallel.planning.plan_check import require_sound
from autoparallel.planning.solution_to_plan import layouts_together
from autoparallel.strategy.build_network import build_network

TOLERANCE = 1e-12


def model() -> Language:
    torch.manual_seed(3)
    return Language(1).double().eval()


def inputs() -> dict[str, torch.Tensor]:
    """Return rows that all axes divide, with labels that do not count, unevenly over the rows."""
    tokens = torch.randint(VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[0, :7] = labels[3] = -100
    return {"tokens": tokens, "labels": labels}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the file of hardware without latencies."""
    path: Path = tmp_path_factory.mktemp("hardware") / "prompt.json"
    known = find_hardware("dgx-a100")
    ring = partial(Link.ring, hop_seconds=0.0, floor_seconds=0.0)
    inside, network = ring(2e11), ring(2.5e10)
    write_hardware(replace(known, launch_seconds=0.0, inside=inside, network=network), path)
    return str(path)


def lacking(plan: Plan, hardware: str) -> list[str]:
    """Return the values of which a network has no state that is as the plan has them."""
    assert plan.captured is not None
    graph = with_larger_hints(plan.captured, plan.options.tokens)
    network = build_network(graph, plan.mesh, find_hardware(hardware), plan.options)
    starred = {name for name, _ in network.copy_variables}
    return [
        name
        for name, layouts in layouts_together(plan, graph).items()
        if f"{name}*" in starred
        and layouts not in [frozenset(group) for group in network.values[name].groups]
    ]


def test_stages_within_a_limit_that_plays_no_part(prompt: str) -> None:
    """Labels are counted whole, and read in parts of the batch and the sequence. Without a limit
    that is free, and no variable stands for it; with one there is one, which has not all sets.

    The plan is followed, also as text, with one process's loss and gradients, and questions about
    it are answered.
    """
    plan = autoparallel.make_plan(
        model(),
        mesh=Mesh(pp=2, dp=2, tp=2),
        example_inputs=inputs(),
        hardware=prompt,
        memory_limit=2**40,
        recompute="none",
        microbatches=2,
    )
    assert lacking(plan, prompt)
    plain = model()
    loss = plain(**inputs())["loss"]
    loss.backward()
    assert plan.captured is not None
    require_sound(replace(Plan.from_json(plan.to_json()), captured=plan.captured), plain)
    split = autoparallel.simulate(model(), plan=plan, example_inputs=inputs())
    torch.testing.assert_close(split.output["loss"], loss, rtol=TOLERANCE, atol=0)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            split.gradients[name], parameter.grad, rtol=TOLERANCE, atol=TOLERANCE, msg=name
        )
    assert find_alternatives(plan).ops
    assert "micro-batch" in str(autoparallel.explain(plan, "cross_entropy_loss_sum"))
