"""Rows of forwards that do what no trace can see, each in another way."""

from __future__ import annotations

import asyncio
import collections
import json
import queue
import random
import time
import uuid
import weakref
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from .case import Case, whole
from .models import Scores, built, inputs
from .registry import in_group

habit = in_group("What no trace sees")


class Scaled(Scores):
    """Scores times a factor that a child class finds out in its own way."""

    def factor(self, x: torch.Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor(x)


def train(model: Any, calls: int = 3) -> list[torch.Tensor]:
    """Call the model some times, with a backward pass each, and return the results."""
    results = []
    for seed in range(calls):
        y = model(inputs(seed=seed))
        whole(y).square().mean().backward()
        results.append(whole(y).detach())
    return results


def moves(case: Case, kind: Any) -> None:
    """Require another result in each call, the same on all ranks."""
    model = case.split(built(kind), inputs())
    first, second = (whole(model(inputs())).detach() for _ in range(2))
    assert not torch.equal(first, second), "the same number in each call"
    if dist.is_initialized():
        for mine in (first, second):
            all_of_them = [torch.empty_like(mine) for _ in range(case.world_size)]
            dist.all_gather(all_of_them, mine)
            assert all(torch.equal(mine, other) for other in all_of_them), "the ranks differ"


def fresh(name: str, factor: Any) -> None:
    """Register a row for a number that is another in each call."""

    def run(case: Case) -> None:
        moves(case, type("Fresh", (Scaled,), {"factor": factor, "__module__": __name__}))

    habit(f"a number of {name}, in forward")(run)


fresh("time.time_ns()", lambda self, x: 1 + (time.time_ns() // 1000 % 1000) / 1000)
fresh("perf_counter(), imported by name", lambda self, x: 1 + perf_counter() % 1)
fresh("random.Random(), not seeded", lambda self, x: 1 + random.Random().random())
fresh("np.random.default_rng(), not seeded", lambda self, x: 1 + np.random.default_rng().normal())
fresh("uuid.uuid4()", lambda self, x: 1 + uuid.uuid4().int % 10**6 / 1e6)


class Coarse(Scaled):
    """It calls a function of a table."""

    def factor(self, x: torch.Tensor) -> Any:
        return 2 if NOW["clock"]() > 1000 else 1


NOW: dict[str, Any] = {"clock": lambda: 0}


@habit("a function in a global dict, replaced between calls")
def coarse(case: Case) -> None:
    def script(model: Any) -> Any:
        NOW["clock"] = lambda: 0
        first = train(model, 1)
        NOW["clock"] = lambda: 2000
        return first + train(model, 1)

    case.compare(script, lambda: built(Coarse), inputs())


class Hourly(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return 1.0 if time.time() < Hourly.deadline else 3.0

    deadline = 0.0


@habit("a deadline that time.time() passes between two calls")
def deadline(case: Case) -> None:
    def script(model: Any) -> Any:
        Hourly.deadline = time.time() + 3600
        first = train(model, 2)
        real, time.time = time.time, lambda: real() + 7200
        try:
            return first + train(model, 1)
        finally:
            time.time = real

    Hourly.deadline = time.time() + 3600
    case.compare(script, lambda: built(Hourly), inputs())


class FromFile(Scaled):
    path = ""

    def factor(self, x: torch.Tensor) -> Any:
        with open(self.path) as file:
            return float(json.load(file)["factor"])


@habit("a file that forward reads at each call, and that changes")
def from_file(case: Case) -> None:
    FromFile.path = str(case.folder / f"settings{case.rank}.json")

    def put(value: float) -> None:
        Path(FromFile.path).write_text(json.dumps({"factor": value}))

    def script(model: Any) -> Any:
        put(2.0)
        first = train(model, 1)
        put(3.0)
        return first + train(model, 1)

    put(2.0)
    case.compare(script, lambda: built(FromFile), inputs())


class Default(Scaled):
    """A list as a default argument remembers between the calls."""

    def factor(self, x: torch.Tensor, seen: list[int] = []) -> Any:  # noqa: B006
        seen.append(1)
        return 1 + len(seen) % 2


@habit("a list as a default argument, which forward appends to")
def default_argument(case: Case) -> None:
    def script(model: Any) -> Any:
        Default.factor.__defaults__[0].clear()
        return train(model)

    case.compare(script, lambda: built(Default), inputs())


class Closure(Scaled):
    def __init__(self) -> None:
        super().__init__()
        count = 0

        def following() -> int:
            nonlocal count
            count += 1
            return count

        self.following = following

    def factor(self, x: torch.Tensor) -> Any:
        return self.following()


@habit("a closure that counts its calls, kept in an attribute")
def closure(case: Case) -> None:
    case.compare(train, lambda: built(Closure), inputs())


class Queued(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.waiting: Any = queue.SimpleQueue()
        for number in range(12):
            self.waiting.put(number + 1.0)

    def factor(self, x: torch.Tensor) -> Any:
        return self.waiting.get()


@habit("numbers that forward takes out of a queue.SimpleQueue")
def queued(case: Case) -> None:
    case.compare(train, lambda: built(Queued), inputs())


class History(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.history: Any = collections.deque(maxlen=4)

    def factor(self, x: torch.Tensor) -> Any:
        self.history.append(x.detach().mean())
        return torch.stack(list(self.history)).mean() + 2


@habit("a deque of means of the last batches, which forward averages")
def history(case: Case) -> None:
    case.compare(train, lambda: built(History), inputs())


class Hidden(Scaled):
    """A weight in a plain list, which is no parameter of the model, and trained by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.more = [torch.full((5,), 2.0, dtype=torch.float64, requires_grad=True)]

    def factor(self, x: torch.Tensor) -> Any:
        return self.more[0]


@habit("a trained tensor in a plain list, which is no parameter")
def hidden_leaf(case: Case) -> None:
    def script(model: Any) -> Any:
        first = train(model, 1)
        weight = model.more[0]
        with torch.no_grad():
            weight -= 0.1 * weight.grad
        weight.grad = None
        first += train(model, 1)
        return first, weight.detach(), weight.grad

    case.compare(script, lambda: built(Hidden), inputs())


class Weakly(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Marker()
        self.settings.factor = 2.0
        self.reference = weakref.ref(self.settings)

    def factor(self, x: torch.Tensor) -> Any:
        return self.reference().factor


@habit("a setting behind a weakref")
def weakly(case: Case) -> None:
    def script(model: Any) -> Any:
        first = train(model, 1)
        model.settings.factor = 3.0
        return first + train(model, 1)

    case.compare(script, lambda: built(Weakly), inputs())


class Gradient(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        gradient = self.down.weight.grad
        return 1.0 if gradient is None else 1 + gradient.norm()


@habit("the last gradient of a weight, which forward reads")
def last_gradient(case: Case) -> None:
    case.compare(train, lambda: built(Gradient), inputs())


class Noisy(Scores):
    """It disturbs a weight for the time of the forward, and puts it back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.up.weight.data.clone()
        self.up.weight.data.mul_(1.5)
        y = super().forward(x)
        self.up.weight.data.copy_(kept)
        return y


@habit("a weight that forward disturbs and puts back (weight.data.mul_)")
def noisy(case: Case) -> None:
    def script(model: Any) -> Any:
        return [whole(model(inputs(seed=s))).detach() for s in range(2)]

    case.compare(script, lambda: built(Noisy), inputs())


class Switching(Scores):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.eval() if self.training else self.train()
        return y * (2 if self.training else 1)


@habit("a forward that switches its own mode: self.eval()")
def switching(case: Case) -> None:
    case.compare(train, lambda: built(Switching), inputs())


class Optimizing(Scores):
    """It trains a number of its own inside of the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = torch.zeros(6, dtype=x.dtype, requires_grad=True)
        for _ in range(2):
            with torch.enable_grad():
                loss = (x + shift).square().mean()
                (slope,) = torch.autograd.grad(loss, shift)
            shift = (shift - 0.1 * slope).detach().requires_grad_()
        return super().forward(x + shift.detach())


@habit("an inner loop of optimization in forward, by torch.autograd.grad")
def optimizing(case: Case) -> None:
    case.compare(train, lambda: built(Optimizing), inputs())


class Async(Scores):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        async def part(sign: int) -> torch.Tensor:
            await asyncio.sleep(0)
            return super(Async, self).forward(sign * x)

        async def both() -> list[torch.Tensor]:
            return list(await asyncio.gather(part(1), part(-1)))

        first, second = asyncio.run(both())
        return first + 2 * second


@habit("a forward that runs coroutines by asyncio.run")
def coroutines(case: Case) -> None:
    case.compare(train, lambda: built(Async), inputs())


class Stride(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return 1.0 if x.is_contiguous() else 2.0


@habit("x.is_contiguous() decides, and the next input is transposed")
def stride(case: Case) -> None:
    def script(model: Any) -> Any:
        a = whole(model(inputs()))
        b = whole(model(inputs().t().contiguous().t()))
        (a.sum() + b.square().sum()).backward()
        return a.detach(), b.detach()

    case.compare(script, lambda: built(Stride), inputs())


class Box(Scores):
    """It leaves its hidden state in a dict that the caller gives."""

    def forward(self, x: torch.Tensor, cache: dict[str, Any]) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        if "hidden" in cache:
            hidden = hidden + cache["hidden"]
        cache["hidden"] = hidden.detach()
        cache["calls"] = cache.get("calls", 0) + 1
        return self.down(self.norm(hidden))


@habit("a dict of the caller's in which forward leaves a state")
def boxed(case: Case) -> None:
    def script(model: Any) -> Any:
        cache: dict[str, Any] = {}
        results = [whole(model(inputs(seed=s), cache)).detach() for s in range(3)]
        return results, whole(cache["hidden"]), cache["calls"]

    case.compare(script, lambda: built(Box), (inputs(), {}))


class Doubling(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.tanh else result


@habit("a TorchFunctionMode of the caller's around a call")
def function_mode(case: Case) -> None:
    def script(model: Any) -> Any:
        first = whole(model(inputs())).detach()
        with Doubling():
            second = whole(model(inputs())).detach()
        return first, second

    case.compare(script, lambda: built(Scores), inputs())


class RankOf(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return 1.0 + (dist.get_rank() if dist.is_initialized() else 0)


@habit("the rank of the process, which forward computes with")
def rank_of(case: Case) -> None:
    if case.world_size == 1:
        case.compare(train, lambda: built(RankOf), inputs())
        return
    model = case.split(built(RankOf), inputs())
    model(inputs())
    raise AssertionError("each rank computes with another number")


class Seeded(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return 1 + torch.initial_seed() % 1000 / 1000


@habit("torch.initial_seed() in forward")
def initial_seed(case: Case) -> None:
    def script(model: Any) -> Any:
        torch.manual_seed(1)
        first = train(model, 1)
        torch.manual_seed(2)
        return first + train(model, 1)

    case.compare(script, lambda: built(Seeded), inputs())


class Retrying(Scores):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            y = x.view(2, -1, 6)
        except RuntimeError:
            y = x.unsqueeze(0) * 2
        return super().forward(y)


@habit("try: x.view(2, -1, 6), except RuntimeError: another way")
def retrying(case: Case) -> None:
    def script(model: Any) -> Any:
        return [whole(model(inputs(count))).detach() for count in (6, 8, 5, 7)]

    case.compare(script, lambda: built(Retrying), inputs())


class Marker:
    """An object with a setting."""

    factor = 1.0
