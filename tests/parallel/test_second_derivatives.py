"""Derivatives of gradients through a split model are those of the unsplit one.

Forces in a loss, gradient penalties, residuals of differential equations and traces of Hessians, by
plans as made, with ZeRO's stages and recomputed blocks, and by plans that nobody would choose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from any_plans import any_plans, network_of
from broad_cases import broad, share_of
from changed_plans import blocks_again, copies_again, spread
from torch import nn
from torch.autograd.functional import hvp, jacobian
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import state_of
from autoparallel.plan import Plan
from autoparallel.runtime.ranks import run_ranks, thread_ranks
from autoparallel.runtime.tensor_parts import join_layout


class Potential(nn.Module):
    """The energy of atoms: embedded kinds, attention among places, and a network per atom."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.kinds, self.places = nn.Embedding(7, 12), nn.Linear(3, 12)
        self.norm: nn.Module = nn.LayerNorm(12) if norms else nn.RMSNorm(12)
        self.attend = nn.Linear(12, 36)
        self.net = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12), nn.SiLU())
        self.energy = nn.Linear(12, 1)

    def forward(self, places: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.places(places) + self.kinds(kinds))
        heads = self.attend(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        x = x + functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.energy(torch.tanh(self.net(x)) + x.softmax(-1)).sum()


class Critic(nn.Module):
    """The loss of a small classifier of images."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(3, 6, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(6) if norms else nn.GroupNorm(2, 6)
        self.classes = nn.Linear(6 * 25, 11)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(self.norm(self.convolve(images))).flatten(1)
        return functional.cross_entropy(self.classes(x), labels)


def inputs_of(kind: type[nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    atoms = issubclass(kind, Potential)
    shape, high = ((4, 5, 3), 7) if atoms else ((4, 3, 5, 5), 11)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(high, shape[:2] if atoms else shape[:1], generator=generator)
    return x.requires_grad_(), labels


def gradient(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    (result,) = torch.autograd.grad(value, x, create_graph=True)
    return result


def forces(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Energy and forces in one loss."""
    energy = model(x, labels)
    return (energy - 1) ** 2 + (gradient(energy, x) - 0.3).square().mean()


def penalty(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nothing but the norm of the gradient."""
    return (gradient(model(x, labels), x).flatten(1).norm(dim=1) - 1).square().mean()


def residual(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A second derivative by the inputs in the loss: parameters get third ones.

    Those of torch's own layer norm and batch norm are wrong, so the models have other norms here.
    """
    value = model(x, labels)
    first = gradient(value, x)
    return (gradient(first.sin().sum(), x) + value).square().mean()


def trace(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Two products with the Hessian of the inputs, through one graph that is kept."""
    first = gradient(model(x, labels), x)
    signs = [torch.ones_like(x), (torch.arange(x.numel()) % 3 - 1).view_as(x).to(x)]
    return torch.stack([(gradient((first * v).sum(), x) * v).sum() for v in signs]).sum()


def ready_made(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Products of torch.autograd.functional, one of a model that the user checkpoints."""

    def value(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(model, x, labels, use_reentrant=False)
        return result

    def values(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(x, labels), model(2 * x, labels)])

    _, product = hvp(value, x, x.detach().cos(), create_graph=True)
    return product.square().mean() + jacobian(values, x).square().sum()


Step = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def stepped(model: nn.Module, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss and the inputs' gradient after the backward pass of a step."""
    x, labels = inputs_of(type(model))
    x = x.detach().requires_grad_()
    loss = step(model, x, labels)
    loss.backward()
    return loss.detach(), x.grad


@cache
def plain(kind: type[nn.Module], norms: bool) -> nn.Module:
    torch.manual_seed(5)
    return kind(norms).double()


@cache
def planned(kind: type[nn.Module], norms: bool, mesh: Mesh) -> Plan:
    model = plain(kind, norms)
    return autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs_of(kind))


@cache
def random_plans(kind: type[nn.Module], norms: bool, mesh: Mesh) -> list[Plan]:
    known = planned(kind, norms, mesh).captured
    captured, network = network_of(plain(kind, norms), inputs_of(kind), mesh, known)
    return [plan for plan, _ in any_plans(captured, network, range(2))]


def ways(kind: type[nn.Module], norms: bool, mesh: Mesh) -> Iterator[tuple[str, Plan]]:
    plan = planned(kind, norms, mesh)
    yield "as planned", plan
    yield "ZeRO-1", spread(plan, at_once=False)
    yield "ZeRO-2, copies made again", copies_again(spread(plan, at_once=True))
    yield "blocks run again", blocks_again(plan, 4)
    for number, drawn in enumerate(random_plans(kind, norms, mesh)):
        yield f"drawn plan {number}", drawn


@pytest.mark.parametrize("mesh", [*broad(Mesh(tp=2), Mesh(dp=2, tp=2)), Mesh(tp=3)], ids=str)
@pytest.mark.parametrize(
    ("kind", "step"),
    share_of(product((Potential, Critic), (forces, penalty, residual, trace, ready_made)), 2),
)
def test_derivatives_of_gradients(kind: type[nn.Module], step: Step, mesh: Mesh) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        model = plain(kind, step in (forces, penalty))
        unsplit = copy.deepcopy(model)
        expected = stepped(unsplit, step)
        for way, plan in ways(kind, step in (forces, penalty), mesh):

            def work(ranks: Any, plan: Plan = plan) -> Any:
                module = parallel_module(model, plan, ranks, None, refuse, 0)
                result = stepped(module, step)
                return result, module, state_of(module).layouts

            every = thread_ranks(mesh)
            results = run_ranks(every, work)
            for (loss, x_grad), _, _ in results:
                torch.testing.assert_close(loss, expected[0], rtol=1e-9, atol=1e-12, msg=at(way))
                torch.testing.assert_close(x_grad, expected[1], rtol=1e-9, atol=1e-12, msg=at(way))
            modules = [dict(module.named_parameters()) for _, module, _ in results]
            for path, parameter in unsplit.named_parameters():
                parts = [named[path].grad for named in modules]
                if parameter.grad is None:
                    assert all(part is None or not part.any() for part in parts), (way, path)
                    continue
                layout = results[0][2][path]
                parts = [
                    torch.zeros_like(named[path]) if part is None else part
                    for named, part in zip(modules, parts, strict=True)
                ]
                whole = join_layout(parts, layout, every[0].sizes)
                torch.testing.assert_close(
                    whole, parameter.grad, rtol=1e-9, atol=1e-11, msg=at(f"{way} {path}")
                )


def at(place: str) -> Callable[[str], str]:
    return lambda message: f"{place}: {message}"


def refuse(*_: Any) -> Any:
    raise AssertionError("one call, of inputs that were planned for")
