"""Copies that are gathered for a product and not kept: gathered again, so that stages fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import autoparallel
from autoparallel.cost.hardware import find_hardware, write_hardware
from autoparallel.cost.links import Link
from autoparallel.mesh import Mesh
from autoparallel.train.models import GPT, GPTConfig

BLOCKS, BATCHES = 4, 4
# Bytes of a rank: one of these has room for copies of what is split over the sequence.
ROOMY, TIGHT = 2_000_000, 1_690_000


def gpt() -> Any:
    torch.manual_seed(2)
    return GPT(GPTConfig(BLOCKS, 64, 4, 32, 32)).double()


def quick(path: Path) -> str:
    """A machine on which nothing takes time to start: sequences of a small model are worth their
    split.
    """
    machine = find_hardware("dgx-a100")

    def at_once(link: Link) -> Link:
        regimes = (replace(each, hop_seconds=0.0, floor_seconds=0.0) for each in link.regimes)
        return Link(tuple(regimes))

    inside, network = at_once(machine.inside), at_once(machine.network)
    write_hardware(replace(machine, launch_seconds=0.0, inside=inside, network=network), path)
    return str(path)


def test_stages_gather_again_before_they_recompute(tmp_path: Path) -> None:
    """Where products save too much, copies of norms are gathered again, and no block is run again
    as a whole; loss and gradients are those of one process.
    """
    inputs = gpt().example_inputs(batch=8, sequence=32)
    options: dict[str, Any] = {
        "mesh": Mesh(pp=2, dp=2, tp=2),
        "example_inputs": inputs,
        "microbatches": BATCHES,
        "data_parallel": True,
        "hardware": quick(tmp_path / "quick.json"),
        "recompute": "selective",
    }
    plans = [
        autoparallel.make_plan(gpt(), memory_limit=limit, **options) for limit in (ROOMY, TIGHT)
    ]
    again = [[row.value for row in plan.conversions if row.again] for plan in plans]
    assert not again[0]
    assert again[1]
    assert not any(plans[1].captured.graph.producers[name].kind == "parameter" for name in again[1])
    assert max(plans[1].pipeline.memory) <= TIGHT < max(plans[0].pipeline.memory)
    assert plans[0].step < plans[1].step < 1.1 * plans[0].step

    split = autoparallel.simulate(gpt(), example_inputs=inputs, plan=plans[1])
    assert split.apart < 1e-11
    whole = autoparallel.simulate(gpt(), 1, example_inputs=inputs)
    for path, gradient in whole.gradients.items():
        torch.testing.assert_close(split.gradients[path], gradient, rtol=1e-11, atol=1e-11)
