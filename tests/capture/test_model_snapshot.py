"""Planning leaves a model as it was, and a model that sets itself up runs split as unsplit."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from broad_cases import broad, share_of
from families import Float64, relative_error, worst_gradient
from planned_models import (
    SETTING_UP,
    WIDTH,
    Base,
    Disturbs,
    Flags,
    Hidden,
    KeepsLoss,
    Lazily,
    state_of,
)
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.support.fake_tensors import fake_mode
from autoparallel.support.model_snapshot import untouched

ROWS = 5


def build(kind: type[Base]) -> Base:
    """The model, float64, the same weights at every call."""
    torch.manual_seed(5)
    return kind().double()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, WIDTH, generator=generator).double() for _ in range(4)]


def globals_now() -> Any:
    """Torch's switches and all global generators."""
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
    )


def plan_in_every_way(model: nn.Module, inputs: Any) -> None:
    """Plan, plan for a split module, and simulate; errors are as good."""
    calls = [
        lambda: autoparallel.make_plan(model, 2, example_inputs=inputs),
        lambda: autoparallel.autoparallelize(model, 1, example_inputs=inputs),
        lambda: autoparallel.simulate(model, 2, example_inputs=inputs),
    ]
    # A simulated rank that runs a closure runs it on the module that the closure holds.
    for call in calls[:2] if isinstance(model, Hidden) else calls:
        with contextlib.suppress(AutoParallelError):
            call()


@pytest.mark.parametrize("kind", share_of([Disturbs, *SETTING_UP], 3))
def test_planning_leaves_the_model_as_it_was(kind: type[Base]) -> None:
    """Every dict of every module, every tensor bit for bit, torch's state and random numbers."""
    model, x = build(kind), batches()[0]
    hidden = list(getattr(model, "teachers", [[]])[0])
    before, around = state_of(model), globals_now()
    inside = [state_of(teacher) for teacher in hidden]
    plan_in_every_way(model, x)
    assert globals_now() == around
    assert state_of(model) == before
    assert [state_of(teacher) for teacher in hidden] == inside


def test_planning_at_the_first_call_leaves_the_model_as_it_was() -> None:
    for kind in SETTING_UP:
        if kind in (Hidden, Flags):
            # The call itself changes what the split module and the model both hold: the module in
            # a closure, and the object in an attribute.
            continue
        model = build(kind)
        before = state_of(model)
        waiting = autoparallel.autoparallelize(model, 1)
        waiting(batches()[0])
        assert state_of(model) == before


FAMILIES = list(zoo.FAMILIES)


def check_family(name: str) -> None:
    with Float64():
        model, inputs = zoo.build(name), zoo.inputs_for(name)
    before = state_of(model)
    autoparallel.make_plan(model, 2, example_inputs=inputs)
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["gpt2", *broad("vit", "lstm")])
def test_planning_leaves_published_models_as_they_were(name: str) -> None:
    check_family(name)


@pytest.mark.broad
@pytest.mark.parametrize("name", FAMILIES)
def test_planning_leaves_every_family_as_it_was(name: str) -> None:
    check_family(name)


def train(model: nn.Module, steps: list[torch.Tensor]) -> list[float]:
    """The losses of some steps of plain gradient descent."""
    losses = []
    for x in steps:
        loss = model(x)
        loss.backward()
        with torch.no_grad():
            for own in model.parameters():
                if own.grad is not None:
                    own.sub_(own.grad, alpha=1e-3)
                    own.grad = None
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", share_of([kind for kind in SETTING_UP if kind is not Lazily], 2))
def test_a_model_that_sets_itself_up_runs_as_unsplit(kind: type[Base]) -> None:
    """From its first call on, on one rank."""
    parallel = autoparallel.autoparallelize(build(kind), 1, example_inputs=batches()[0])
    expected = train(build(kind), batches())
    assert np.allclose(train(parallel, batches()), expected, rtol=1e-12, atol=0)


def test_what_torch_knows_of_a_trace_is_not_the_models() -> None:
    """A tensor without data refers to its mode, and that to all sizes of the trace that it is in:
    nobody looks there, as often as a model on such tensors is planned anew.
    """
    with fake_mode() as mode:
        layer = nn.Linear(2, 2)
    with untouched(layer):
        mode.noted = layer.weight.noted = True
    assert mode.noted
    assert not hasattr(layer.weight, "noted")


def test_what_is_left_in_attributes_is_there() -> None:
    """And has its gradient."""
    model, x = build(KeepsLoss), batches()[0]
    parallel: Any = autoparallel.autoparallelize(model, 1, example_inputs=x)
    assert not parallel.plan.breaks
    plain: Any = copy.deepcopy(model)
    for module in (parallel, plain):
        (module(x) + 3 * module.penalty + module.second.seen.sin().sum()).backward()
    assert relative_error(parallel.penalty.detach(), plain.penalty.detach()) < 1e-12
    assert relative_error(parallel.first.weight.grad, plain.first.weight.grad) < 1e-12
    result = autoparallel.simulate(model, 2, example_inputs=x)
    assert relative_error(result.output, plain(x).detach()) < 1e-12


def test_hidden_is_hidden() -> None:
    """The model of the test above does write to what no parameter names."""
    model: Any = build(Hidden)
    before = model.teachers[0][0].weight.clone()
    model(batches()[0])
    assert not torch.equal(model.teachers[0][0].weight, before)


@pytest.mark.parametrize("broken", [False, True])
def test_hooks_that_are_registered_later_run(broken: bool) -> None:
    """Inside of what was traced, by the user or by the model's Python: Python runs from then on."""
    torch.manual_seed(2)
    model: Any = nn.Sequential(build(Base), nn.Identity()) if broken else build(Base)
    plain, x = copy.deepcopy(model), batches()[0]
    parallel: Any = autoparallel.autoparallelize(model, 1, example_inputs=x)
    assert relative_error(parallel(x).detach(), plain(x).detach()) < 1e-12
    for module in (parallel, plain):
        inner = module[0] if broken else module
        inner.first.register_forward_hook(lambda module, args, output: output * 2)
    assert relative_error(parallel(x).detach(), plain(x).detach()) < 1e-12


@pytest.mark.broad
def test_published_models_that_set_themselves_up() -> None:
    """Hugging Face's BigBird replaces its attention where sequences are short, in its forward."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.BigBirdConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, block_size=8,
        intermediate_size=48, max_position_embeddings=64, num_random_blocks=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.BigBirdForMaskedLM(config).double().train()
    words = torch.randint(3, 97, (2, 20))
    batch = {"input_ids": words, "labels": words}
    before = state_of(model)
    result = autoparallel.simulate(model, 2, example_inputs=batch)
    assert state_of(model) == before
    output = model(**batch)
    output.loss.backward()
    assert relative_error(result.output.loss, output.loss.detach()) < 1e-10
    named = model.named_parameters(remove_duplicate=False)
    gradients = {path: own.grad for path, own in named if own.grad is not None}
    assert worst_gradient(dict(result.gradients), gradients)[0] < 1e-9
