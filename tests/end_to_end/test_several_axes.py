"""Loss and every gradient on meshes of several axes, however the memory is spared."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from changed_plans import blocks_again, copies_again, spread
from families import build, inputs_for, loss_and_logits, relative_error, worst_gradient
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Layout, Partial, Shard
from autoparallel.plan import Plan
from autoparallel.rewrite.names import Names
from autoparallel.runtime import kernels
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.tensor_parts import take_layout_part

pytestmark = pytest.mark.usefixtures("one_trace")
TOLERANCE = 1e-10
MESHES = (Mesh(dp=2, tp=2), Mesh(dp=2, tp=3), Mesh(cp=2, dp=2, tp=2))
SEVERAL = [
    pytest.param(name, mesh, marks=pytest.mark.broad if size > 4 and name != "gpt" else ())
    for name in ("mlp", "gpt", "bert")
    for size, mesh in ((mesh.world_size, mesh) for mesh in MESHES)
]


def dropping(name: str) -> nn.Module:
    """The model with dropout."""
    model = build(name, layers=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


def ways(plan: Plan) -> Iterator[tuple[str, Plan]]:
    yield "as planned", plan
    yield "state apart, gradients at the end", spread(plan, at_once=False)
    yield "state apart, gradients at once", copies_again(spread(plan, at_once=True))
    yield "blocks again", blocks_again(plan, 7)
    yield "all again", blocks_again(copies_again(plan), 5)


@pytest.mark.parametrize(("name", "mesh"), share_of(SEVERAL, 2), ids=str)
def test_gradients_are_those_of_one_device(name: str, mesh: Mesh) -> None:
    """With dropout, in uneven parts, under the planner's choice and with the memory spared."""
    model, inputs = dropping(name), inputs_for(name)
    one = autoparallel.simulate(model, 1, example_inputs=inputs)
    plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs)
    for way, changed in ways(plan):
        made = autoparallel.simulate(model, plan=changed, example_inputs=inputs)
        pairs = zip(loss_and_logits(made.output), loss_and_logits(one.output), strict=True)
        assert all(relative_error(*(t.detach() for t in pair)) < TOLERANCE for pair in pairs), way
        worst = worst_gradient(dict(made.gradients), dict(one.gradients))
        assert worst[0] < TOLERANCE, (way, worst)
        assert made.apart == 0, way


@pytest.mark.parametrize("inner", [Invariant(), Shard(0)], ids=str)
def test_weights_that_are_kept_split(inner: Any) -> None:
    """ZeRO-3 on one axis and on both: gathered for use, in the backward pass once more."""
    model, inputs = build("mlp"), inputs_for("mlp", 8)
    expected = autoparallel.simulate(model, 1, example_inputs=inputs)
    pins = {"first.weight": (Shard(0), inner), "second.weight": (Shard(0), inner)}
    plan = autoparallel.make_plan(model, mesh=MESHES[0], example_inputs=inputs, pins=pins)
    counts = []
    for way in (plan, copies_again(plan)):
        made = autoparallel.simulate(model, plan=way, example_inputs=inputs)
        assert worst_gradient(dict(made.gradients), dict(expected.gradients))[0] < TOLERANCE
        counts.append(sum(made.collectives.values()))
    assert counts[1] > counts[0]


@pytest.mark.parametrize("name", ["mlp", *broad("gpt")])
def test_ranks_without_any_rows(name: str) -> None:
    """Two rows on three ranks: all ranks communicate in the same order, whatever an op keeps."""
    model, planned, inputs = build(name, layers=1), inputs_for(name, 6), inputs_for(name, 2)
    plan = autoparallel.make_plan(model, mesh=Mesh(dp=3, tp=2), example_inputs=planned)
    expected = autoparallel.simulate(model, 1, example_inputs=inputs)
    for way in (copies_again(plan), blocks_again(plan, 5), blocks_again(copies_again(plan), 7)):
        made = autoparallel.simulate(model, plan=way, example_inputs=inputs)
        assert worst_gradient(dict(made.gradients), dict(expected.gradients))[0] < TOLERANCE


def test_a_loss_split_by_tokens_and_by_classes() -> None:
    """One kernel runs the other; ignored labels count nowhere."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(10, (7,), generator=generator)
    labels[2] = -100
    expected = functional.cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(expected, logits)
    layout: Layout = (Shard(0), Shard(1))

    def work(ranks: Ranks) -> None:
        def own(whole: torch.Tensor, layout: Layout) -> torch.Tensor:
            return take_layout_part(whole, layout, ranks.sizes, ranks.coordinates)

        outer, inner = ranks.groups
        part = own(logits.detach(), layout).clone().requires_grad_()
        classes = partial(kernels.cross_entropy_classes, group=inner, size=10)
        target = own(labels, (Shard(0), Invariant()))
        made = kernels.cross_entropy_tokens(part, target, group=outer, size=7, run=classes)
        total = convert(made, outer, Partial(), Invariant())
        torch.testing.assert_close(total.detach(), expected.detach())
        total.backward()
        torch.testing.assert_close(part.grad, own(gradient, layout))

    run_ranks(thread_ranks(Mesh(dp=2, tp=3)), work)


def test_names_do_not_collide() -> None:
    """Of mesh axes, sizes and values, with each other and with what a program calls."""
    names = Names(("lambda", "x", "torch"), ("s0",), ("group", "x", "x_", "s0", "F", "S0", "I"))
    assert names.axes == ("lambda_", "x", "torch_")
    found = [*names.axes, *names.values.values()]
    assert len(set(found)) == len(found)
    assert not {"s0", "F", "S0", "I"} & set(found)
    assert names.values["group"] == "group"
    assert names.fresh("x_R") != names.fresh("x_R")


def test_axes_may_have_any_name() -> None:
    model, inputs = build("mlp"), inputs_for("mlp")
    mesh = Mesh(**{"lambda": 2, "add": 2})
    made = autoparallel.simulate(model, mesh=mesh, example_inputs=inputs)
    expected = autoparallel.simulate(model, 1, example_inputs=inputs)
    assert worst_gradient(dict(made.gradients), dict(expected.gradients))[0] < TOLERANCE
