"""Rows of names that refer to something else later: functions, their defaults, what tables hold."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .case import Case, whole
from .models import Scores, built, inputs
from .registry import in_group
from .unseen import Scaled, train

habit = in_group("Names that refer to something else later")


def helper(factor: float = 1.0) -> float:
    return factor


def twice() -> float:
    return 2.0


def plainly() -> float:
    return 1.0


TABLE = [1.0] * 200
CODE = plainly.__code__


def between(case: Case, kind: Any, change: Callable[[bool], Any]) -> None:
    """Compare results and gradients before a change and after it."""

    def script(model: Any) -> Any:
        change(False)
        first = train(model, 1)
        change(True)
        try:
            return first + train(model, 1)
        finally:
            change(False)

    case.compare(script, lambda: built(kind), inputs())


class Defaulted(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return helper()


@habit("the default of a function's argument: function.__defaults__ = (2.0,)")
def defaults(case: Case) -> None:
    between(
        case, Defaulted, lambda other: setattr(helper, "__defaults__", (2.0 if other else 1.0,))
    )


class Coded(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return plainly()


@habit("the code of a function: function.__code__ = another.__code__")
def code(case: Case) -> None:
    between(
        case, Coded, lambda other: setattr(plainly, "__code__", twice.__code__ if other else CODE)
    )


class Rooted(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return math.sqrt(4.0)


@habit("a function of a library: math.sqrt = another")
def of_a_library(case: Case) -> None:
    sqrt = math.sqrt
    between(case, Rooted, lambda other: setattr(math, "sqrt", abs if other else sqrt))


class Squashed(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return torch.tanh(x).sum()


@habit("a function of torch: torch.tanh = another")
def of_torch(case: Case) -> None:
    tanh = torch.tanh
    between(case, Squashed, lambda other: setattr(torch, "tanh", torch.sin if other else tanh))


class Soft(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return nn.functional.softmax(x, -1).square().sum()


@habit("a function around one of torch's: nn.functional.softmax = a function that calls it")
def around_one_of_torch(case: Case) -> None:
    softmax = nn.functional.softmax

    def doubled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * softmax(*args, **kwargs)

    between(
        case, Soft, lambda other: setattr(nn.functional, "softmax", doubled if other else softmax)
    )


class Collected(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        asks = gc.isenabled
        return 2.0 if asks() else 1.0


@habit("a question under another name: asks = gc.isenabled, and asks() in forward")
def another_name(case: Case) -> None:
    between(case, Collected, lambda other: gc.disable() if other else gc.enable())


class Evaluated(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return eval("TABLE[3]")


class Tabled(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return TABLE[150]


@habit("code that is a text: eval('TABLE[3]') in forward")
def text(case: Case) -> None:
    between(case, Evaluated, lambda other: TABLE.__setitem__(3, 2.0 if other else 1.0))


@habit("an item of a global table of 200 numbers")
def table(case: Case) -> None:
    between(case, Tabled, lambda other: TABLE.__setitem__(150, 2.0 if other else 1.0))


class Settings:
    """Settings of a class, which its objects have none of themselves."""

    scale = 1.0

    @property
    def doubled(self) -> float:
        return 2 * self.scale


class Inner:
    """An object that has settings."""

    def __init__(self) -> None:
        self.settings = Settings()


INNER = Inner()


class Classed(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return INNER.settings.doubled


@habit("a setting on a class, read by a property of an object in a global object")
def of_a_class(case: Case) -> None:
    between(case, Classed, lambda other: setattr(Settings, "scale", 2.0 if other else 1.0))


@habit("another object in the place of one that a global object has")
def of_another(case: Case) -> None:
    def change(other: bool) -> None:
        INNER.settings = Settings()
        INNER.settings.scale = 3.0 if other else 1.0

    between(case, Classed, change)


@functools.lru_cache
def remembered(size: int) -> torch.Tensor:
    return torch.full((size,), TABLE[150], dtype=torch.float64)


class Remembering(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return remembered(5)


@habit("a mask under functools.lru_cache, of a setting that changes, and then cache_clear()")
def cached(case: Case) -> None:
    def script(model: Any) -> Any:
        results = []
        for number, clear in ((1.0, True), (2.0, False), (2.0, True)):
            TABLE[150] = number
            if clear:
                remembered.cache_clear()
            results += train(model, 1)
        TABLE[150] = 1.0
        return results

    case.compare(script, lambda: built(Remembering), inputs())


class Latest(Scores):
    """Does something else with the input that it was given last time."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 2.0 if x is self.latest else 1.0
        self.latest = x
        return super().forward(x) * factor


@habit("an input that the model keeps, and finds again by `is` in the next call")
def latest(case: Case) -> None:
    def script(model: Any) -> Any:
        model.latest = None
        one, other = inputs(), inputs(seed=1)
        results = []
        for x in (one, one, other, one):
            y = model(x)
            whole(y).square().mean().backward()
            results.append(whole(y).detach())
        return results

    case.compare(script, lambda: built(Latest), inputs())


class Paired(Scores):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * (2.0 if x is y else 1.0) + super().forward(y)


@habit("one tensor as two arguments, which forward compares by `is`")
def paired(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs()
        results = []
        for pair in ((x, inputs(seed=1)), (x, x), (x, inputs(seed=1))):
            y = model(*pair)
            whole(y).square().mean().backward()
            results.append(whole(y).detach())
        return results

    case.compare(script, lambda: built(Paired), (inputs(), inputs(seed=1)))


class Counting(Scaled):
    def factor(self, x: torch.Tensor) -> Any:
        return 1.0 + next(self.parameters())._version


@habit("parameter._version in forward: how often a weight was written to")
def version(case: Case) -> None:
    def script(model: Any) -> Any:
        first = train(model, 1)
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        return first + train(model, 1)

    case.compare(script, lambda: built(Counting), inputs())
