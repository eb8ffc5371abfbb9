"""Torch's optimizers step on a split module as on the unsplit one, or say why they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from torch import nn, optim
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
from autoparallel.parallel.gradient_norms import clip_grad_norm_
from autoparallel.parallel.state_dicts import full_state_dict
from autoparallel.placement import Shard


class Model(nn.Module):
    """Two blocks in one weight, split in rows; a weight that is split in columns; odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(7, 30), nn.Linear(15, 7)
        self.out = nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.out(x + self.down(torch.sigmoid(gate) * up)).square().mean()


Make = Callable[[list[Any]], optim.Optimizer]

# A larger epsilon keeps rounding where there is no gradient from being blown up.
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01, eps=1e-2, amsgrad=True),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.01, eps=1e-2, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, eps=1e-2, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "Adagrad fused": lambda p: optim.Adagrad(p, lr=0.01, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: optim.NAdam(p, eps=1e-2),
    "RAdam": lambda p: optim.RAdam(p, eps=1e-2),
    "ASGD": lambda p: optim.ASGD(p),
    "RMSprop": lambda p: optim.RMSprop(p, eps=1e-2, momentum=0.9, centered=True),
    "Rprop": lambda p: optim.Rprop(p),
    "Rprop foreach": lambda p: optim.Rprop(p, foreach=True),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "Adafactor foreach": lambda p: optim.Adafactor(p, lr=0.1, foreach=True),
    "Muon": lambda p: optim.Muon([each for each in p if each.ndim == 2], lr=0.1),
}


def plain() -> Any:
    torch.manual_seed(0)
    return Model().double()


def stepped(model: Any, optimizer: optim.Optimizer, numbers: range, closures: bool = False) -> None:
    for number in numbers:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(number)).double()

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(x)
            loss.backward()
            return loss

        if closures:
            assert float(optimizer.step(closure)) > 0
        else:
            closure()
            optimizer.step()


def worst(parallel: Any, model: Any) -> float:
    whole = full_state_dict(parallel)
    return max(float((whole[path] - v).abs().max()) for path, v in model.state_dict().items())


def all_optimizers(
    rank: int, names: tuple[str, ...], pins: dict[str, Any], world_size: int, folder: Path
) -> list[Any]:
    """Return the errors after four steps, and after two more from a checkpoint."""
    plan = autoparallel.make_plan(
        plain(), world_size, example_inputs=torch.ones(4, 7).double(), pins=pins
    )

    def split() -> Any:
        return autoparallel.apply_plan(plain(), plan)

    found: list[Any] = []
    for name in names:
        make = OPTIMIZERS[name]
        model, parallel, fresh = plain(), split(), split()
        pairs = [(m, make(list(m.parameters()))) for m in (model, parallel, fresh)]
        for number, (m, optimizer) in enumerate(pairs[:2]):
            stepped(m, optimizer, range(2), closures=number == 1)
            stepped(m, optimizer, range(2, 4))
        first = worst(parallel, model)
        assert all(isinstance(p, DTensor) for g in pairs[1][1].param_groups for p in g["params"])
        save_checkpoint(folder / name, parallel, pairs[1][1])
        load_checkpoint(folder / name, fresh, pairs[2][1])
        for m, optimizer in pairs:
            stepped(m, optimizer, range(4, 6))
        found.append((name, first, worst(parallel, model), worst(fresh, model)))
    for make, hooked in ((lambda p: optim.LBFGS(p), False), (OPTIMIZERS["SGD fused"], True)):
        parallel = split()
        optimizer = make(list(parallel.parameters()))
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: None)
        with pytest.raises(AutoParallelError, match="cannot step on a split module") as error:
            stepped(parallel, optimizer, range(1), closures=True)
        assert error.value.fix
        assert worst(parallel, plain()) == 0
    # Norms and clipping, which torch computes on DTensors.
    model, parallel = plain(), split()
    for norm_type in (1.0, 2.0, 3.0, float("inf"), -float("inf"), 0.0, -1.0):
        norms: list[Any] = []
        for m in (model, parallel):
            m.zero_grad()
            m(torch.ones(4, 7).double()).backward()
            gradients = [p.grad for p in m.parameters()]
            norms.append(nn.utils.get_total_norm(gradients, norm_type))
            nn.utils.clip_grads_with_norm_(m.parameters(), 0.1, norms[-1], foreach=True)
            nn.utils.clip_grad_value_(m.parameters(), 0.01)
        found.append((f"norm {norm_type}", float((norms[0] - norms[1].full_tensor()).abs())))
        off = [
            float((own.grad.full_tensor() - p.grad).abs().max())
            for own, p in zip(parallel.parameters(), model.parameters(), strict=True)
        ]
        found.append(("clipped", max(off)))
        for m, clip in ((model, nn.utils.clip_grad_norm_), (parallel, clip_grad_norm_)):
            m.zero_grad()
            m(torch.ones(4, 7).double()).backward()
            norms.append(clip(m.parameters(), 0.05, norm_type))
        off = [
            float((own.grad.full_tensor() - p.grad).abs().max())
            for own, p in zip(parallel.parameters(), model.parameters(), strict=True)
        ]
        found.append((f"ours {norm_type}", max(off), float((norms[-1] - norms[-2]).abs())))
    found += unusual_steps(split)
    return found


class Updates(TorchDispatchMode):
    """Counts the parameters that an AdamW updates, one by one."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten.addcdiv_.default
        return function(*args, **(kwargs or {}))


def unusual_steps(split: Callable[[], Any]) -> list[Any]:
    """Return the errors of steps between which the optimizer or the parameters are changed."""
    parallel = split()
    optimizer = optim.AdamW(parallel.parameters())
    # Small parts step together where they are remembered alike.
    for number, expected in enumerate((1, 1, 2)):
        if number == 2:
            optimizer.state[parallel.out.weight]["step"].fill_(7)
        parallel(torch.ones(4, 7).double()).backward()
        with Updates() as updates:
            optimizer.step()
        assert updates.count == expected
    model, parallel = plain(), split()
    both = [(m, optim.AdamW(m.parameters(), lr=0.01, eps=1e-2)) for m in (model, parallel)]
    found = []
    for number, change in enumerate(CHANGES):
        for m, optimizer in both:
            change(m, optimizer)
            stepped(m, optimizer, range(number, number + 2))
        found.append((f"after change {number}", worst(parallel, model)))
    parts = [value for entry in both[1][1].state.values() for value in entry.values()]
    assert all(isinstance(value, DTensor) for value in parts if value.ndim)
    # One that is broken off leaves the optimizer with the parameters, and is saved with them.
    parallel, seen = split(), []
    optimizer = optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    stepped(parallel, optimizer, range(1))
    parallel(torch.ones(4, 7).double()).backward()
    optimizer.param_groups[-1]["lr"] = "none"
    with pytest.raises((TypeError, RuntimeError)):
        optimizer.step()
    saved = optimizer.state_dict()["state"]
    assert all(isinstance(entry["momentum_buffer"], DTensor) for entry in saved.values())
    assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])
    # Whoever watches the steps sees DTensors.
    optimizer = optim.AdamW(parallel.parameters())
    optimizer.register_step_post_hook(
        lambda o, *_: seen.extend(map(type, o.param_groups[0]["params"]))
    )
    stepped(parallel, optimizer, range(1))
    assert seen
    assert all(issubclass(kind, DTensor) for kind in seen)
    return found


def _frozen(model: Any, _: Any) -> None:
    model.down.weight.requires_grad_(False)


def _thawed(model: Any, _: Any) -> None:
    model.down.weight.requires_grad_(True)


def _other_state(_: Any, optimizer: optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"] * 0.5


def _loaded(_: Any, optimizer: optim.Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def _in_groups(_: Any, optimizer: optim.Optimizer) -> None:
    *some, last = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = some
    optimizer.add_param_group({"params": [last], "lr": 0.02})


def _one_without_gradient(model: Any, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 7).double()).backward()
    model.down.bias.grad = None
    optimizer.step()


def _other_numbers(model: Any, optimizer: optim.Optimizer) -> None:
    entry = optimizer.state[model.down.bias]
    entry["step"].fill_(7)
    entry["exp_avg"].mul_(0.5)


CHANGES: list[Callable[[Any, Any], None]] = [
    lambda *_: None,
    _other_numbers,
    _one_without_gradient,
    _frozen,
    _thawed,
    _other_state,
    _loaded,
    _in_groups,
    lambda _, optimizer: optimizer.state.clear(),
]


EVERY = tuple(OPTIMIZERS)
ROWS = {"gate_up.weight": Shard(0, 2), "down.weight": Shard(1), "out.weight": Shard(0)}
COLUMNS = {"gate_up.weight": Shard(0, 2), "down.weight": Shard(0), "out.weight": Shard(1)}


@pytest.mark.parametrize(
    ("world_size", "names", "pins"),
    [(2, EVERY[::2], ROWS), *broad((2, EVERY[1::2], ROWS), (3, EVERY, COLUMNS))],
    ids=["2-some", "2-others", "3-all"],
)
def test_steps_are_those_of_the_unsplit_module(
    world_size: int, names: tuple[str, ...], pins: dict[str, Any], tmp_path: Path
) -> None:
    for found in run_processes(all_optimizers, world_size, names, pins, world_size, tmp_path):
        off = [row for row in found if not max(row[1:]) < 1e-12]
        assert not off, off
