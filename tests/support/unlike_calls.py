"""Calls of a split model in which the last rank differs from the others, and what is said of it."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.parallel import call_headers, host_group
from autoparallel.parallel.call_headers import CallHeaders
from autoparallel.runtime.groups import ProcessGroup
from autoparallel.support.pytree import flatten

__all__ = [
    "calls",
    "headers_of_hosts",
    "headers_without_hosts",
    "host_that_left",
    "results_of_python",
]


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(6, 12), nn.Linear(12, 6), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))) * self.scale


def calls(rank: int, world_size: int) -> dict[str, str]:
    """Return the errors of calls in which the last rank differs, after four in which none does."""
    torch.manual_seed(0)
    x, last = torch.randn(4, 6), rank == world_size - 1
    model: Any = autoparallel.autoparallelize(Scores(), world_size, example_inputs=(x,))
    for _ in range(2):
        model.eval()(x)
        model.train()(x)
    said = {}

    def tried(name: str, *args: Any) -> None:
        try:
            model(*args)
            said[name] = ""
        except AutoParallelError as error:
            said[name] = str(error)

    tried("values", x + last)
    tried("one value", x.index_fill(1, torch.tensor(2), 0) if last else x)
    tried("sizes", x[: 3 if last else 4])
    model.train(not last)
    tried("modes", x)
    model.train()
    model.up.weight.requires_grad_(not last)
    tried("frozen", x)
    model.up.weight.requires_grad_()
    model.scale = 2.0 if last else 1.0
    tried("attributes", x)
    model.scale = 1.0
    with torch.set_grad_enabled(not last):
        tried("gradients", x)
    hook = model.up.register_forward_hook(lambda *_: None) if last else None
    tried("hooks", x)
    if hook is not None:
        hook.remove()
    tried("none", x)
    return said


class Asking(Scores):
    """It asks the process, and multiplies by the answer if it is told to."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        y = super().forward(x)
        self.spent = time.perf_counter() - begin
        return y * os.getpid() if self.counts else y


def results_of_python(rank: int, world_size: int) -> list[str]:
    """Return what is said of two models that ask: one computes with the answer, one does not."""
    said = []
    for counts in (True, False):
        torch.manual_seed(0)
        x = torch.randn(4, 6)
        model: Any = autoparallel.autoparallelize(Asking(counts), world_size, example_inputs=(x,))
        try:
            model(x)
            said.append(model.plan.breaks[0].reason)
        except AutoParallelError as error:
            said.append(str(error))
    return said


def headers_of_hosts(rank: int, world_size: int) -> list[str]:
    """Return what is said in each of five calls whose headers travel as on NCCL.

    The last rank is in another mode in the first call, which is waited for, and in the third.
    """
    call_headers.communication_device = lambda: "cuda"  # type: ignore[assignment]
    headers = CallHeaders(ProcessGroup(dist.group.WORLD), "Scores", awaited=1)
    said = []
    for number in range(5):
        unlike = number in (0, 2) and rank == world_size - 1
        inputs, skeleton = flatten({"x": torch.ones(2, 3)})
        try:
            headers.compare((not unlike,), inputs, skeleton, (), 0, ["x"])
            said.append("")
        except AutoParallelError as error:
            said.append(str(error))
    return said


def headers_without_hosts(rank: int, world_size: int) -> list[tuple[bool, list[str]]]:
    """Have the last rank fail to make a group of hosts: by itself, with the others, and not at all.

    Return for each whether there is a group, after a call in which the last rank is in another
    mode, and what this rank has logged.
    """
    call_headers.communication_device = lambda: "cuda"  # type: ignore[assignment]
    # No test waits for minutes.
    host_group._CONNECTING = timedelta(seconds=2)  # type: ignore[misc]
    make = host_group.gloo_ranks
    tried, notes = [], Notes()
    logging.getLogger("autoparallel").addHandler(notes)
    for failing in (1, world_size, 0):

        def double(store: Any, rank: int, size: int, patience: Any, failing: int = failing) -> Any:
            if dist.get_rank() == world_size - 1 and size == failing:
                raise RuntimeError("no such network")
            return make(store, rank, size, patience)

        host_group.gloo_ranks = double
        headers = CallHeaders(ProcessGroup(dist.group.WORLD), "Scores", awaited=0)
        inputs, skeleton = flatten({"x": torch.ones(2, 3)})
        headers.compare((rank == 0,), inputs, skeleton, (), 0, ["x"])
        tried.append((headers.hosts is not None, notes.taken()))
        dist.barrier()
    return tried


def host_that_left(rank: int, world_size: int) -> str:
    """Return what is said of the last rank, which closes its connections after a call."""
    call_headers.communication_device = lambda: "cuda"  # type: ignore[assignment]
    headers = CallHeaders(ProcessGroup(dist.group.WORLD), "Scores", awaited=1)
    inputs, skeleton = flatten({"x": torch.ones(2, 3)})
    headers.compare((True,), inputs, skeleton, (), 0, ["x"])
    if rank == world_size - 1:
        headers.hosts = None
        dist.barrier()
        return ""
    dist.barrier()
    try:
        for _ in range(2):
            headers.compare((True,), inputs, skeleton, (), 0, ["x"])
    except AutoParallelError as error:
        return str(error)
    return "nothing"


class Notes(logging.Handler):
    """It keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def taken(self) -> list[str]:
        texts, self.texts = self.texts, []
        return texts
