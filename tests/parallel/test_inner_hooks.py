"""What the user hooks into a module that was split runs, whatever kind of hook it is."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import relative_error
from torch import nn

import autoparallel


def twins() -> tuple[Any, Any, torch.Tensor]:
    """A split module, the plain one, and their input, in float64."""
    torch.manual_seed(4)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 5))).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    return autoparallel.autoparallelize(copy.deepcopy(plain), 1, example_inputs=x), plain, x


def require_equal(split: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    """Results and all gradients are equal."""
    found = []
    for module in (split, plain):
        module.zero_grad()
        output = module(x)
        output.square().sum().backward()
        found.append([output.detach(), *[parameter.grad for parameter in module.parameters()]])
    assert all(relative_error(own, other) < 1e-12 for own, other in zip(*found, strict=True))


HOOKS: dict[str, Callable[..., Any]] = {
    "register_forward_pre_hook": lambda module, args: (args[0] * 2,),
    "register_forward_hook": lambda module, args, output: output * 2,
    "register_full_backward_pre_hook": lambda module, gradients: (gradients[0] * 2,),
    "register_full_backward_hook": lambda module, inputs, gradients: (inputs[0] * 2,),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_runs_from_when_it_is_registered_until_it_is_removed(kind: str) -> None:
    split, plain, x = twins()
    require_equal(split, plain, x)
    handles = [getattr(module[1][1], kind)(HOOKS[kind]) for module in (split, plain)]
    require_equal(split, plain, x)
    for handle in handles:
        handle.remove()
    require_equal(split, plain, x)


def test_a_hook_in_a_dictionary_that_was_exchanged_runs() -> None:
    """Some libraries clear hooks by putting an empty dictionary in place."""
    split, plain, x = twins()
    require_equal(split, plain, x)
    for module in (split, plain):
        module[1][1]._forward_hooks = OrderedDict()
        module[1][1].register_forward_hook(HOOKS["register_forward_hook"])
    require_equal(split, plain, x)


def test_a_hook_that_was_traced_and_is_removed_runs_no_more() -> None:
    """The program has it inside; once it is gone, Python runs."""
    _, plain, x = twins()
    plain[1][1].register_forward_hook(HOOKS["register_forward_hook"])
    split: Any = autoparallel.autoparallelize(copy.deepcopy(plain), 1, example_inputs=x)
    require_equal(split, plain, x)
    for module in (split, plain):
        module[1][1]._forward_hooks.clear()
    require_equal(split, plain, x)
