"""Hooks inside of a model: a split model runs them on whole gradients, as the model does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from broad_cases import broad
from torch import nn

import autoparallel


def ten(grad: torch.Tensor) -> torch.Tensor:
    """Return ten times a gradient, divided by a norm that only the whole gradient has."""
    return 10 * grad / (1 + grad.norm())


class Layers(nn.Module):
    """Two layers, between which something is done to the gradient."""

    def __init__(self, use: Any = None) -> None:
        super().__init__()
        self.use = use
        self.entry, self.amid, self.out = nn.Linear(12, 24), Inner(), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        h = self.entry(x)
        if self.use is not None:
            self.use(h)
        return (self.out(self.amid(h)) - x).square().mean()


class Inner(nn.Module):
    """A layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 36), nn.Linear(36, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape."""
        return x + self.down(torch.tanh(self.up(x)))


def when_trained(h: torch.Tensor) -> None:
    """Register a hook as models do that are also evaluated."""
    if h.requires_grad:
        h.register_hook(ten)


def on_node(h: torch.Tensor) -> None:
    """Register a hook on the node of autograd that has made a tensor."""
    assert h.grad_fn is not None
    h.grad_fn.register_prehook(lambda grads: tuple(ten(g) for g in grads))


IN_FORWARD = {
    "register_hook": lambda h: h.register_hook(ten),
    "when trained": when_trained,
    "grad_fn": on_node,
    "retain_grad": lambda h: h.retain_grad(),
}


def pre(module: nn.Module, grads: Any) -> Any:
    """Change the gradients of a module's results."""
    return tuple(ten(g) for g in grads)


def full(module: nn.Module, ins: Any, outs: Any) -> Any:
    """Change the gradients of a module's inputs."""
    return tuple(ten(g) for g in ins)


ON_MODULES = {
    "full backward hook": lambda m: m.amid.register_full_backward_hook(full),
    "backward pre-hook": lambda m: m.amid.register_full_backward_pre_hook(pre),
    "backward hook": lambda m: m.amid.register_backward_hook(full),
    "deep": lambda m: m.amid.up.register_full_backward_hook(full),
}


def compared(model: nn.Module, world_size: int) -> Any:
    """Return the plan of a model whose split step is its own."""
    x = torch.randn(6, 12, dtype=torch.float64)
    whole = copy.deepcopy(model)
    loss = whole(x)
    loss.backward()
    plan = autoparallel.make_plan(model, world_size, example_inputs=x)
    made = autoparallel.simulate(model, example_inputs=x, plan=plan)
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-12, atol=0)
    expected = {name: p.grad for name, p in whole.named_parameters()}
    torch.testing.assert_close(dict(made.gradients), expected, rtol=1e-10, atol=1e-13)
    return plan


@pytest.mark.parametrize("world_size", [*broad(1, 2), 3])
@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_hook_in_the_forward(kind: str, world_size: int) -> None:
    torch.manual_seed(0)
    plan = compared(Layers(IN_FORWARD[kind]).double(), world_size)
    (stays,) = plan.breaks
    assert stays.path == ""
    asks = kind == "when trained"  # before it registers the hook, which is as much of a reason
    assert ("reads requires_grad" if asks else "reaches into the backward pass") in stays.reason


@pytest.mark.filterwarnings("ignore:.*backward hook:UserWarning")
@pytest.mark.filterwarnings("ignore:.*backward hook:FutureWarning")
@pytest.mark.parametrize("world_size", [*broad(1, 2), 3])
@pytest.mark.parametrize("kind", ON_MODULES)
def test_a_hook_on_a_module(kind: str, world_size: int) -> None:
    torch.manual_seed(0)
    model = Layers().double()
    ON_MODULES[kind](model)
    plan = compared(model, world_size)
    paths = ["", "amid"] if kind == "deep" else [""]
    assert [stays.path for stays in plan.breaks] == paths
    if world_size > 1:
        assert any("S" in str(op.results) for op in plan.ops)


@pytest.mark.filterwarnings("ignore:.*backward hook:UserWarning")
@pytest.mark.filterwarnings("ignore:.*backward hook:FutureWarning")
@pytest.mark.parametrize("kind", [*ON_MODULES, "the model's own"])
def test_a_module_of_one_rank_runs_it(kind: str) -> None:
    torch.manual_seed(0)
    plain, x = Layers().double(), torch.randn(6, 12, dtype=torch.float64)
    if kind in ON_MODULES:
        ON_MODULES[kind](plain)
    else:
        plain.register_full_backward_pre_hook(pre)
    split = autoparallel.autoparallelize(copy.deepcopy(plain), 1, example_inputs=x)
    gradients = []
    for module in (split, plain):
        module(x).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_a_layer_made_in_the_forward_is_no_hook() -> None:
    class Grows(Layers):
        """A model that makes one of its layers at its call."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return the loss."""
            self.out = nn.Linear(24, 12)
            return super().forward(x)

    plan = autoparallel.make_plan(Grows(), 2, example_inputs=torch.ones(4, 12))
    # It is named as what it is: torch asks for a new parameter's grad_fn, but nobody hooks it.
    assert "the modules in it" in plan.breaks[0].reason
