"""Loss, logits and every gradient equal the unsplit model's, in float64 and in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from families import (
    FAMILIES,
    Float64,
    build,
    gradients_of,
    inputs_for,
    loss_and_logits,
    relative_error,
    worst_gradient,
)
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.parameters import whole_tensor
from autoparallel.plan import Plan
from autoparallel.planning.search import search

TOLERANCE = 1e-10


@pytest.mark.parametrize("name", share_of(FAMILIES, 3))
def test_eight_simulated_ranks(name: str) -> None:
    """Vocabulary 211 and a sequence of 10 do not divide by 8. Without sequence parallelism and with
    it, planned from one trace.
    """
    with Float64():
        model, inputs = build(name), inputs_for(name)
        loss, logits = loss_and_logits(model(**inputs))
        expected = gradients_of(model, inputs)
        whole = autoparallel.make_plan(model, 8, example_inputs=inputs, sequence_parallel=False)
        assert whole.captured is not None
        options = replace(whole.options, sequence_parallel=True)
        split = search(whole.captured, whole.model, whole.mesh, options)
        for plan in (whole, split):
            result = autoparallel.simulate(model, example_inputs=inputs, plan=plan)
            own_loss, own_logits = loss_and_logits(result.output)
            assert relative_error(own_loss, loss.detach()) < TOLERANCE
            assert relative_error(own_logits, logits.detach()) < TOLERANCE
            assert worst_gradient(dict(result.gradients), expected)[0] < TOLERANCE


@pytest.mark.parametrize("world_size", [*broad(2, 3), 5])
def test_head_counts_that_do_not_divide(world_size: int) -> None:
    """Six heads: parts of unequal size, or whole where there are too few."""
    model = build("gpt", hidden=36, heads=6)
    inputs = inputs_for("gpt")
    result = autoparallel.simulate(model, world_size, example_inputs=inputs)
    assert worst_gradient(dict(result.gradients), gradients_of(model, inputs))[0] < TOLERANCE


Errors = tuple[float, float, float, str]


@cache
def both_ways(name: str, world_size: int) -> tuple[nn.Module, tuple[Plan, Plan], Any]:
    """A family's model, its plans without sequence parallelism and with it, of one trace, and the
    unsplit model's loss, logits and gradients.
    """
    with Float64():
        model, inputs = build(name, layers=1), inputs_for(name)
        loss, logits = loss_and_logits(model(**inputs))
        expected = loss.detach(), logits.detach(), gradients_of(model, inputs)
        whole = autoparallel.make_plan(
            model, world_size, example_inputs=inputs, sequence_parallel=False
        )
        assert whole.captured is not None
        options = replace(whole.options, sequence_parallel=True)
        split = search(whole.captured, whole.model, whole.mesh, options)
    return model, (whole, split), expected


def plan_all(names: tuple[str, ...], world_size: int) -> None:
    for name in names:
        both_ways(name, world_size)


def errors_of(name: str, world_size: int) -> Iterator[Errors]:
    """Errors of both plans of a family on this process among the others."""
    model, plans, (loss, logits, expected) = both_ways(name, world_size)
    for plan in plans:
        with Float64():
            parallel, inputs = autoparallel.apply_plan(model, plan), inputs_for(name)
            own_loss, own_logits = loss_and_logits(parallel(**inputs))
            own_loss.backward()
            if hasattr(own_logits, "full_tensor"):
                own_logits = own_logits.full_tensor()
            state = state_of(parallel)
            own = {
                path: whole_tensor(p.grad, state.layouts[path], state.ranks)
                for path, p in parallel.named_parameters(remove_duplicate=False)
                if p.grad is not None
            }
        yield (
            relative_error(own_loss.detach(), loss),
            relative_error(own_logits.detach(), logits),
            *worst_gradient(own, expected),
        )


def compare_processes(
    rank: int, names: tuple[str, ...], world_size: int
) -> dict[tuple[str, bool], Errors]:
    """Errors of families on real gloo processes."""
    torch.set_num_threads(1)
    return {
        (name, bool(place)): errors
        for name in names
        for place, errors in enumerate(errors_of(name, world_size))
    }


@pytest.mark.parametrize(
    ("names", "world_size"),
    [(FAMILIES[1::2], 4), *broad((FAMILIES[::2], 4), (FAMILIES, 2))],
    ids=["some-4", "others-4", "all-2"],
)
def test_gloo_processes(names: tuple[str, ...], world_size: int) -> None:
    """Families with and without sequence parallelism, in one launch, planned before it."""
    cases = [(name, split) for name in names for split in (False, True)]
    before = partial(plan_all, names, world_size)
    for results in run_processes(
        compare_processes, world_size, names, world_size, timeout_seconds=400, before=before
    ):
        assert list(results) == cases
        for case, (loss, logits, gradient, where) in results.items():
            assert max(loss, logits, gradient) < TOLERANCE, (case, loss, logits, gradient, where)


def train_three_ways(rank: int) -> list[list[float]]:
    """Losses of 20 AdamW steps in float32: automatic, Megatron's layers, plain."""
    from megatron_rules.models import ParallelGPT

    torch.set_num_threads(1)
    world_size = torch.distributed.get_world_size()
    plain = build("gpt").float()
    inputs = inputs_for("gpt", batch=4, sequence=16)
    manual = ParallelGPT(plain.config, sequence_parallel=True)
    manual.load_plain(plain.state_dict())
    automatic = autoparallel.autoparallelize(plain, world_size, example_inputs=inputs)
    curves = []
    for model in (automatic, manual, plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for step in range(20):
            batch = {key: value.roll(step, 0) for key, value in inputs.items()}
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            if hasattr(model, "finish_gradients"):
                model.finish_gradients()
            if model is not manual:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            curve.append(float(loss))
        curves.append(curve)
    return curves


@pytest.mark.broad
def test_twenty_steps_give_the_same_three_curves() -> None:
    """Automatic, by hand and plain, from the same weights on the same batches."""
    for automatic, manual, plain in run_processes(train_three_ways, 2):
        assert plain[-1] < 0.8 * plain[0]
        for own, other, reference in zip(automatic, manual, plain, strict=True):
            assert abs(own - reference) < 1e-4
            assert abs(other - reference) < 1e-4
