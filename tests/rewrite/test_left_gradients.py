"""The gaps to which products leave the gradients of their weights, with and without memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from any_plans import network_of
from families import build, inputs_for
from torch import nn

import autoparallel
from autoparallel.analysis.abstract_execution import AbstractExecution
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.memory_account import Account
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.planning import closest_plan
from autoparallel.rewrite.gaps import find_gaps
from autoparallel.view.report import plan_text
from planners import exact

INPUTS = inputs_for("gpt", batch=8, sequence=16)


def planned(**options: Any) -> Plan:
    return autoparallel.make_plan(
        build("gpt", 2),
        2,
        example_inputs=INPUTS,
        sequence_parallel=False,
        constraints=["megatron on tp"],
        **options,
    )


@cache
def recomputed() -> Plan:
    """A plan whose most memory is taken while a block goes back."""
    return planned(recompute="full", memory_limit="1GiB")


def operands_gap(plan: Plan, name: str) -> int:
    """Return the gap of the redistribution of a product's first operand; 0 where it is none."""
    (op,) = (op for op in plan.ops if op.name == name)
    known = {(each.value, each.target): each for each in plan.conversions}
    moved = known.get((op.reads[0], op.operands[0]))
    return 0 if moved is None else find_gaps(plan).conversions.get((moved.value, moved.steps), 0)


def test_without_memory_a_gradient_waits_for_its_own_operand_alone() -> None:
    """So that nothing is kept longer than the product's own backward pass."""
    plan = recomputed()
    less = replace(plan, fills_gaps=False)
    everywhere, own = find_gaps(plan).products, find_gaps(less).products
    assert {name: operands_gap(less, name) for name in own} == own
    assert 0 < len(own) < len(everywhere)
    assert memory_of(less).temporary < memory_of(plan).temporary


@pytest.mark.parametrize("fills_gaps", [True, False])
def test_gradients_are_the_models(fills_gaps: bool) -> None:
    """In float64, wherever those of weights are computed; and the plan's text says where."""
    plan = replace(recomputed(), fills_gaps=fills_gaps)
    assert Plan.from_json(plan.to_json()).fills_gaps == fills_gaps
    model = build("gpt", 2).double()
    made = autoparallel.simulate(model, plan=plan, example_inputs=INPUTS)
    loss = model(**INPUTS).loss
    loss.backward()
    assert torch.allclose(made.output.loss, loss, rtol=1e-13)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(made.gradients[name], parameter.grad, rtol=1e-11, atol=1e-13), name


def test_a_limit_takes_back_what_gaps_keep() -> None:
    """Where a plan fits without, that is what gives way."""
    taken = sum(size for _, size in recomputed().memory)
    assert planned(recompute="full", memory_limit=taken).fills_gaps
    within = planned(recompute="full", memory_limit=taken - 1)
    assert not within.fills_gaps
    assert sum(size for _, size in within.memory) < taken
    for plan in (recomputed(), within):
        assert ("for want" in plan_text(plan)) != plan.fills_gaps


def test_what_hides_collectives_is_added_where_there_is_room() -> None:
    """To the plan of any solution, before plans of shorter steps are looked for."""
    options: dict[str, Any] = {"memory_limit": 10**12, "recompute": "full", "tokens": 1}
    captured, network = network_of(build("gpt", 2), INPUTS, Mesh(tp=2), **options)
    solution = exact.solve(network.problem())

    def judge(plan: Plan) -> Account:
        """Return an account by which gaps keep a thousand bytes."""
        account = memory_of(plan, graph=network.graph)
        return replace(account, temporary=1000 if plan.fills_gaps else 0)

    roomy, account = closest_plan._read(captured, "", network, solution, judge)
    assert roomy.fills_gaps
    network.options = replace(network.options, memory_limit=account.total - 1)
    less, smaller = closest_plan._read(captured, "", network, solution, judge)
    assert not less.fills_gaps
    assert smaller.total == account.total - 1000


def test_a_gradient_that_is_summed_in_place_is_counted_once() -> None:
    """That of what a column-parallel product reads, if its node alone holds it."""
    model = nn.Sequential(nn.Linear(8, 4096), nn.Linear(4096, 8, bias=False))
    plan = autoparallel.make_plan(
        model,
        2,
        example_inputs=torch.ones(64, 8),
        hardware="cpu",
        memory_limit="1GiB",
        sequence_parallel=False,
        constraints=["0.weight is whole", "0.bias is whole", "1.weight is split 0"],
    )
    assert plan.captured is not None
    walk = AbstractExecution(plan.captured.graph, plan)
    live = Liveness(walk)
    (at,) = (i for i, moment in enumerate(walk.moments) if moment.node == plan.ops[-1].name)
    (moved,) = (
        i
        for i, m in enumerate(walk.moments)
        if not m.node and m.makes == walk.moments[at].reads[:1]
    )
    # What the first product makes is saved, its gradient is summed; the result is small.
    wide = 64 * 4096 * 4
    assert 2 * wide <= live.backward[moved] < 2.1 * wide


def test_a_gradient_that_does_not_move_is_counted_once() -> None:
    """That of a sum over the ranks is that of what was summed."""
    plan = autoparallel.make_plan(
        nn.Sequential(nn.Linear(64, 4096, bias=False), nn.ReLU()),
        2,
        example_inputs=torch.ones(64, 64),
        hardware="cpu",
        memory_limit="1GiB",
        sequence_parallel=False,
        constraints=["0.weight is split 1"],
    )
    assert plan.captured is not None
    walk = AbstractExecution(plan.captured.graph, plan)
    (moved,) = (
        at
        for at, moment in enumerate(walk.moments)
        if not moment.node and walk.locals[moment.reads[0]].spec.shape == (64, 4096)
    )
    # What is returned, and the gradient of what it was made of.
    wide = 64 * 4096 * 4
    assert 2 * wide <= Liveness(walk).backward[moved] < 2.1 * wide
