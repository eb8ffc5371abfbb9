"""The synchronizations that threads predict are those that the emitted module makes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from broad_cases import share_of

import autoparallel
from autoparallel.analysis.communication import transfers
from autoparallel.analysis.synchronization import Cause
from autoparallel.analysis.thread_splits import thread_splits
from autoparallel.parallel.simulate import simulate_plan
from autoparallel.placement import Partial, Shard
from autoparallel.plan import Plan
from autoparallel.train.models import GPT, GPTConfig

IN_THE_SUITE = ("gpt2", "mlp-mixer", "gru")
FAMILIES = [
    name if name in IN_THE_SUITE else pytest.param(name, marks=pytest.mark.broad)
    for name in zoo.FAMILIES
]


def plan_of(name: str) -> Plan:
    return autoparallel.make_plan(zoo.build(name, 2), 2, example_inputs=zoo.inputs_for(name))


@pytest.mark.parametrize("name", share_of(FAMILIES, 2))
def test_what_runs_is_what_threads_predict(name: str) -> None:
    """Forward and backward on two ranks make so many collectives of each kind, also in kernels."""
    plan = plan_of(name)
    simulation = simulate_plan(zoo.build(name, 2), plan, (), zoo.inputs_for(name))
    synchronizations = thread_splits(plan).synchronizations
    predicted = Counter(one.collective.value for one in synchronizations if not one.together)
    # What can go together is one call.
    predicted["all_reduce"] += any(one.together for one in synchronizations)
    assert +predicted == Counter(simulation.collectives)


@pytest.mark.parametrize("name", share_of(FAMILIES, 2))
def test_each_collective_has_its_cause(name: str) -> None:
    """Value by value, on each axis of two, with data parallelism: none is missing or too many."""
    mesh = autoparallel.Mesh(dp=2, tp=2)
    plan = autoparallel.make_plan(
        zoo.build(name, 2), mesh=mesh, example_inputs=zoo.inputs_for(name)
    )
    require_equal(plan)


def test_heads_that_several_ranks_share() -> None:
    """Four heads of keys on eight ranks: two ranks hold each, and add up its gradient."""
    plan = autoparallel.make_plan(zoo.build("llama", 1), 8, example_inputs=zoo.inputs_for("llama"))
    assert any("repeat" in str(op.results) for op in plan.ops)
    require_equal(plan)


def require_equal(plan: Plan) -> None:
    """The synchronizations that threads predict are the plan's, with a reason each."""
    splits = thread_splits(plan)
    predicted = Counter(
        (one.value, one.axis, one.phase, one.collective)
        for one in splits.synchronizations
        if one.cause is not Cause.KERNEL
    )
    planned = Counter(
        (one.conversion.value, one.step.axis, one.phase, one.collective)
        for one in transfers(plan)
        if not one.again
    )
    assert predicted == planned
    assert all(splits.sentence(one) for one in splits.synchronizations)


def test_how_tensors_lie_follows_from_the_split_loop() -> None:
    """What the plan says of every operand and result is what its op's loop makes of them."""
    plan = plan_of("gpt2")
    splits = thread_splits(plan)
    for op in plan.ops:
        states = (*splits.read[op.name], *(splits.made[value] for value in op.makes))
        for layout, (state,) in zip((*op.operands, *op.results), states, strict=True):
            dim = layout[0].dim if isinstance(layout[0], Shard) else None
            assert getattr(state, "dim", None) == dim
            assert isinstance(state, Partial) == isinstance(layout[0], Partial)


def test_megatrons_partition_in_a_sentence_each() -> None:
    """Without sequence parallelism: two sums in each layer, of heads and of the feed-forward."""
    config = GPTConfig(layers=1, hidden=48, heads=4, vocabulary=210, positions=32, dropout=0.0)
    tokens = torch.zeros(3, 10, dtype=torch.long)
    plan = autoparallel.make_plan(
        GPT(config), 2, example_inputs=(tokens, tokens), sequence_parallel=False
    )
    splits = thread_splits(plan)
    forward = [
        splits.sentence(one).partition(": ")[2]
        for one in splits.synchronizations
        if one.phase == "forward"
    ]
    ends = "ends in a sum, of which each rank has a term"
    assert forward[-2:] == [f"heads {ends}", f"feed-forward {ends}"]
    backward = [
        splits.sentence(one).partition(": ")[2]
        for one in splits.synchronizations
        if one.phase == "backward"
    ]
    used = "each rank has used it for its part of"
    assert [line for line in backward if "heads" in line] == [f"{used} heads alone"]
    assert [line for line in backward if "feed" in line] == [f"{used} feed-forward alone"]
