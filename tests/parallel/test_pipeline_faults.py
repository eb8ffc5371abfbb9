"""Stages that fail, wait in vain or are asked for too much, and optimizers, on two processes."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.discovery.forked_run import Limits, run_in_fork
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.runtime import faults

TOLERANCE = 1e-11
PATIENCE = timedelta(seconds=60)


class Rows(nn.Module):
    """A model whose second half has no parameters, and knows which labels it takes."""

    def __init__(self, functions: int = 24) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.functions = functions
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.hidden(rows)))
        for _ in range(self.functions):
            logits = logits.sin()
        return nn.functional.cross_entropy(logits, labels)


class Halves(nn.Module):
    """Two linear layers of float16, whose gradients are small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(rows).tanh()).square().mean() * 1e-5


def batch(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "rows": torch.randn(rows, 6, generator=generator, dtype=torch.float64),
        "labels": torch.randint(4, (rows,), generator=generator),
    }


def half_rows() -> torch.Tensor:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).half()


@cache
def planned(kind: str) -> Plan:
    options: dict[str, Any] = {"mesh": Mesh(pp=2), "microbatches": 3}
    if kind == "halves":
        return autoparallel.make_plan(Halves().half(), example_inputs=half_rows(), **options)
    return autoparallel.make_plan(Rows().double(), example_inputs=batch(), **options)


def plan_all() -> None:
    planned("rows")
    planned("halves")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {path: each.grad.full_tensor() for path, each in named if each.grad is not None}


def stepped(optimizer: str, model: nn.Module) -> list[float]:
    """Losses of some steps of an optimizer of torch."""
    stepping = getattr(torch.optim, optimizer)(
        [each for each in model.parameters() if optimizer != "Muon" or each.ndim == 2], lr=0.05
    )
    losses = []

    def closure() -> torch.Tensor:
        stepping.zero_grad()
        loss: torch.Tensor = model(**batch())
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(3):
        stepping.step(closure)
    return losses


def message(function: Any) -> str:
    try:
        function()
    except (AutoParallelError, IndexError) as error:
        return str(error)
    return "nothing was refused"


def on_two(rank: int) -> dict[str, Any]:
    model = autoparallel.apply_plan(Rows().double(), planned("rows"), check_inputs=3)
    found: dict[str, Any] = {"held": [n for n, p in model.named_parameters() if not p.is_meta]}
    model(**batch()).backward()
    found["gradients"] = gradients(model)
    for optimizer in ("SGD", "Muon", "Adafactor"):
        fresh = autoparallel.apply_plan(Rows().double(), planned("rows"))
        found[optimizer] = stepped(optimizer, fresh)
    fresh = autoparallel.apply_plan(Rows().double(), planned("rows"))
    found["LBFGS"] = message(lambda: stepped("LBFGS", fresh))
    # One rank with other rows of the same size, and with more of them.
    other = batch()
    other["rows"] = other["rows"] + rank
    found["other rows"] = message(lambda: model(**other))
    found["more rows"] = message(lambda: model(**batch(6 + rank)))
    # Gradients that are zero in float16 unless the loss is scaled.
    halves = autoparallel.apply_plan(Halves().half(), planned("halves"))
    found["scaled"] = []
    for scale in (2.0**14, 2.0**14, 2.0**10):
        (halves(half_rows()) * scale).backward()
        found["scaled"].append(gradients(halves))
        halves.zero_grad()
    found["failed"], found["waited"] = _SAID, _WAITED
    return found


# What the ranks said of an op that failed on the last stage; each was a process, and has ended.
_SAID: list[str] = []


def failing(rank: int, folder: str) -> bytes:
    """Return what one rank says where an op of the last stage fails."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2, timeout=PATIENCE
    )
    # Nobody else will come: what is waited for is in the store before a connection is closed.
    faults._PATIENCE_SECONDS = 0.5
    model = autoparallel.apply_plan(Rows().double(), planned("rows"), check_inputs=0)
    wrong = batch()
    wrong["labels"] = torch.full_like(wrong["labels"], 9)
    return message(lambda: model(**wrong)).encode()


# What the first rank said of a neighbour that never answers.
_WAITED: list[str] = []


def waiting(rank: int, folder: str) -> bytes:
    """Return what the first rank says where the second one hangs before its stage."""
    store = torch.distributed.FileStore(f"{folder}/hung", 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=6)
    )
    faults._PATIENCE_SECONDS = 0.5
    model = autoparallel.apply_plan(Rows().double(), planned("rows"), check_inputs=0)
    if rank:
        # It would hang for ever, but for the test to end.
        store.wait(["told"], timedelta(seconds=200))
        return b""
    told = message(lambda: model(**batch()))
    store.set("told", "yes")
    return told.encode()


def before_all() -> None:
    plan_all()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        answers = pool.map(
            lambda case: run_in_fork(lambda: case[0](case[1], folder), Limits()),
            [(failing, 0), (failing, 1), (waiting, 0), (waiting, 1)],
        )
        told = [answer.decode() for answer in answers]
        _SAID.extend(told[:2])
        _WAITED.append(told[2])


@pytest.fixture(scope="module")
def said() -> list[dict[str, Any]]:
    return run_processes(on_two, 2, before=before_all)


def test_a_stage_without_parameters(said: list[dict[str, Any]]) -> None:
    reference = Rows().double()
    reference(**batch()).backward()
    assert said[1]["held"] == []
    assert said[1]["gradients"] == {}
    for path, parameter in reference.named_parameters():
        torch.testing.assert_close(
            said[0]["gradients"][path], parameter.grad, rtol=TOLERANCE, atol=TOLERANCE
        )


@pytest.mark.parametrize("optimizer", ["SGD", "Muon", "Adafactor"])
def test_optimizers_step_with_stages(said: list[dict[str, Any]], optimizer: str) -> None:
    # Muon multiplies in bfloat16.
    within = 1e-3 if optimizer == "Muon" else TOLERANCE
    expected = stepped(optimizer, Rows().double())
    for found in said:
        torch.testing.assert_close(found[optimizer], expected, rtol=within, atol=within)


def test_an_optimizer_of_all_parameters_is_refused(said: list[dict[str, Any]]) -> None:
    for found in said:
        assert "LBFGS" in found["LBFGS"]


@pytest.mark.parametrize("kind", ["other rows", "more rows"])
def test_one_rank_with_another_batch(said: list[dict[str, Any]], kind: str) -> None:
    for found in said:
        assert "rank" in found[kind]
        assert "fix:" in found[kind]


def test_scaled_losses_of_float16(said: list[dict[str, Any]]) -> None:
    for place, scale in enumerate((2.0**14, 2.0**14, 2.0**10)):
        reference = Halves().half()
        (reference(half_rows()) * scale).backward()
        for path, parameter in reference.named_parameters():
            assert parameter.grad is not None
            held = [found["scaled"][place] for found in said if path in found["scaled"][place]]
            assert held
            for some in held:
                # As exact as sums of three parts are, of ten bits each.
                torch.testing.assert_close(some[path], parameter.grad, rtol=0.02, atol=1e-6)
                assert some[path].abs().sum() > 0


def test_a_stage_that_fails_is_named(said: list[dict[str, Any]]) -> None:
    told, own = said[0]["failed"]
    assert "out of bounds" in own
    assert told.startswith("rank 1 has failed, and this one waited for it")
    assert "between stages" in told
    assert "out of bounds" in told


def test_a_neighbour_that_hangs_is_named(said: list[dict[str, Any]]) -> None:
    """After the time limit of the process group, and where this rank waited."""
    (told,) = said[0]["waited"]
    assert told.startswith("this rank waited, and rank 1 did not answer")
    assert "between stages" in told
    assert "no word from 1" in told
    assert "fix:" in told


def test_more_stages_than_ops_is_refused() -> None:
    with pytest.raises(AutoParallelError, match="cannot be cut into 64 stages"):
        autoparallel.make_plan(Rows(1).double(), mesh=Mesh(pp=64), example_inputs=batch())
