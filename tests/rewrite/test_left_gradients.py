"""The gaps to which products leave the gradients of their weights, with and without memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families import build, inputs_for

import autoparallel
from autoparallel.analysis.memory import memory_of
from autoparallel.plan import Plan
from autoparallel.rewrite.gaps import find_gaps
from autoparallel.view.report import plan_text

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
