"""A rank that fails, or is gone, is named by those that wait for it, with the op of the model."""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.discovery.forked_run import Limits, run_in_fork
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.runtime import faults

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
    with pytest.raises(IndexError):
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


def launch(rank: int, folder: str) -> dict[str, list[tuple[str, str]]]:
    """Return what the ranks say, fault by fault. Each rank is a fork of this process, and ends."""
    plans = {
        name: autoparallel.make_plan(Words(), mesh=mesh, example_inputs=(given(),), constraints=by)
        for name, mesh, by in (("tp", Mesh(tp=RANKS), SPLIT), ("dp", Mesh(dp=RANKS), ()))
    }
    dist.destroy_process_group()
    with ThreadPoolExecutor(RANKS) as pool:
        return {
            fault: [
                pickle.loads(answer)
                for answer in pool.map(
                    lambda rank, fault=fault: run_in_fork(
                        lambda: said_by(
                            fault, rank, plans["dp" if fault == "wrong_token" else "tp"], folder
                        ),
                        Limits(),
                    ),
                    range(RANKS),
                )
            ]
            for fault in FAULTS
        }


class _Kept:
    def __init__(self, written: list[str]) -> None:
        self.write, self.flush = written.append, lambda: None


@pytest.fixture(scope="module")
def said() -> dict[str, list[tuple[str, str]]]:
    with tempfile.TemporaryDirectory() as folder:
        (answers,) = run_processes(launch, 1, folder, timeout_seconds=100.0)
    return dict(answers)


Said = dict[str, list[tuple[str, str]]]
waiting = pytest.mark.parametrize("rank", [0, 1])


@waiting
def test_an_op_that_fails_on_one_rank(said: Said, rank: int) -> None:
    text = said["wrong_token"][FAILS][0]
    # The error stays torch's own; a note says which op of the model it is.
    assert text.startswith("IndexError: index out of range in self\nautoparallel: in `embedding = ")
    assert "(words, " in text
    told = said["wrong_token"][rank][0]
    assert told.startswith("AutoParallelError: rank 2 has failed, and this one waited for it")
    assert "s ago: IndexError: index out of range in self" in told
    assert "in `embedding = " in told.partition("why:")[2]
    assert f"where: rank {rank}, all_reduce of ranks 0, 1, 2, in `" in told
    assert "called at test_faults.py:" in told


@waiting
def test_an_error_in_the_backward_pass_of_one_rank(said: Said, rank: int) -> None:
    assert said["failing_hook"][FAILS][0] == "ValueError: a hook of one rank"
    told = said["failing_hook"][rank][0]
    assert told.startswith("AutoParallelError: rank 2 has failed, and this one waited for it")
    assert "ValueError: a hook of one rank, at test_faults.py:" in told
    assert "in the backward pass of `" in told
    assert "= convert(" in told


@waiting
def test_a_rank_that_is_gone(said: Said, rank: int) -> None:
    told = said["gone"][rank][0]
    assert "in the backward pass of `" in told
    assert "2 did not answer" in told.splitlines()[0]
    told = said["gone_from_a_parameter"][rank][0]
    assert told.startswith("AutoParallelError: ")
    assert "all_gather of full_tensor()" in told
    assert "2 did not answer" in told.splitlines()[0]


@waiting
def test_collectives_of_the_user_are_explained_where_they_end_the_process(
    said: Said, rank: int
) -> None:
    text, written = said["gone_from_a_sum"][rank]
    assert text.startswith("RuntimeError: ")
    assert "\nautoparallel: this rank waited, and rank" in written
    assert "called at test_faults.py:" in written


@waiting
def test_what_all_ranks_catch_is_forgotten(said: Said, rank: int) -> None:
    told = said["caught_alike"][rank][0]
    assert "2 did not answer" in told.splitlines()[0]
    assert "IndexError" not in told
