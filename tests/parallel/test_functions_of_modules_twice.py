"""Every autograd Function between the user and a program is differentiated twice, on processes."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import run_processes
from releases import whole_tensors_differentiated_twice
from torch import nn
from torch.distributed.tensor import DTensor
from unseen import Base, X

import autoparallel
from autoparallel import parallel
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh


class Plain(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x).tanh())


class Hidden(Base):
    """A model that returns a split tensor beside the loss, with which the user computes."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.a(x).tanh()
        return self.out(hidden), hidden


class Looked(Base):
    """Its Python looks at a whole parameter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.a.weight.square().sum()
        if float(scale) > 0:
            scale = scale + self.kept["one"]
        return self.out(self.a(x).tanh()) * scale


def functions() -> set[Any]:
    for module in pkgutil.iter_modules(parallel.__path__, f"{parallel.__name__}."):
        importlib.import_module(module.name)
    kinds = torch.autograd.Function.__subclasses__()
    return {kind for kind in kinds if kind.__module__.startswith(f"{parallel.__name__}.")}


def twice(model: Any, x: torch.Tensor) -> list[Any]:
    """Return a penalty on the whole parameters and on all first gradients, and its gradients."""
    x = x.clone().requires_grad_()
    named = dict(model.named_parameters())
    returned = model(x)
    loss = returned[0] if isinstance(returned, tuple) else returned
    given = torch.linspace(-1, 1, 72, dtype=torch.float64).view(6, 12).requires_grad_()
    if isinstance(returned, tuple):
        (back,) = torch.autograd.grad(returned[1], x, given, create_graph=True)
        loss = loss + returned[1].pow(3).sum() + back.pow(3).sum()
    loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
    for parameter in named.values():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        loss = loss + whole.pow(3).sum()
    firsts = torch.autograd.grad(loss, [x, *named.values()], create_graph=True)
    penalty = loss
    for first in firsts:
        whole = first.full_tensor() if isinstance(first, DTensor) else first
        penalty = penalty + whole.flatten().cumsum(0).pow(3).sum()
    penalty.backward()
    found = [penalty.detach(), x.grad, given.grad, *(p.grad for p in named.values())]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found if g is not None]


def compare(rank: int) -> list[str]:
    """Return the Functions whose backward pass never ran."""
    known, ran = functions(), set()

    def noting(kind: Any, backward: Any) -> Any:
        def noted(ctx: Any, *grads: Any) -> Any:
            ran.add(kind)
            return backward(ctx, *grads)

        return staticmethod(noted)

    patches = [patch.object(kind, "backward", noting(kind, kind.backward)) for kind in known]
    for each in patches:
        each.start()
    for model in (Plain(), Hidden(), Looked({"one": 1.0})):
        expected = twice(copy.deepcopy(model), X)
        split = autoparallel.autoparallelize(model, 2, example_inputs=X)
        twice(split, X)  # what is found out in the first call is used in others
        split.zero_grad()
        torch.testing.assert_close(twice(split, X), expected, rtol=1e-9, atol=1e-11)
    return sorted(kind.__name__ for kind in known - ran)


@whole_tensors_differentiated_twice
def test_every_function() -> None:
    """Steps of a pipeline are left, which refuse, and batches of each rank's own, which are tried
    elsewhere.
    """
    assert run_processes(compare, 2) == [["PipelineStep", "_Joined", "_OwnRows", "_Rows"]] * 2


def stepped(rank: int) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), Loss())
    split = autoparallel.autoparallelize(model, mesh=Mesh(pp=2), example_inputs=X.float())
    loss = split(X.float())
    with pytest.raises(AutoParallelError) as refused:
        loss.backward(create_graph=True)
    return str(refused.value)


class Loss(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().mean()


def test_a_pipeline_refuses() -> None:
    assert all("leave the axis pp out" in text for text in run_processes(stepped, 2))
