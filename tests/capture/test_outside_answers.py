"""A forward that asks clocks, the system, files or its callers is no graph: the answers change."""

from __future__ import annotations

import cProfile
import datetime
import gc
import inspect
import logging
import os
import os.path as osp
import random
import secrets
import sys
import time
import timeit
import uuid
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import einops
import numpy as np
import pytest
import torch
from broad_cases import share_of
from torch import nn

from autoparallel.capture.export import capture
from autoparallel.capture.outside_answers import OutsideAnswerError
from autoparallel.errors import CaptureError

X = torch.ones(2, 3)
FILE = Path(__file__)
LOG = logging.getLogger(__name__)


class Drawn:
    """An object that a model keeps, whose method asks."""

    def draw(self) -> float:
        return helped()


def helped() -> float:
    return secrets.randbelow(7)


def imported() -> float:
    from time import monotonic as now

    return now()


def subclasses() -> float:
    return float(len(Drawn.__subclasses__()))


def stack() -> float:
    return float(len(inspect.stack()))


def looked_at() -> float:
    """Code that may ask is watched, and inspect asks for purposes of its own."""
    if X.numel() < 0:
        return time.monotonic()
    return float(len(inspect.signature(helped).parameters))


def read() -> float:
    with open(FILE) as file:
        return float(len(file.readline()))


class Timer:
    """Its constructor asks, and what is called without a name."""

    def __init__(self) -> None:
        self.start = time.process_time()

    def __enter__(self) -> float:
        return time.thread_time() % 7

    def __exit__(self, *_: object) -> None:
        """End nothing."""


class Timers:
    kind = Timer


def entered() -> float:
    with Timer.__new__(Timer) as now:
        return now


ASKING: dict[str, Callable[[], Any]] = {
    "time.time_ns()": lambda: time.time_ns() % 7,
    "time.perf_counter()": lambda: perf_counter() % 1,
    "time.monotonic()": imported,
    "datetime.now()": lambda: datetime.datetime.now().hour,
    "random.Random()": lambda: random.Random().random(),
    "os.urandom()": helped,
    "os.urandom() ": lambda: uuid.uuid4().int % 7,
    "os.urandom()  ": lambda: os.urandom(1)[0],
    "os.urandom()   ": lambda: np.random.default_rng().normal(),
    "os.urandom()    ": lambda: random.SystemRandom().random(),
    "os.getpid()": lambda: os.getpid() % 7,
    "os.stat()": lambda: os.path.exists(FILE),
    "os.stat() ": FILE.exists,
    "open()": read,
    "open() ": lambda: len(FILE.read_text()),
    "id()": lambda: id(FILE) % 7,
    "sys._getframe()": lambda: len(sys._getframe().f_code.co_name),
    "sys._getframe() ": stack,
    "gc.get_objects()": lambda: len(gc.get_objects()),
    "__subclasses__()": subclasses,
    "time.process_time()": lambda: Timer().start % 7,
    "time.process_time() ": lambda: Timers.kind().start % 7,
    "time.thread_time()": entered,
    "time.strftime()": lambda: int(time.strftime("%S")),
    "time.perf_counter() ": lambda: timeit.default_timer() % 7,
    "os.stat()  ": lambda: osp.getmtime(FILE) % 7,
}


class Scaled(nn.Module):
    """It multiplies by a number that a function finds out, or the method of an object."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.layer, self.number = nn.Linear(3, 3), number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (self.number() if callable(self.number) else self.number.draw())


@pytest.mark.parametrize("asked", share_of(ASKING, 2))
def test_an_answer_from_outside_is_no_constant(asked: str) -> None:
    with pytest.raises(OutsideAnswerError) as error:
        capture(Scaled(ASKING[asked]), (X,), {})
    assert error.value.what == f"Scaled.forward asks {asked.strip()}"
    assert FILE.name in error.value.where


class AboveClock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale()

    def scale(self) -> float:
        return time.monotonic() % 7


class ByForward(AboveClock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class ByMethod(AboveClock):
    def scale(self) -> float:
        return super().scale() * 2


def hooked() -> nn.Module:
    layer = nn.Sequential(nn.Linear(3, 3))
    layer[0].register_forward_hook(lambda _, __, result: result * (time.monotonic() % 7))
    return layer


def among_others() -> nn.Module:
    layer = Scaled(None)
    layer.number = lambda: layer.ways[0]()  # type: ignore[operator]
    layer.ways = [lambda: time.monotonic() % 7]  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize("make", [ByForward, ByMethod, hooked, among_others])
def test_methods_above_hooks_and_listed_functions_are_looked_into(make: Any) -> None:
    with pytest.raises(OutsideAnswerError, match=r"time.monotonic\(\)"):
        capture(make(), (X,), {})


def test_methods_of_objects_are_looked_into() -> None:
    with pytest.raises(OutsideAnswerError, match=r"os.urandom\(\)"):
        capture(Scaled(Drawn()), (X,), {})


def test_a_profile_function_of_the_users_is_called_as_ever() -> None:
    seen = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        seen.add((frame.f_code.co_name, event))

    sys.setprofile(profile)
    try:
        with pytest.raises(OutsideAnswerError, match=r"time.monotonic\(\)"):
            capture(Scaled(imported), (X,), {})
        assert sys.getprofile() is profile
        assert capture(Scaled(logged), (X,), {}).graph.calls
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert {("imported", "call"), ("imported", "c_call"), ("logged", "return")} <= seen


def test_a_model_is_traced_alike_under_the_profiler() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    installed = sys.getprofile()
    try:
        with pytest.raises(OutsideAnswerError, match=r"time.monotonic\(\)"):
            capture(Scaled(imported), (X,), {})
        assert capture(Scaled(logged), (X,), {}).graph.calls
        assert sys.getprofile() is installed
    finally:
        profiler.disable()
    assert sys.getprofile() is None


def waited() -> float:
    time.sleep(0)
    return 2.0


def logged() -> float:
    if time is None:
        time.time()  # a way that the forward does not go
    LOG.debug("the clock of a log is no matter")
    return 2.0


def arranged() -> int:
    """The first call of a notation, which then looks for the library that a tensor is of."""
    time.sleep(0)
    einops._backends._type2backend.clear()
    einops._backends._loaded_backends.clear()
    return int(einops.rearrange(X, "a b -> b a").shape[0])


@pytest.mark.parametrize(
    "number",
    [
        waited,
        logged,
        arranged,
        lambda: random.Random(3).random(),
        lambda: np.random.default_rng(3).normal(),
        lambda: len(os.path.join("a", "b")),
        lambda: datetime.timedelta(seconds=3).seconds,
        looked_at,
    ],
    ids=[
        "sleep",
        "logging",
        "notation",
        "Random(3)",
        "default_rng(3)",
        "os.path.join",
        "timedelta",
        "signature",
    ],
)
def test_what_is_the_same_in_each_call_is_traced(number: Any) -> None:
    assert sys.getprofile() is None
    assert capture(Scaled(number), (X,), {}).graph.calls
    assert sys.getprofile() is None


COUNT = 0


def counting() -> int:
    global COUNT
    COUNT += 1
    return COUNT


def making() -> int:
    global MADE
    MADE = 1
    return MADE


def around() -> Callable[[], int]:
    count = 0

    def counted() -> int:
        nonlocal count
        count += 1
        return count

    return counted


def own_count() -> int:
    own_count.calls = getattr(own_count, "calls", 0) + 1  # type: ignore[attr-defined]
    return own_count.calls  # type: ignore[attr-defined]


def default_count(seen: list[int] = []) -> int:  # noqa: B006
    seen.append(1)
    return len(seen)


class Modal(nn.Module):
    """It leaves itself in another mode than it was."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.train(not self.training)
        return self.layer(x) * (2 if self.training else 3)


CHANGING = {
    "the variable COUNT": lambda: Scaled(counting),
    "the variable MADE": lambda: Scaled(making),
    "the variable count": lambda: Scaled(around()),
    "the variable own_count": lambda: Scaled(own_count),
    "the variable default of default_count": lambda: Scaled(default_count),
    "the mode of the model": Modal,
}


@pytest.mark.parametrize("what", CHANGING)
def test_what_a_forward_leaves_outside_of_tensors_is_told_and_put_back(what: str) -> None:
    model = CHANGING[what]()
    with pytest.raises(CaptureError) as error:
        capture(model, (X,), {})
    assert what in error.value.what
    assert (COUNT, "MADE" in globals(), model.training) == (0, False, True)
    if isinstance(model, Scaled):
        assert model.number() == 1  # as if it had never been called
    globals()["COUNT"] = 0
    globals().pop("MADE", None)
    default_count.__defaults__[0].clear()  # type: ignore[index]
    vars(own_count).clear()
