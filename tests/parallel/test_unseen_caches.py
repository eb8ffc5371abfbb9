"""Functions and methods that remember what they have returned give what they do in plain Python."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from split_ranks import programs_of
from unseen import Base, Case, X, after_backward, follows

import autoparallel

STATE = {"value": 1.0}


class OfAnObject(Base):
    @functools.cache  # noqa: B019
    def factor(self, number: int) -> Any:
        return self.kept * number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.a(x))) * self.factor(3)


class OfATensor(OfAnObject):
    @functools.cache  # noqa: B019
    def factor(self, number: int) -> Any:
        return (torch.arange(number) * self.kept).sum()


class Property(OfAnObject):
    @property
    @functools.cache  # noqa: B019
    def doubled(self) -> Any:
        return self.kept * 2

    def factor(self, number: int) -> Any:
        return self.doubled


class Outside(OfAnObject):
    def factor(self, number: int) -> Any:
        return times(self, number)


@functools.cache
def times(model: Any, number: int) -> Any:
    return model.kept * number


class Static(OfAnObject):
    @staticmethod
    @functools.cache
    def factor(number: int) -> Any:
        return STATE["value"] * number


class OfTheClass(OfAnObject):
    @classmethod
    @functools.cache
    def factor(cls, number: int) -> Any:
        return STATE["value"] * number


@pytest.mark.parametrize("kind", [OfAnObject, OfATensor, Property, Outside])
def test_what_is_remembered_for_a_module_stays(kind: type[Base]) -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        yield after_backward(model)
        model.kept = 5.0
        yield after_backward(model)
        yield model(X[:4])

    follows(lambda: (kind(1.0), script), 2)


@pytest.mark.parametrize("kind", [Static, OfTheClass])
def test_what_is_remembered_for_a_class_stays_until_it_is_forgotten(kind: Any) -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        cache = vars(kind)["factor"].__func__
        cache.cache_clear()
        for value in (1.0, 3.0):
            STATE["value"] = value
            yield after_backward(model)
        cache.cache_clear()
        yield after_backward(model)

    follows(lambda: (kind(), script), 1)


def test_planning_leaves_methods_and_what_they_remember() -> None:
    model, before = OfAnObject(1.0), vars(OfAnObject)["factor"]
    model(X)
    other = OfAnObject(2.0)
    other.factor(3)
    entries = before.cache_info().currsize
    autoparallel.make_plan(other, 2, example_inputs=X)
    assert vars(OfAnObject)["factor"] is before
    assert before.cache_info().currsize == entries


@functools.lru_cache(maxsize=1)
def triangle(size: int) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.float64).tril() * STATE["value"]


class ByTurns(Base):
    """It asks for two tensors by turns, of which one is remembered."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(triangle(6) @ torch.tanh(self.a(x))) * triangle(3).sum()


def test_what_is_computed_anew_is_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """The program goes on, also after others have asked, until a tensor has other numbers."""

    def script(model: Any) -> Iterator[torch.Tensor]:
        STATE["value"] = 1.0
        triangle.cache_clear()
        yield after_backward(model)
        programs = programs_of(model)
        triangle(5)
        yield after_backward(model)
        assert programs_of(model) == programs
        STATE["value"] = 2.0
        yield after_backward(model)
        triangle(3).mul_(0.5)
        yield after_backward(model)

    def case() -> Case:
        return ByTurns(), script

    with caplog.at_level(logging.WARNING):
        follows(case, 1)
    assert not [each for each in caplog.records if "plain Python" in each.getMessage()]


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda tensor: tensor.mul_(2),
    "forgotten": lambda tensor: triangle.cache_clear(),
}


class Once(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(triangle(6) @ torch.tanh(self.a(x)))


@pytest.mark.parametrize("name", WRITES)
def test_other_numbers_are_followed(name: str) -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        STATE["value"] = 1.0
        triangle.cache_clear()
        yield after_backward(model)
        STATE["value"] = 3.0
        yield after_backward(model)
        WRITES[name](triangle(6))
        yield after_backward(model)

    follows(lambda: (Once(), script), 1)
