"""Settings that objects take from their classes are followed, wherever the objects lie.

A class has them for all of its objects; an object, or a class between, may get one of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from broad_cases import broad
from torch import nn
from unseen import Base, X, after_backward

import autoparallel
from autoparallel.parallel.module_state import state_of


class Settings:
    """Settings as attributes of a class, and a number that follows from them."""

    scale = 1.0
    table: ClassVar = {"k": 1.0}

    @property
    def product(self) -> float:
        return self.scale * self.table["k"]

    @classmethod
    def of_class(cls) -> float:
        return cls.scale


class Chosen(Settings):
    """It has nothing of its own."""


@dataclasses.dataclass
class Outer:
    """An object that has settings."""

    inner: Chosen = dataclasses.field(default_factory=Chosen)


class Scaled(Base):
    """A model whose result is multiplied by what its child class finds."""

    def factor(self) -> Any:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.a(x))) * self.factor()


Place = Callable[[], tuple[nn.Module, Chosen]]
ONE, NESTED, TABLE = Chosen(), Outer(), {"one": Chosen()}


def enclosed() -> tuple[nn.Module, Chosen]:
    settings = Chosen()

    class Model(Scaled):
        def factor(self) -> Any:
            return settings.product

    return Model(), settings


def in_a_function() -> tuple[nn.Module, Chosen]:
    settings = Chosen()

    class Model(Scaled):
        def factor(self) -> Any:
            return self.kept(1.0)

    return Model(lambda number: number * settings.product), settings


def as_default() -> tuple[nn.Module, Chosen]:
    settings = Chosen()

    class Model(Scaled):
        def factor(self, given: Chosen = settings) -> Any:
            return given.product

    return Model(), settings


def of_the_model() -> tuple[nn.Module, Chosen]:
    class Model(Scaled):
        settings = Chosen()

        def factor(self) -> Any:
            return self.settings.product

    return Model(), Model.settings


def of_its_type() -> tuple[nn.Module, Chosen]:
    class Model(Scaled):
        settings = Chosen()

        def factor(self) -> Any:
            return type(self).settings.product

    return Model(), Model.settings


def in_a_partial() -> tuple[nn.Module, Chosen]:
    def scaled(settings: Chosen, number: float) -> Any:
        return settings.product * number

    class Model(Scaled):
        def factor(self) -> Any:
            return self.kept(1.0)

    settings = Chosen()
    return Model(partial(scaled, settings)), settings


def bound() -> tuple[nn.Module, Chosen]:
    class Asked(Chosen):
        def ask(self) -> float:
            return self.product

    class Model(Scaled):
        def factor(self) -> Any:
            return self.kept()

    settings = Asked()
    return Model(settings.ask), settings


def in_a_variable() -> tuple[nn.Module, Chosen]:
    class Model(Scaled):
        def factor(self) -> Any:
            return ONE.product

    vars(ONE).clear()
    return Model(), ONE


def in_another() -> tuple[nn.Module, Chosen]:
    class Model(Scaled):
        def factor(self) -> Any:
            return NESTED.inner.product

    NESTED.inner = Chosen()
    return Model(), NESTED.inner


def in_a_dict() -> tuple[nn.Module, Chosen]:
    class Model(Scaled):
        def factor(self) -> Any:
            return TABLE["one"].product

    TABLE["one"] = Chosen()
    return Model(), TABLE["one"]


def by_the_class() -> tuple[nn.Module, Chosen]:
    class Model(Scaled):
        def factor(self) -> Any:
            return Chosen.of_class() * Chosen.table["k"]

    return Model(), Chosen()


def on_the_object(settings: Any, number: float) -> None:
    settings.scale = number


def on_its_class(settings: Any, number: float) -> None:
    Chosen.scale = number


def on_the_base(settings: Any, number: float) -> None:
    Settings.scale = number


def in_the_table(settings: Any, number: float) -> None:
    Settings.table["k"] = number


def a_table_of_its_own(settings: Any, number: float) -> None:
    settings.table = {"k": number}


PLACES: dict[str, Place] = {
    place.__name__: place
    for place in (
        *(enclosed, in_a_function, as_default, of_the_model, of_its_type, in_a_partial, bound),
        *(in_a_variable, in_another, in_a_dict, by_the_class),
    )
}
CHANGES: dict[str, Callable[[Any, float], None]] = {
    change.__name__: change
    for change in (on_the_object, on_its_class, on_the_base, in_the_table, a_table_of_its_own)
}


@pytest.fixture(autouse=True)
def as_written() -> Iterator[None]:
    yield
    vars(ONE).clear()
    Settings.scale, Settings.table = 1.0, {"k": 1.0}
    if "scale" in vars(Chosen):
        del Chosen.scale


# Each place and each change is among those that `make test` has.
CASES = [
    case
    for row, change in enumerate(CHANGES)
    for column, place in enumerate(PLACES)
    for case in ([(change, place)] if (row + column) % 3 == 0 else broad((change, place)))
]


@pytest.mark.parametrize(("change", "place"), CASES)
def test_settings_of_classes_are_followed(change: str, place: str) -> None:
    model, settings = PLACES[place]()
    split = autoparallel.autoparallelize(model, 1, example_inputs=X)
    for number in (1.0, 2.0, 3.0):
        if number > 1:
            CHANGES[change](settings, number)
        expected, found = after_backward(model, X), after_backward(split, X)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not state_of(split).plan.breaks, "it is split, and no Python"
