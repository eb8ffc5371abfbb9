"""Forwards that ask libraries, and look for what is not there: later calls have other answers."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from broad_cases import share_of
from torch import is_grad_enabled as another_name
from torch import nn
from torch.compiler import is_compiling as asks
from unseen import Base, X, after_backward, follows

import autoparallel
from autoparallel.capture.asked_switches import untold
from autoparallel.capture.library_questions import names_looked_up, questions_in
from autoparallel.errors import AutoParallelError


class Thing:
    """A global object, which has an attribute now and then."""


class Number:
    """A number of the user's own, which its methods read."""

    value = 1.0

    def __float__(self) -> float:
        return self.value


class Kind(type):
    """Classes of this kind say by themselves what is an instance."""

    has_all = False

    def __instancecheck__(cls, instance: object) -> bool:
        return Kind.has_all


class OfKind(metaclass=Kind):
    pass


class Descriptor:
    """An attribute whose value is found where nobody else looks."""

    def __get__(self, instance: Any, owner: Any = None) -> float:
        return float(FOUND["value"])


THING, NUMBER, FOUND = Thing(), Number(), {"value": 1.0}
QUESTIONS = {"asks": torch.compiler.is_compiling}


def set_if(owner: Any, name: str, is_there: bool) -> None:
    if is_there:
        setattr(owner, name, 2.0)
    elif name in vars(owner):
        delattr(owner, name)


def without_a_name() -> float:
    try:
        return name_of_a_test  # type: ignore[name-defined, no-any-return]
    except NameError:
        return 1.0


def without_a_module() -> float:
    try:
        import module_of_a_test  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return 1.0
    return 2.0


def set_name(is_there: bool) -> None:
    globals().update(name_of_a_test=2.0) if is_there else globals().pop("name_of_a_test", None)


def set_module(is_there: bool) -> None:
    if is_there:
        sys.modules["module_of_a_test"] = types.ModuleType("module_of_a_test")
    else:
        sys.modules.pop("module_of_a_test", None)


# What a forward asks, and what makes the answer another one: called with False, True and False.
ASKED: dict[str, tuple[Callable[[], Any], Callable[[bool], Any]]] = {
    "an attribute of sys": (
        lambda: float(len(sys.argv)),
        lambda other: sys.argv.__setitem__(slice(None), ["x"] * (1 + other)),
    ),
    "a switch of the interpreter": (
        lambda: 1.0 + gc.isenabled(),
        lambda other: gc.disable() if other else gc.enable(),
    ),
    "a switch of torch": (
        lambda: 1.0 + torch.backends.cuda.flash_sdp_enabled(),
        lambda other: torch.backends.cuda.enable_flash_sdp(not other),
    ),
    "a setting of torch": (
        lambda: 1.0 + torch.backends.cuda.matmul.allow_fp16_accumulation,
        lambda other: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", other),
    ),
    "a setting of numpy": (
        lambda: float(len(np.geterr()["over"])),
        lambda other: np.seterr(over="ignore" if other else "warn"),
    ),
    "an object that a library gives": (
        lambda: 1.0 + logging.getLogger("of.a.question").level,
        lambda other: logging.getLogger("of.a.question").setLevel(int(other)),
    ),
    "an attribute that torch has not": (
        lambda: getattr(torch, "of_a_test", 1.0),
        lambda other: set_if(torch, "of_a_test", other),
    ),
    "an attribute that an object has not": (
        lambda: getattr(THING, "scale", 1.0),
        lambda other: set_if(THING, "scale", other),
    ),
    "a variable that is not there": (without_a_name, set_name),
    "a module that is not there": (without_a_module, set_module),
    "a number's own method": (
        lambda: float(NUMBER),
        lambda other: setattr(NUMBER, "value", 1.0 + other),
    ),
    "a class of a kind": (
        lambda: 2.0 if isinstance(1, OfKind) else 1.0,
        lambda other: setattr(Kind, "has_all", other),
    ),
}


class Scaled(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * self.kept())


class Described(Base):
    scale = Descriptor()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * self.scale)


def alone_as_unsplit(model: nn.Module, script: Callable[[Any], Iterator[Any]]) -> None:
    """Require that a module on one rank, which has a program, gives what the model gives."""
    expected = [item.detach().clone() for item in script(copy.deepcopy(model))]
    split = autoparallel.autoparallelize(model, 1, example_inputs=X)
    assert split.plan.breaks == ()
    found = [item.detach().clone() for item in script(split)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not torch.equal(expected[0], expected[1])


def asked_by(change: Callable[[bool], Any]) -> Callable[[Any], Iterator[torch.Tensor]]:
    def script(model: Any) -> Iterator[torch.Tensor]:
        for other in (False, True, False):
            change(other)
            yield after_backward(model)

    return script


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    before, errors = list(sys.argv), np.geterr()
    yield
    sys.argv[:] = before
    np.seterr(**errors)
    for _, change in [*ASKED.values()][1:]:
        change(False)


@pytest.mark.parametrize("name", share_of(ASKED, 2))
@pytest.mark.usefixtures("_as_it_was")
def test_answers_are_those_of_the_call(name: str) -> None:
    ask, change = ASKED[name]
    change(False)
    alone_as_unsplit(Scaled(ask), asked_by(change))


@pytest.mark.usefixtures("_as_it_was")
def test_answers_are_those_of_the_call_on_three_ranks() -> None:
    ask, change = ASKED["an attribute of sys"]
    change(False)
    follows(lambda: (Scaled(ask), asked_by(change)), 3)


def test_a_descriptor_is_followed() -> None:
    alone_as_unsplit(Described(), asked_by(lambda other: FOUND.update(value=1.0 + other)))


def test_names_of_attributes_are_what_a_forward_sees() -> None:
    class Looks(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * (2.0 if "zeta" in dir(self) else 1.0))

    def script(model: Any) -> Iterator[torch.Tensor]:
        yield model(X)
        model.zeta = 1
        yield model(X)

    alone_as_unsplit(Looks(), script)


def test_an_attribute_that_the_class_gets_later() -> None:
    class Looks(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * getattr(self, "gain", 1.0))

    alone_as_unsplit(Looks(), asked_by(lambda other: set_if(Looks, "gain", other)))


@pytest.mark.parametrize(
    "asks_grad", [lambda: another_name(), torch.is_grad_enabled, functools.partial(another_name)]
)
def test_gradients_are_asked_for_by_any_name(asks_grad: Callable[[], bool]) -> None:
    class Asks(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * (2.0 if self.kept() else 1.0))

    def script(model: Any) -> Iterator[torch.Tensor]:
        yield after_backward(model)
        with torch.no_grad():
            yield model(X)

    alone_as_unsplit(Asks(asks_grad), script)


def test_who_traces_is_asked_by_any_name() -> None:
    """The functions stay the objects that they are, and have their own code again afterwards."""
    before = torch.compiler.is_compiling.__code__
    ways: list[Callable[[], bool]] = [
        lambda: asks(),
        lambda: QUESTIONS["asks"](),
        torch.compiler.is_compiling,
        functools.partial(torch.compiler.is_exporting),
        lambda: torch._dynamo.external_utils.is_compiling(),
    ]
    for way in ways:
        model = Scaled(lambda way=way: 3.0 if way() else 1.0)
        expected = model(X)
        assert torch.equal(autoparallel.autoparallelize(model, 1, example_inputs=X)(X), expected)
    assert torch.compiler.is_compiling.__code__ is before
    with untold():
        assert eval("asks()", {"asks": asks, "__name__": "transformers.of_a_test"}) is False
    assert not [name for name in vars(torch.compiler) if "autoparallel" in name]


def test_gradients_that_a_forward_sets_to_zero() -> None:
    """Alone it runs as Python; the parameters of several ranks do not follow, which is told."""

    class Zeroes(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.zero_grad()
            return self.out(self.a(x))

    def script(model: Any) -> Iterator[torch.Tensor]:
        for _ in range(2):
            loss = model(X)
            loss.backward()
            yield loss

    follows(lambda: (Zeroes(), script), 1)
    with pytest.raises(AutoParallelError, match="its gradient becomes another tensor"):
        follows(lambda: (Zeroes(), script), 2)


def test_where_an_input_begins_in_memory() -> None:
    class Begins(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * (1.0 + x.storage_offset()))

    def script(model: Any) -> Iterator[torch.Tensor]:
        yield model(X)
        yield model(torch.cat([X[:1], X])[1:])

    follows(lambda: (Begins(), script), 2)


def test_a_part_is_for_tensors_without_what_it_looks_for() -> None:
    """A library asks whether a tensor is another library's; Python may set the attribute later."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12).double(), nn.Linear(12, 8).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).tanh()) * (2.0 if hasattr(x, "jax") else 1.0)

    class Outer(Base):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.marks = Inner(), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * float(x.detach().numpy().max())
            if self.marks:
                x.jax = True  # type: ignore[attr-defined]
            return self.out(self.a(self.inner(x)))

    def script(model: Any) -> Iterator[torch.Tensor]:
        yield after_backward(model)
        for marks in (True, False):
            model.marks = marks
            yield after_backward(model)

    follows(lambda: (Outer(), script), 2)
    plan = autoparallel.make_plan(Outer(), 2, example_inputs=X)
    assert "inner" in {path for part in plan.parts for path in part.paths}


def test_draws_and_calls_that_do_something_are_no_questions() -> None:
    code = (
        lambda: (np.random.rand(), torch.manual_seed(1), gc.collect(), logging.shutdown())
    ).__code__
    assert list(questions_in(code, globals(), lambda name: True)) == []
    looked = names_looked_up((lambda x: x.scale).__code__)
    assert looked == (frozenset(), frozenset())
