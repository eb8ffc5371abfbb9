"""One rank that fails, or is gone, in several ways, and what all ranks say of it."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autoparallel
from autoparallel.discovery.forked_run import Limits, run_in_fork
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.runtime import faults

__all__ = ["FAILS", "FAULTS", "RANKS", "launch", "said"]

RANKS, FAILS = 3, 2
PATIENCE = timedelta(seconds=60)


def given() -> torch.Tensor:
    return torch.randint(12, (6, 5), generator=torch.Generator().manual_seed(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down = nn.Embedding(12, 8), nn.Linear(8, 24), nn.Linear(24, 12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.words(tokens)))).square().mean()


def refuse(gradient: torch.Tensor) -> torch.Tensor:
    raise ValueError("a hook of one rank")


def wrong_token(model: Any, tokens: torch.Tensor, fails: bool) -> None:
    """Every rank is given the same numbers, and one of them has the part that is wrong."""
    tokens[-1, -1] = 99
    model(tokens).backward()


def failing_hook(model: Any, tokens: torch.Tensor, fails: bool) -> None:
    loss = model(tokens)
    if fails:
        loss.register_hook(refuse)
    loss.backward()


def gone(model: Any, tokens: torch.Tensor, fails: bool) -> None:
    loss = model(tokens)
    if not fails:
        loss.backward()


def gone_from_a_parameter(model: Any, tokens: torch.Tensor, fails: bool) -> None:
    if not fails:
        model.up.weight.full_tensor()


def gone_from_a_sum(model: Any, tokens: torch.Tensor, fails: bool) -> None:
    """It is the user's own: the error stays, and is explained where it ends the process."""
    if not fails:
        dist.all_reduce(torch.ones(2))


def caught_alike(model: Any, tokens: torch.Tensor, fails: bool) -> None:
    """An error that all ranks catch is forgotten in the next call."""
    with suppress(IndexError):
        model(tokens + 12)
    model(tokens)
    if not fails:
        model(tokens)


FAULTS: dict[str, Callable[[Any, torch.Tensor, bool], None]] = {
    each.__name__: each
    for each in (
        wrong_token,
        failing_hook,
        gone,
        gone_from_a_parameter,
        gone_from_a_sum,
        caught_alike,
    )
}
SPLIT = (
    "up.weight on tp is split 0",
    "down.weight on tp is split 1",
    "words.weight on tp is whole",
)


def said_by(fault: str, rank: int, plan: Plan, folder: str) -> bytes:
    """Return, pickled, the error of one rank, and what is written where that ends the process."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{fault}",
        rank=rank,
        world_size=RANKS,
        timeout=PATIENCE,
    )
    # Nobody else will come: what is waited for is in the store before a connection is closed.
    faults._PATIENCE_SECONDS = 0.5
    tokens, written = given(), list[str]()
    model = autoparallel.apply_plan(Words(), plan)
    text = ""
    try:
        FAULTS[fault](model, tokens, rank == FAILS)
    except (AutoParallelError, RuntimeError, IndexError, ValueError) as error:
        text = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        sys.stderr = _Kept(written)  # type: ignore[assignment]
        sys.excepthook(type(error), error, error.__traceback__)
    return pickle.dumps((text, "".join(written)))


# What the ranks said, fault by fault, in the process that they were forks of and in its forks.
_SAID: dict[str, list[tuple[str, str]]] = {}


def said(rank: int) -> dict[str, list[tuple[str, str]]]:
    """Return what the ranks said, fault by fault, to `launch`."""
    return _SAID


def launch(folder: str) -> None:
    """Let the ranks fail, fault by fault. Each rank is a fork of this process, and ends.

    This process has had no group of gloo's: in torch 2.11 its forks could have none.
    """
    plans = {
        name: autoparallel.make_plan(Words(), mesh=mesh, example_inputs=(given(),), constraints=by)
        for name, mesh, by in (("tp", Mesh(tp=RANKS), SPLIT), ("dp", Mesh(dp=RANKS), ()))
    }
    with ThreadPoolExecutor(RANKS) as pool:
        for fault in FAULTS:
            plan = plans["dp" if fault == "wrong_token" else "tp"]
            answers = pool.map(
                lambda rank, fault=fault, plan=plan: run_in_fork(
                    lambda: said_by(fault, rank, plan, folder), Limits()
                ),
                range(RANKS),
            )
            _SAID[fault] = [pickle.loads(answer) for answer in answers]


class _Kept:
    def __init__(self, written: list[str]) -> None:
        self.write, self.flush = written.append, lambda: None
