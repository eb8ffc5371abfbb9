"""Threads that plan at once get the plans that each would get alone, and leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.support.one_at_a_time import OneAtATime


class Small(nn.Module):
    """A model whose plan is found quickly. fails: an error that its forward raises."""

    def __init__(self, fails: BaseException | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.fails = fails

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.first(self.embedding(tokens))))
        if self.fails is not None:
            raise self.fails
        return x.square().mean()


TOKENS = torch.arange(6).reshape(2, 3)


def planned(model: nn.Module) -> str:
    return autoparallel.make_plan(model, 2, example_inputs=TOKENS).to_json()


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """Return what each of several functions returns or raises, run at once."""
    results: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(place: int) -> None:
        start.wait()
        try:
            results[place] = works[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_get_the_plans_that_each_gets_alone() -> None:
    alone = planned(Small())
    broken = Small(fails=RuntimeError("its own"))
    first, second, third, simulated = in_threads(
        lambda: planned(Small()),
        lambda: planned(Small()),
        lambda: planned(broken),
        lambda: autoparallel.simulate(Small(), 2, example_inputs=TOKENS).apart,
    )
    assert first == second == alone
    assert isinstance(third, AutoParallelError)
    assert simulated == 0
    assert planned(Small()) == alone


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), KeyboardInterrupt(), RuntimeError("its own")], ids=repr
)
def test_a_trace_that_fails_leaves_nothing_behind(error: BaseException) -> None:
    """Nor is the model told to be at fault where it is not."""
    alone = planned(Small())
    raised = AutoParallelError if isinstance(error, RuntimeError) else type(error)
    with pytest.raises(raised):
        planned(Small(fails=error))
    assert planned(Small()) == alone


def test_who_holds_the_lock_holds_it_for_simulated_ranks() -> None:
    """Else ranks that plan in a simulation would wait for the simulation, for ever."""
    from autoparallel.mesh import Mesh
    from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks

    lock = OneAtATime()
    order: list[str] = []

    def other() -> None:
        with lock.held():
            order.append("other")

    def rank(_: Ranks) -> None:
        with lock.held():
            order.append("rank")

    with lock.held():
        thread = threading.Thread(target=other)
        thread.start()
        run_ranks(thread_ranks(Mesh(tp=2)), rank)
    thread.join()
    assert order == ["rank", "rank", "other"]
