"""Every family of models: loss and all gradients equal the unsplit module's, in training.

Without dropout, the unsplit module is the user's own; with dropout, it is ours on one rank, which
draws the same masks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import zoo
from broad_cases import one_of_each, share_of
from families import Float64, relative_error, worst_gradient

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.plan import Plan
from autoparallel.planning.search import search

TOLERANCE = 1e-9
WORLD_SIZES = (3, 8, 2, 4)
DROPOUT = 0.1
# From three equal layers on, some are not traced but copied.
LAYERS = 3
# Recurrences and scans that are unrolled over time make wide networks, which take long to plan.
FEWER_LAYERS = {"rwkv": 2, "mamba": 1}
# Where four layers take minutes to plan on two axes.
LAYERS_EVERYWHERE = {"rwkv": 2}
NAMES = list(zoo.FAMILIES)
DROPPING = [name for name in NAMES if zoo.FAMILIES[name].drops]

Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def loss_of(output: Any) -> torch.Tensor:
    loss: torch.Tensor = output["loss"] if isinstance(output, dict) else output.loss
    return loss.detach()


@cache
def traced(name: str, dropout: float, layers: int) -> Plan:
    """The plan for one rank, whose graph is that of all."""
    with Float64():
        model = zoo.build(name, layers, dropout)
        return autoparallel.make_plan(model, 1, example_inputs=zoo.inputs_for(name))


def run(name: str, ranks: int | Mesh, dropout: float, layers: int) -> Result:
    """Loss and gradients on that many simulated ranks, or on those of a mesh, put together."""
    plan = traced(name, dropout, layers)
    assert plan.captured is not None
    if ranks != 1:
        mesh = Mesh(tp=ranks) if isinstance(ranks, int) else ranks
        plan = search(plan.captured, plan.model, mesh, Options())
    with Float64():
        model, inputs = zoo.build(name, layers, dropout), zoo.inputs_for(name)
    made = autoparallel.simulate(model, example_inputs=inputs, plan=plan)
    return loss_of(made.output), dict(made.gradients)


def run_unsplit(name: str, layers: int) -> Result:
    """Loss and gradients of the user's own module."""
    with Float64():
        model = zoo.build_reference(name, layers)
        output = model(**zoo.inputs_for(name))
        (output["loss"] if isinstance(output, dict) else output.loss).backward()
    named = model.named_parameters(remove_duplicate=False)
    return loss_of(output), {path: p.grad for path, p in named if p.grad is not None}


def compare(actual: Result, expected: Result) -> None:
    assert relative_error(actual[0], expected[0]) < TOLERANCE
    error, where = worst_gradient(actual[1], expected[1])
    assert error < TOLERANCE, where


def each_once(names: list[str], first: int) -> list[tuple[str, int]]:
    """The names with world sizes in turn."""
    return [(name, WORLD_SIZES[(i + first) % 4]) for i, name in enumerate(names)]


# One of each kind is run by `make test`, as each costs another trace: experts, an encoder and a
# decoder, images, a recurrence, a scan. GPT-2 and Llama are in tests/end_to_end/test_parity.py.
KEPT = ["deepseek-v3", "t5", "u-net", "lstm", "mamba"]
WITHOUT_DROPOUT = one_of_each(each_once(NAMES, 0), lambda row: row[0] in KEPT)
TWO_AXES = Mesh(dp=2, tp=2)
EVERYWHERE = [(name, ranks) for name in NAMES for ranks in (*sorted(WORLD_SIZES), TWO_AXES)]
# One of each kind, as each costs another trace: fused and separate attention, experts, an encoder
# and a decoder, images, a recurrence. tests/runtime/test_rng.py shows op by op that masks do not
# depend on the plan.
KINDS = ["gpt2", "deepseek-v3", "bart", "vit", "lstm"]
WITH_DROPOUT = each_once(KINDS, 1)


@pytest.mark.parametrize(("name", "world_size"), WITHOUT_DROPOUT)
def test_split_equals_the_users_module(name: str, world_size: int) -> None:
    layers = FEWER_LAYERS.get(name, LAYERS)
    compare(run(name, world_size, 0.0, layers), run_unsplit(name, layers))


@pytest.mark.parametrize(("name", "world_size"), share_of(WITH_DROPOUT, 5))
def test_dropout_does_not_depend_on_the_plan(name: str, world_size: int) -> None:
    compare(run(name, world_size, DROPOUT, LAYERS), run(name, 1, DROPOUT, LAYERS))


@pytest.mark.broad
@pytest.mark.parametrize(("name", "ranks"), EVERYWHERE, ids=str)
def test_split_equals_the_users_module_everywhere(name: str, ranks: int | Mesh) -> None:
    layers = LAYERS_EVERYWHERE.get(name, zoo.LAYERS)
    compare(run(name, ranks, 0.0, layers), run_unsplit(name, layers))


@pytest.mark.broad
@pytest.mark.parametrize(
    ("name", "ranks"), [row for row in EVERYWHERE if row[0] in DROPPING], ids=str
)
def test_dropout_does_not_depend_on_the_plan_anywhere(name: str, ranks: int | Mesh) -> None:
    layers = LAYERS_EVERYWHERE.get(name, zoo.LAYERS)
    compare(run(name, ranks, DROPOUT, layers), run(name, 1, DROPOUT, layers))
