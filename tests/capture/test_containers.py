"""Blocks in containers and out of them: no weight of any of them is lost, whoever reaches it."""

from __future__ import annotations

from functools import cache

import container_models
import pytest
import torch
from broad_cases import broad, one_of_each, share_of
from container_models import KINDS, Model, sample
from families import relative_error, worst_gradient

import autoparallel
from autoparallel.capture.export import capture
from autoparallel.graph.passes.run_passes import run_passes
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.planning.search import search
from autoparallel.rules.lookup import find_rule
from autoparallel.support.module_copy import on_meta

TOLERANCE = 1e-12


@cache
def traced(kind: str) -> Plan:
    """The plan for one rank, whose graph is that of all."""
    return autoparallel.make_plan(container_models.make(kind), 1, example_inputs=(sample(),))


def unsplit(model: Model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(sample())
    loss.backward()
    named = model.named_parameters(remove_duplicate=False)
    return loss.detach(), {path: p.grad for path, p in named if p.grad is not None}


@pytest.mark.parametrize("world_size", [*broad(2), 3])
@pytest.mark.parametrize("kind", share_of(KINDS, 3))
def test_nothing_is_lost(kind: str, world_size: int) -> None:
    """Loss and every gradient equal the unsplit model's."""
    one = traced(kind)
    assert one.captured is not None
    plan = search(one.captured, one.model, Mesh(tp=world_size), one.options)
    model = container_models.make(kind)
    made = autoparallel.simulate(model, world_size, example_inputs=(sample(),), plan=plan)
    loss, gradients = unsplit(model)
    assert relative_error(made.output.detach(), loss) < TOLERANCE
    error, where = worst_gradient(dict(made.gradients), gradients)
    assert error < TOLERANCE, where


@pytest.mark.parametrize("kind", one_of_each(KINDS, list(KINDS)[::4].__contains__))
def test_no_constant_is_a_weight(kind: str) -> None:
    """The program is the one of the full trace, and has no constants."""
    captured = traced(kind).captured
    assert captured is not None
    assert captured.constants == {}
    full = capture(container_models.make(kind), (sample(),), {}, fold=False, known=has_rule)
    assert str(captured.graph) == str(run_passes(full.graph))


@pytest.mark.parametrize("kind", share_of(KINDS, 9))
def test_on_the_meta_device(kind: str) -> None:
    """The same graph without weights, also where objects keep the tensors of another device."""
    captured = traced(kind).captured
    assert captured is not None
    made = capture(on_meta(container_models.make(kind)), (sample(),), {}, known=has_rule)
    assert made.constants == {}
    assert str(run_passes(made.graph)) == str(captured.graph)


def has_rule(name: str) -> bool:
    return find_rule(name) is not None
