"""Names that come to refer to something else: functions, their code, classes, what containers hold.

Each kind has a question that a forward asks, and a change that makes the answer another one. The
forward's program has to be made anew then, or the module has to be left to Python.
"""

from __future__ import annotations

import abc
import asyncio
import collections
import contextvars
import ctypes
import enum
import functools
import gc
import math
import operator
import os
import pathlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from gc import isenabled as collects
from typing import Any

import numpy as np
import pytest
import torch
from split_ranks import programs_of
from torch import nn
from unseen import Base, X, after_backward, follows

import autoparallel
from autoparallel.parallel.module_state import state_of

Kind = tuple[Callable[[], Any], Callable[[bool], Any]]


def with_default(value: float = 1.0) -> float:
    return value


def with_keyword(*, value: float = 1.0) -> float:
    return value


def one() -> float:
    return 1.0


def two() -> float:
    return 2.0


def swapped() -> float:
    return 1.0


class Called:
    """An object that is called, whose class gets another method."""

    def __call__(self) -> float:
        return 1.0


class Louder(Called):
    def __call__(self) -> float:
        return 2.0


class Abstract(abc.ABC):  # noqa: B024
    pass


class Registered:
    pass


class Child(Registered):
    pass


class OtherParent:
    pass


class Colour(enum.Enum):
    RED = 1.0


Point = collections.namedtuple("Point", "x", defaults=(1.0,))
CALLED, CHILD = Called(), Child()
HELD: list[Any] = [Registered()]
REFERENCES = [weakref.ref(HELD[0])]
PARTIAL = functools.partial(lambda value: value, value=1.0)
PROXY = types.MappingProxyType(BEHIND := {"value": 1.0})
VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("variable_of_names", default=1.0)
GET = VARIABLE.get
LOCK = threading.Lock()
QUESTIONS = {"asks": gc.isenabled}
ASKS = functools.partial(gc.isenabled)
TABLE = [1.0] * 200
NUMBER = torch.ones(1, dtype=torch.float64)
FROZEN = frozenset([0])
WAYS: dict[str, Callable[[Any], Any]] = {"way": math.sqrt}
PLACE = pathlib.Path(f"/of/a/test/{os.getpid()}")
CODE, SQRT, LESS = swapped.__code__, math.sqrt, np.sqrt
NAME = "FRO" + "ZEN".lower().upper()


def collect(other: bool) -> None:
    gc.disable() if other else gc.enable()


def local_question() -> float:
    asks = gc.isenabled
    return 1.0 + asks()


def local_variable() -> float:
    get = VARIABLE.get
    return get()


def hold(other: bool) -> None:
    if other:
        HELD.clear()
        gc.collect()
    elif not HELD:
        HELD.append(Registered())
        REFERENCES[0] = weakref.ref(HELD[0])


def lock(other: bool) -> None:
    if LOCK.locked():
        LOCK.release()
    if other:
        LOCK.acquire()


def in_c() -> Callable[[], float]:
    library = ctypes.CDLL(None)
    return lambda: 1.0 + bool(library.getenv(b"OF_NAMES_IN_C"))


def put(name: str, one: Any, other: Any) -> Callable[[bool], None]:
    return lambda is_other: globals().update({name: other if is_other else one})


def on(owner: Any, name: str, one: Any, other: Any) -> Callable[[bool], None]:
    return lambda is_other: setattr(owner, name, other if is_other else one)


# In groups, each of which is the forward of one model: a module has at most sixteen programs.
FOLLOWED: dict[str, dict[str, Kind]] = {
    "functions": {
        "defaults": (lambda: with_default(), on(with_default, "__defaults__", (1.0,), (2.0,))),
        "keywords": (
            lambda: with_keyword(),
            lambda other: with_keyword.__kwdefaults__.update(value=1.0 + other),
        ),
        "code": (lambda: swapped(), on(swapped, "__code__", CODE, two.__code__)),
        "defaults of a named tuple": (
            lambda: Point().x,
            on(Point.__new__, "__defaults__", (1.0,), (2.0,)),
        ),
        "a partial": (lambda: PARTIAL(), lambda other: PARTIAL.keywords.update(value=1.0 + other)),
        "in a dict": (lambda: WAYS["way"](4.0), lambda o: WAYS.update(way=abs if o else SQRT)),
    },
    "questions": {
        "a local name": (local_question, collect),
        "an imported name": (lambda: 2.0 + collects(), collect),
        "in a dict": (lambda: 3.0 + QUESTIONS["asks"](), collect),
        "a partial": (lambda: 4.0 + ASKS(), collect),
        "a text": (lambda: 5.0 + operator.methodcaller("isenabled")(gc), collect),
        "a bound method": (lambda: GET(), lambda other: VARIABLE.set(1.0 + other)),
        "a lock": (lambda: 6.0 + LOCK.locked(), lock),
        "bytes": (
            lambda: float(os.environb.get(b"OF_NAMES", b"1")),
            lambda other: os.environ.update(OF_NAMES=str(1 + other)),
        ),
    },
    "libraries": {
        "of math": (lambda: math.sqrt(4.0), on(math, "sqrt", SQRT, abs)),
        "of numpy": (lambda: float(np.sqrt(4.0)), on(np, "sqrt", LESS, np.abs)),
        "of torch": (
            lambda: torch.tanh(NUMBER),
            on(torch, "tanh", torch.tanh, torch.sin),
        ),
        "of nn.functional": (
            lambda: nn.functional.silu(NUMBER),
            on(nn.functional, "silu", nn.functional.silu, nn.functional.relu),
        ),
        "a class of torch": (
            lambda: getattr(nn.Module, "of_names", 1.0),
            on(nn.Module, "of_names", 1.0, 2.0),
        ),
    },
    "objects": {
        "a method": (lambda: CALLED(), on(Called, "__call__", Called.__call__, Louder.__call__)),
        "a class": (lambda: 2.0 * CALLED(), on(CALLED, "__class__", Called, Louder)),
        "parents": (
            lambda: 2.0 if isinstance(CHILD, OtherParent) else 1.0,
            on(Child, "__bases__", (Registered,), (OtherParent,)),
        ),
        "a weak reference": (lambda: 1.0 if REFERENCES[0]() else 2.0, hold),
        "a proxy": (lambda: PROXY["value"], lambda other: BEHIND.update(value=1.0 + other)),
    },
    "values": {
        "a large table": (lambda: TABLE[150], lambda o: TABLE.__setitem__(150, 1.0 + o)),
        "a tensor": (lambda: NUMBER, put("NUMBER", NUMBER, torch.full_like(NUMBER, 2.0))),
        "a frozen set": (lambda: float(len(FROZEN)), put("FROZEN", FROZEN, frozenset([1, 2]))),
        "globals()": (lambda: float(len(globals()[NAME])), put("FROZEN", FROZEN, frozenset("ab"))),
        "a name of a module": (
            lambda: 3.0 * len(getattr(sys.modules[__name__], NAME)),
            put("FROZEN", FROZEN, frozenset("abc")),
        ),
    },
}
PYTHON: dict[str, Kind] = {
    "eval": (lambda: eval("CALLED()"), on(Called, "__call__", Called.__call__, Louder.__call__)),
    "a library in C": (in_c(), lambda other: None),
    "a path": (lambda: 2.0 if PLACE.exists() else 1.0, lambda other: None),
}


class Scaled(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        for ask in self.kept:
            hidden = hidden * ask()
        return self.out(hidden)


@pytest.fixture(scope="module")
def one_first_trace() -> None:
    """Models are traced one by one: they are equal but for the functions that they keep."""


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    yield
    for _, change in (kind for group in (*FOLLOWED.values(), PYTHON) for kind in group.values()):
        change(False)
    del nn.Module.of_names


def script_of(kinds: dict[str, Kind]) -> Callable[[Any], Iterator[torch.Tensor]]:
    def script(model: Any) -> Iterator[torch.Tensor]:
        yield after_backward(model)
        for _, change in kinds.values():
            change(True)
            yield after_backward(model)
            change(False)
        yield after_backward(model)

    return script


def has_effect(kinds: dict[str, Kind]) -> bool:
    """Return whether each change makes the answer another one, so that the test tests something."""
    for ask, change in kinds.values():
        change(False)
        before = float(ask())
        change(True)
        if float(ask()) == before:
            return False
        change(False)
    return True


@pytest.mark.parametrize("group", FOLLOWED)
@pytest.mark.usefixtures("_as_it_was")
def test_what_names_refer_to_is_followed(group: str) -> None:
    kinds = FOLLOWED[group]
    assert has_effect(kinds)
    model = Scaled([ask for ask, _ in kinds.values()])
    expected = [loss.detach().clone() for loss in script_of(kinds)(model)]
    split = autoparallel.autoparallelize(model, 1, example_inputs=X)
    found = [loss.detach().clone() for loss in script_of(kinds)(split)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert programs_of(split) > 1
    assert not state_of(split).python  # all calls had a program


@pytest.mark.usefixtures("_as_it_was")
def test_what_names_refer_to_is_followed_on_two_ranks() -> None:
    kinds = {key: FOLLOWED["functions"][key] for key in ("code", "in a dict")}
    follows(lambda: (Scaled([ask for ask, _ in kinds.values()]), script_of(kinds)), 2)


@pytest.mark.parametrize("name", PYTHON)
@pytest.mark.usefixtures("_as_it_was")
def test_what_nobody_can_look_into_stays_python(name: str) -> None:
    ask, change = PYTHON[name]
    model = Scaled([ask])
    split = autoparallel.autoparallelize(model, 1, example_inputs=X)
    assert split.plan.breaks
    for other in (False, True):
        change(other)
        torch.testing.assert_close(split(X), model(X), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["a name of the module", "another name"])
def test_what_is_raised_in_place_of_an_answer(name: str) -> None:
    """Outside of a loop there is none to return: a RuntimeError, which the forward catches."""
    other_name = asyncio.get_running_loop

    class Asks(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return self.out(self.a(x) * 2)
            return self.out(self.a(x))

    class AsksOtherwise(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                other_name()
            except RuntimeError:
                return self.out(self.a(x) * 2)
            return self.out(self.a(x))

    model = (Asks if name == "a name of the module" else AsksOtherwise)()
    split = autoparallel.autoparallelize(model, 1, example_inputs=X)

    async def inside() -> tuple[torch.Tensor, torch.Tensor]:
        return split(X), model(X)

    before = split(X)
    torch.testing.assert_close(before, model(X), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*asyncio.run(inside()), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(split(X), before, rtol=1e-10, atol=1e-12)


def test_classes_that_are_registered_later() -> None:
    class Asks(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * (2.0 if isinstance(CHILD, Abstract) else 1.0))

    model = Asks()
    split = autoparallel.autoparallelize(model, 1, example_inputs=X)
    before = split(X)
    Abstract.register(Child)
    torch.testing.assert_close(split(X), model(X), rtol=1e-10, atol=1e-12)
    assert not torch.equal(before, split(X))
