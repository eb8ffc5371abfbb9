"""Forwards that read what variables outside of the model hold, in kinds that no attribute shows."""

from __future__ import annotations

import array
import builtins
import ctypes
import decimal
import functools
import itertools
import logging
import math
import mmap
import multiprocessing
import operator
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from broad_cases import share_of
from processes import run_processes
from torch import nn
from unseen import Base, Case, X, after_backward, differences, follows

import autoparallel
from autoparallel.errors import AutoParallelError


class Slotted:
    __slots__ = ("scale",)


ARRAY = array.array("d", [1.0])
NUMBER = ctypes.c_double(1.0)
MEMORY = mmap.mmap(-1, 8)
TABLE = np.ones(2)
EVENT = threading.Event()
SHARED = multiprocessing.Value("d", 1.0)
SLOTS = Slotted()
DATABASE = sqlite3.connect(":memory:", check_same_thread=False)
DATABASE.execute("create table numbers (n real)")
DATABASE.execute("insert into numbers values (1)")
COUNTER = itertools.count(1)
helper: Callable[[float], float] = math.sin
calls: list[int] = []


@functools.lru_cache
def remembered(size: int) -> float:
    calls.append(size)
    return float(len(calls))


class Scaled(Base):
    """Its output is scaled by the number that a function finds out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * self.kept())


def changed_by(change: Callable[[int], None]) -> Callable[[Any], Iterator[torch.Tensor]]:
    """Return a script that changes something before each call."""

    def script(model: Any) -> Iterator[torch.Tensor]:
        for number in (1, 2, 1):
            change(number)
            yield after_backward(model)

    return script


def set_event(number: int) -> None:
    (EVENT.set if number == 2 else EVENT.clear)()


def set_memory(number: int) -> None:
    MEMORY[0] = number


def set_number(number: int) -> None:
    NUMBER.value = number


def set_shared(number: int) -> None:
    SHARED.value = number


def set_slot(number: int) -> None:
    SLOTS.scale = float(number)


def set_builtin(number: int) -> None:
    vars(builtins)["scale_of_a_test"] = float(number)


def set_helper(number: int) -> None:
    global helper
    helper = math.sin if number == 1 else math.cos


def set_row(number: int) -> None:
    DATABASE.execute("update numbers set n = ?", (number,))


def set_precision(number: int) -> None:
    decimal.getcontext().prec = 4 * number


def set_level(number: int) -> None:
    logging.getLogger("of.a.test").setLevel(number * 20)


set_slot(1)
set_builtin(1)

# What the forward asks for, and how a caller changes it.
READ: dict[str, tuple[Callable[[], Any], Callable[[int], None]]] = {
    "array": (lambda: ARRAY[0], lambda number: ARRAY.__setitem__(0, float(number))),
    "number of C's": (lambda: NUMBER.value, set_number),
    "mapped memory": (lambda: float(MEMORY[0]), set_memory),
    "numpy's array": (lambda: float(TABLE[0]), lambda number: TABLE.fill(number)),
    "event": (lambda: 2.0 if EVENT.is_set() else 1.0, set_event),
    "shared number": (lambda: SHARED.value, set_shared),
    "slot": (lambda: operator.attrgetter("scale")(SLOTS), set_slot),
    "builtin": (lambda: scale_of_a_test, set_builtin),  # type: ignore[name-defined]  # noqa: F821
    "function of C's": (lambda: helper(1.0), set_helper),
    "row": (lambda: DATABASE.execute("select n from numbers").fetchone()[0], set_row),
    "context": (lambda: float(decimal.getcontext().prec), set_precision),
    "level": (
        lambda: 2.0 if logging.getLogger("of.a.test").isEnabledFor(30) else 1.0,
        set_level,
    ),
}


def of_name(name: str) -> Case:
    READ[name][1](1)
    return Scaled(READ[name][0]), changed_by(READ[name][1])


@pytest.mark.parametrize("name", share_of(READ, 2))
def test_contents_are_followed(name: str) -> None:
    follows(functools.partial(of_name, name), 2)


@pytest.mark.parametrize("name", [*list(READ)[:9], "level"])
def test_what_shows_its_contents_is_split(name: str) -> None:
    assert autoparallel.make_plan(of_name(name)[0], 2, example_inputs=X).breaks == ()


def counter() -> Case:
    global COUNTER
    COUNTER = itertools.count(1)
    return Scaled(lambda: float(next(COUNTER))), changed_by(lambda number: None)


def cache() -> Case:
    remembered.cache_clear()
    calls.clear()
    return Scaled(lambda: remembered(3)), changed_by(lambda number: None)


class Seeding(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return self.out(self.a(x))


def seed() -> Case:
    def script(model: Any) -> Iterator[torch.Tensor]:
        for number in (1, 2):
            torch.manual_seed(number)
            yield after_backward(model)
            yield torch.rand(3)  # what follows the call

    return Seeding(), script


class Asking(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        told = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        return self.out(self.a(x) * (3.0 if told else 1.0))


def told_of_tracing() -> Case:
    return Asking(), changed_by(lambda number: None)


class Typed(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * (1.0 if type(x) is torch.Tensor else 3.0))


def kind_of_the_input() -> Case:
    return Typed(), changed_by(lambda number: None)


ALONE = (counter, cache, seed, told_of_tracing, kind_of_the_input)


# The copies of one process would share what the forwards change.
def _alone(rank: int) -> dict[str, str]:
    return differences(rank, {case.__name__: case for case in ALONE})


def test_changing_objects_are_followed_by_processes() -> None:
    assert run_processes(_alone, 2) == [{}, {}]


class Walking(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out(self.a(x))
        nodes = [node for node, _ in y.grad_fn.next_functions]  # type: ignore[union-attr]
        return y * len(nodes)


def test_a_walk_through_what_autograd_records_is_refused() -> None:
    with pytest.raises(AutoParallelError, match="walks through what autograd has recorded"):
        autoparallel.make_plan(Walking(), 2, example_inputs=X)


class Louder(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_class_that_is_set_on_a_module_is_refused() -> None:
    model = autoparallel.autoparallelize(Plain(), 1, example_inputs=X)
    model(X)
    model.a.__class__ = Louder
    with pytest.raises(AutoParallelError, match="was given the class Louder"):
        model(X)


class Plain(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x))


class Warns(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        warnings.warn("an old way to call it", stacklevel=2)
        return self.out(self.a(x))


def test_what_a_forward_warns_of_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        autoparallel.make_plan(Warns(), 2, example_inputs=X)
    told = [line for line in caplog.messages if "an old way" in line]
    assert len(told) == 1
    assert "its program does not" in told[0]
