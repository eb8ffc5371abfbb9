"""Initial weights are one device's bit for bit, at every world size and under every plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, inputs_for
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import state_of
from autoparallel.placement import Invariant, Shard
from autoparallel.plan import Plan
from autoparallel.runtime.axis_parts import join_parts
from autoparallel.runtime.ranks import thread_ranks
from autoparallel.support.module_copy import on_meta

SEED = 21


def of_one_device(name: str, meta: nn.Module) -> dict[str, torch.Tensor]:
    """What the model's own initializer gives: as it is built, or run over an empty one."""
    torch.manual_seed(SEED)
    if name == "gpt":
        return type(meta)(meta.config).state_dict()
    real = type(meta)(meta.config)
    torch.manual_seed(SEED)
    real.apply(real._init_weights)
    return real.state_dict()


def never_again(*_: Any) -> Plan:
    raise AssertionError("planned again")


CASES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "gpt": [(2, {"sequence_parallel": False}), (4, {"data_parallel": True}), (8, {})],
    "hf-gpt2": [(1, {}), (2, {})],
}


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_meta_model_are_those_of_one_device(name: str) -> None:
    """Fused weights in blocks, tied ones, unequal parts; joined from every rank."""
    sizes = {"hidden": 40, "heads": 10} if name == "gpt" else {}
    real = build(name, layers=1, **sizes).float()
    model, inputs = on_meta(real), inputs_for(name)
    expected = of_one_device(name, real)
    cases = CASES[name]
    if name == "gpt":
        kept = {path: Invariant() for path, _ in real.named_parameters() if "attention" in path}
        cases = [*cases, (8, {"pins": kept})]
    split = set()
    for world_size, options in cases:
        plan = autoparallel.make_plan(model, world_size, example_inputs=inputs, **options)
        parts = []
        for ranks in thread_ranks(plan.mesh):
            torch.manual_seed(SEED)
            made = parallel_module(model, plan, ranks, None, never_again, 0)
            parts.append(made.state_dict())
        layouts = state_of(made).layouts
        assert set(parts[0]) == set(expected)
        for path, whole in expected.items():
            (placement,) = layouts.get(path, (Invariant(),))
            own = [part[path] for part in parts]
            if isinstance(placement, Shard):
                split.add((placement.blocks > 1, len({tuple(part.shape) for part in own}) > 1))
                own = [join_parts(own, placement)]
            assert all(torch.equal(part, whole) for part in own), (world_size, options, path)
    # Blocks in unequal parts are what no DTensor can say; the user has plain parts there.
    assert name != "gpt" or (False, True) in split
    assert (True, False) in split
    assert (True, True) not in split


def start_apart(rank: int) -> list[str]:
    """Ranks that were seeded differently, with real weights and without."""
    found = []
    for meta in (False, True):
        torch.manual_seed(rank)
        with torch.device("meta" if meta else "cpu"):
            model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        try:
            autoparallel.autoparallelize(model, 2, example_inputs=torch.ones(4, 8))
        except AutoParallelError as error:
            found.append(error.what)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    try:
        autoparallel.autoparallelize(
            model, 2, example_inputs=torch.ones(4, 8), sequence_parallel=rank == 0
        )
    except AutoParallelError as error:
        found.append(error.what)
    return found


def test_ranks_that_start_apart_are_told() -> None:
    """Before anything is computed, on every rank, and what it is about: weights, seeds, plans."""
    for found in run_processes(start_apart, 2):
        assert found == [
            "the ranks start from different models: 0.weight, 0.bias, 2.weight",
            "the ranks start from different models: torch's random state",
            "the ranks have made different plans",
        ]
