"""Users look into an optimizer and its parameters between steps, as with the unsplit model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import nn, optim
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.placement import Shard


class Model(nn.Module):
    """Small parameters, one of which is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.down(torch.tanh(self.up(x))) * self.scale).square().mean()


PINS = {"up.weight": Shard(0), "down.weight": Shard(1)}
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def plain() -> Any:
    torch.manual_seed(0)
    return Model().double()


def step(model: Any, optimizer: Any, times: int = 2) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(X).backward()
        optimizer.step()


def adam(model: Any) -> Any:
    optimizer = optim.AdamW(model.parameters(), lr=0.05, eps=1e-2)
    step(model, optimizer)
    return optimizer


def counts_are_written(model: Any) -> list[Any]:
    """By `data`, of which no version tells."""
    optimizer = adam(model)
    for parameter in model.parameters():
        optimizer.state[parameter]["step"].data.fill_(9)
    step(model, optimizer)
    optimizer.state[model.up.bias]["step"].data.fill_(1)
    step(model, optimizer)
    return []


def lists_are_kept(model: Any) -> list[Any]:
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["seen"] = []
    step(model, optimizer)
    for place, parameter in enumerate(model.parameters()):
        optimizer.state[parameter]["seen"].append(place)
    step(model, optimizer)
    return [optimizer.state[parameter]["seen"] for parameter in model.parameters()]


def tensors_are_held(model: Any) -> list[Any]:
    """Those of the user, and those of the optimizer, whose parts are laid end to end anew."""
    optimizer = adam(model)
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, average in zip(model.parameters(), averages, strict=True):
        optimizer.state[parameter]["average"] = average
    step(model, optimizer)
    held = [value for entry in optimizer.state.values() for value in entry.values()]
    for number in range(3):
        model(X).backward()
        if number == 1:
            model.up.bias.grad = None
        optimizer.step()
        for parameter, average in zip(model.parameters(), averages, strict=True):
            average.lerp_(parameter.detach(), 0.5)
    kept = [optimizer.state[parameter]["average"] for parameter in model.parameters()]
    return [*held, *averages, *kept]


def parameters_are_remembered(model: Any) -> list[Any]:
    optimizer = adam(model)
    for parameter in model.parameters():
        optimizer.state[parameter]["last"] = parameter.detach()
    step(model, optimizer)
    return [optimizer.state[parameter].pop("last") for parameter in model.parameters()]


def hooks_come_later(model: Any) -> list[Any]:
    """DTensors go on with what steps on parts remember of a single number."""
    shapes: list[Any] = []
    optimizer = adam(model)
    handle = optimizer.register_step_post_hook(lambda *_: None)
    step(model, optimizer)
    handle.remove()
    handle = register_optimizer_step_post_hook(
        lambda own, *_: shapes.extend(tuple(p.shape) for p in own.param_groups[0]["params"])
    )
    step(model, optimizer)
    handle.remove()
    step(model, optimizer)
    return shapes


def gradients_are_assigned(model: Any) -> list[Any]:
    optimizer = adam(model)
    model(X).backward()
    for parameter in model.parameters():
        parameter.grad.data = parameter.grad.data * 2
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return []


def values_are_exchanged(model: Any) -> list[Any]:
    """As averages are put in the parameters' place to evaluate, and taken out again."""
    optimizer, losses = adam(model), []
    averages = [parameter.data * 0.5 for parameter in model.parameters()]
    before = [parameter.data for parameter in model.parameters()]
    for values in (averages, before):
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.data = value
        losses.append(model(X).detach())
        step(model, optimizer)
    return losses + averages


USES: list[Callable[[Any], list[Any]]] = [
    counts_are_written,
    lists_are_kept,
    tensors_are_held,
    parameters_are_remembered,
    hooks_come_later,
    gradients_are_assigned,
    values_are_exchanged,
]


def whole(value: Any) -> Any:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def all_uses(rank: int) -> list[Any]:
    """Return what each use returns, and the parameters after it, unsplit and split."""
    plan, rows = autoparallel.make_plan(plain(), 2, example_inputs=X, pins=PINS), []
    for use in USES:
        pair = [plain(), autoparallel.apply_plan(plain(), plan)]
        seen = [[*use(model), *model.parameters()] for model in pair]
        rows.append((use.__name__, *([whole(value) for value in values] for values in seen)))
    rprop = optim.Rprop(pair[1].parameters())
    handle = register_optimizer_step_post_hook(lambda *_: None)
    with pytest.raises(AutoParallelError, match="hooks on its steps"):
        step(pair[1], rprop)
    handle.remove()
    return rows


def test_users_look_between_steps() -> None:
    for rows in run_processes(all_uses, 2):
        for name, expected, values in rows:
            for one, other in zip(expected, values, strict=True):
                if isinstance(one, torch.Tensor):
                    assert torch.allclose(one, other, rtol=1e-10, atol=1e-12), name
                else:
                    assert one == other, name
