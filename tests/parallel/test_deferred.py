"""Before its first call a module can be loaded, saved, changed and copied as the user's can."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import autoparallel
from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
from autoparallel.parallel.state_dicts import full_state_dict


class Model(nn.Module):
    """Tied weights, a buffer, an attribute that is read, and one that refers to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.last = nn.Linear(6, 8, bias=False)
        self.last.weight = self.first.weight
        self.scales = [self.second.bias]
        self.factor = 1.0
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.tanh(self.first(x))) + self.shift
        return (self.last(x * self.scales[0])).square().mean() * self.factor

    def save_pretrained(self, folder: Path) -> None:
        torch.save({"kind": type(self).__name__, "weights": self.state_dict()}, folder / "own")


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    return Model().double()


def require_same(parallel: Any, plain: Any) -> None:
    whole = full_state_dict(parallel)
    assert list(whole) == list(plain.state_dict())
    for path, value in plain.state_dict().items():
        torch.testing.assert_close(whole[path], value, rtol=0, atol=1e-12, msg=path)


def steps(model: Any, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> list[float]:
    losses = []
    for number in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number)).to(dtype)
        loss = model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def before_the_first_call(rank: int, folder: Path) -> None:
    model, other = model_of(0), model_of(1)
    other.shift.mul_(3)
    user = copy.deepcopy(model.state_dict())
    waiting: Any = autoparallel.autoparallelize(model, 2)
    require_same(waiting, model)
    for ask in (lambda: waiting.plan, lambda: waiting.emitted_program):
        with pytest.raises(PlanError, match="has no plan yet") as error:
            ask()
        assert "example_inputs" in error.value.fix
    for call in (lambda: save_checkpoint(folder / "a", waiting), lambda: pickle.dumps(waiting)):
        with pytest.raises(AutoParallelError) as refused:
            call()
        assert refused.value.fix
    twin = copy.deepcopy(waiting)
    # Loaded in every way, which leaves the user's model alone.
    waiting.load_state_dict(other.state_dict())
    require_same(waiting, other)
    require_same(twin, model)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(waiting, model.state_dict() if rank == 0 else {}, options=whole)
    require_same(waiting, model)
    waiting.load_state_dict(other.state_dict())
    got = get_model_state_dict(waiting, options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(got[path], value) for path, value in other.state_dict().items())
    waiting.save_pretrained(folder)
    nn.ModuleDict({"in": twin}).load_state_dict(nn.ModuleDict({"in": other}).state_dict())
    # Changed as the user's can be.
    calls: list[str] = []
    for number, each in enumerate((waiting, other)):
        each.factor = 0.5
        each.second.bias.requires_grad_(False)
        each.register_forward_hook(lambda *_, n=number: calls.append(f"hook {n}"))
    pairs = [(waiting, other), (twin, model_of(1))]
    pairs[1][1].shift.mul_(3)
    optimizers = [[torch.optim.SGD(m.parameters(), lr=0.1) for m in pair] for pair in pairs]
    for pair, its in zip(pairs, optimizers, strict=True):
        losses = [steps(m, o, torch.float64) for m, o in zip(pair, its, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        require_same(*pair)
    assert calls == ["hook 0"] * 3 + ["hook 1"] * 3
    assert all(torch.equal(user[path], value) for path, value in model.state_dict().items())
    # And as any other split module from then on.
    waiting.load_state_dict(model.state_dict())
    require_same(waiting, model)
    save_checkpoint(folder / "b", waiting, optimizers[0][0])
    load_checkpoint(folder / "b", twin, optimizers[1][0])
    copied = copy.deepcopy(nn.ModuleList([waiting, waiting]))
    assert copied[0] is copied[1]
    x = torch.ones(4, 6).double()
    assert float(copied[0](x)) == pytest.approx(float(waiting(x)), rel=1e-14)
    # Of another type, buffers included.
    narrow: Any = autoparallel.autoparallelize(model_of(2), 2).to(torch.float32)
    plain = model_of(2).to(torch.float32)
    assert {value.dtype for value in full_state_dict(narrow).values()} == {torch.float32}
    both = [
        steps(m, torch.optim.SGD(m.parameters(), lr=0.1), torch.float32) for m in (narrow, plain)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    assert {value.dtype for value in full_state_dict(narrow).values()} == {torch.float32}


def test_before_the_first_call(tmp_path: Path) -> None:
    run_processes(before_the_first_call, 2, tmp_path)
    written = torch.load(tmp_path / "own", weights_only=True)
    expected = model_of(1)
    expected.shift.mul_(3)
    assert written["kind"] == "Model"
    for path, value in expected.state_dict().items():
        assert torch.equal(written["weights"][path], value), path
