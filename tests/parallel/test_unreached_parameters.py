"""Parameters that a loss does not depend on, though one that comes with them is: no hook runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan

MESHES = {"tp": Mesh(tp=2), "dp": Mesh(dp=2)}


class Heads(nn.Module):
    """Two results of one trunk, each by a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.norm = nn.Linear(6, 10), nn.LayerNorm(10)
        self.left, self.right = nn.Linear(10, 7), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm(self.trunk(x).tanh())
        return self.left(h).sin(), self.right(h).cos()


def rows() -> torch.Tensor:
    return torch.linspace(-1, 1, 144, dtype=torch.float64).view(6, 4, 6).sin()


def plain() -> Heads:
    torch.manual_seed(0)
    return Heads().double()


@cache
def planned(name: str) -> Plan:
    return autoparallel.make_plan(plain(), mesh=MESHES[name], example_inputs=rows())


def hooked(model: Any) -> list[Any]:
    """What hooks see, and gradients, of losses of one head, the other one, and of both."""
    seen: list[Any] = []
    calls: list[str] = []
    for path, parameter in model.named_parameters():

        def scale(grad: torch.Tensor, path: str = path) -> torch.Tensor:
            calls.append(path)
            return grad * (2 + len(path))

        parameter.register_hook(scale)
    several = [model.left.bias, model.right.bias, model.norm.weight]

    def note(grads: Any) -> None:
        seen.append([grad is not None for grad in grads])

    torch.autograd.graph.register_multi_grad_hook(several, note)
    for used in ((0,), (1,), (0, 1)):
        outputs = model(rows())
        torch.stack([outputs[place].pow(2).sum() for place in used]).sum().backward()
        grads = {path: p.grad for path, p in model.named_parameters()}
        for path, grad in grads.items():
            if grad is not None:
                grads[path] = getattr(grad, "full_tensor", grad.clone)().clone()
        seen.append(grads)
    return [seen, sorted(calls)]


def on_a_mesh(rank: int, world_size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {name: hooked(autoparallel.apply_plan(plain(), planned(name))) for name in MESHES}


def plan_both() -> None:
    for name in MESHES:
        planned(name)


def test_hooks_run_where_there_is_a_gradient() -> None:
    """On the two ranks of either axis: heads that are split, and gradients that wait for sums."""
    seen, calls = hooked(plain())
    for results in run_processes(on_a_mesh, 2, 2, before=plan_both):
        for name, (found, called) in results.items():
            assert called == calls, name
            for ours, theirs in zip(found, seen, strict=True):
                if isinstance(theirs, list):
                    assert ours == theirs, name
                    continue
                assert ours.keys() == theirs.keys()
                for path, grad in theirs.items():
                    assert (ours[path] is None) == (grad is None), (name, path)
                    if grad is not None:
                        torch.testing.assert_close(ours[path], grad, rtol=1e-10, atol=1e-12)
