"""Attributes are followed of classes, of their own classes, and of numbers of a class of the
user's.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from broad_cases import one_of_each
from torch import nn
from unseen import Base, Case, X, after_backward, follows

import autoparallel


class Kind(type):
    """Classes of this kind have these settings, unless they have their own."""

    strength, inner = 2.0, 1.5

    @property
    def power(cls) -> float:
        return cls.inner

    def __getitem__(cls, number: int) -> float:
        return cls.strength * number


class OfKind(metaclass=Kind):
    pass


class Settings:
    """A class that is a configuration by itself."""

    strength: Any = 2.0


class Keeper:
    """An object that refers to a class."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2

    def __init__(self, number: int) -> None:
        self.weight = float(number)


class Length(float):
    unit = 1.0


class Count(int):
    pass


class Text(str):
    pass


class Bits(bytes):
    pass


class Phase(complex):
    pass


class Pair(tuple[int, ...]):
    pass


class Row(list[Any]):
    pass


class Scaled(Base):
    """A model whose result is multiplied by what a function finds. kept: of Base."""

    def __init__(self, kept: Any, factor: Callable[[Any], Any]) -> None:
        super().__init__(kept)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.a(x))) * self.factor(self)


class OfOwnKind(Base, metaclass=Kind):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.a(x))) * type(self).strength


LENGTH = Length(2.0)


def helper() -> None:
    """It has a name."""


# By name: what the model keeps, what it reads, and how that is changed, with the model as argument.
Reads = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any, float], Any]]
CASES: dict[str, Reads] = {
    "attribute of a class's class": (
        lambda: None,
        lambda model: OfKind.strength,
        lambda model, value: setattr(Kind, "strength", value),
    ),
    "property of a class's class": (
        lambda: None,
        lambda model: OfKind.power,
        lambda model, value: setattr(Kind, "inner", value),
    ),
    "method of a class's class": (
        lambda: None,
        lambda model: OfKind[2],
        lambda model, value: setattr(Kind, "strength", value),
    ),
    "class's own in its class's place": (
        lambda: None,
        lambda model: OfKind.strength,
        lambda model, value: setattr(OfKind, "strength", value),
    ),
    "class's class of what is kept": (
        lambda: OfKind,
        lambda model: model.kept.strength,
        lambda model, value: setattr(Kind, "strength", value),
    ),
    "class that is kept": (
        lambda: Settings,
        lambda model: model.kept.strength,
        lambda model, value: setattr(Settings, "strength", value),
    ),
    "class in an object": (
        lambda: {"a": [Keeper(Settings)]},
        lambda model: model.kept["a"][0].kind.strength,
        lambda model, value: setattr(Settings, "strength", value),
    ),
    "name of a class": (
        lambda: None,
        lambda model: float(Settings.__name__),
        lambda model, value: setattr(Settings, "__name__", str(value)),
    ),
    "name of the class of what is kept": (
        lambda: Keeper(int),
        lambda model: float(type(model.kept).__qualname__),
        lambda model, value: setattr(Keeper, "__qualname__", str(value)),
    ),
    "name of a function": (
        lambda: None,
        lambda model: float(helper.__name__),
        lambda model, value: setattr(helper, "__name__", str(value)),
    ),
    "words on a class": (
        lambda: None,
        lambda model: len(Settings.__doc__ or ""),
        lambda model, value: setattr(Settings, "__doc__", "a" * int(value)),
    ),
    "member of an enumeration": (
        lambda: Mode.FAST,
        lambda model: model.kept.weight,
        lambda model, value: setattr(Mode.FAST, "weight", value),
    ),
    "member by its name": (
        lambda: None,
        lambda model: Mode.SLOW.weight,
        lambda model, value: setattr(Mode.SLOW, "weight", value),
    ),
    "number by its name": (
        lambda: None,
        lambda model: LENGTH.unit,
        lambda model, value: setattr(LENGTH, "unit", value),
    ),
    "class of a number": (
        lambda: Length(1.5),
        lambda model: model.kept.unit,
        lambda model, value: setattr(Length, "unit", value),
    ),
    "number in a list": (
        lambda: [Length(1.5)],
        lambda model: model.kept[0].unit,
        lambda model, value: setattr(model.kept[0], "unit", value),
    ),
    "number of an object": (
        lambda: Keeper(Length(1.5)),  # type: ignore[arg-type]
        lambda model: model.kept.kind + 0.0,
        lambda model, value: setattr(model.kept, "kind", Length(value)),
    ),
    **{
        f"attribute of a {kind.__name__}": (
            lambda kind=kind, value=value: kind(value),
            lambda model: getattr(model.kept, "unit", 1.0),
            lambda model, value: setattr(model.kept, "unit", value),
        )
        for kind, value in [
            *((Length, 1.5), (Count, 2), (Text, "a"), (Bits, b"a"), (Phase, 1j)),
            *((Pair, (1,)), (Row, [1])),
        ]
    },
}
OWNERS: tuple[Any, ...] = (Kind, OfKind, Settings, Keeper, Length, LENGTH, Mode.FAST, Mode.SLOW)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """At the end all of them have what they had."""
    befores = [dict(vars(owner)) for owner in OWNERS]
    names = [(each, each.__name__, each.__qualname__) for each in (Settings, Keeper, helper)]
    yield
    for owner, before in zip(OWNERS, befores, strict=True):
        for name in [name for name in vars(owner) if name not in before]:
            delattr(owner, name)
        for name, value in before.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)
    for each, name, qualified in names:
        each.__name__, each.__qualname__ = name, qualified


def is_kept(name: str) -> bool:
    """Say whether `make test` has a case: of kinds that are children of the interpreter's, two."""
    _, _, kind = name.partition("attribute of a ")
    return kind in ("", Length.__name__, Row.__name__) or "class" in kind


@pytest.mark.parametrize("name", one_of_each(CASES, is_kept))
def test_a_change_is_followed(name: str) -> None:
    keep, factor, change = CASES[name]

    def script(model: Any) -> Iterator[torch.Tensor]:
        for value in (2.0, 5.0):
            change(model, value)
            yield after_backward(model)

    def case() -> Case:
        change(made := Scaled(keep(), factor), 7.0)
        return made, script

    follows(case, 2)


def test_the_class_of_a_module_s_class_is_followed() -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        for value in (2.0, 5.0):
            Kind.strength = value
            yield after_backward(model)

    follows(lambda: (OfOwnKind(), script), 2)


class Closed(list[Any]):
    """A list that does not say how long it is."""

    def __len__(self) -> int:
        raise TypeError("it has no length")


class Shut(dict[Any, Any]):
    """A dict that does not say how much it holds."""

    def __len__(self) -> int:
        raise TypeError("it has no length")


@pytest.mark.parametrize("kept", [Closed([1]), Shut(a=1)], ids=["list", "dict"])
def test_containers_without_a_length_are_no_crash(kept: Any) -> None:
    model = Scaled(kept, lambda model: 2.0)
    expected = model(X)
    split: Any = autoparallel.autoparallelize(model, 1, example_inputs=X)
    torch.testing.assert_close(split(X), expected)
    assert kept is model.kept
    assert [*kept] in ([1], ["a"])


def test_members_of_enumerations_may_be_left_in_attributes() -> None:
    class Switching(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mode = Mode.SLOW if self.mode is Mode.FAST else Mode.FAST
            return self.out(torch.tanh(self.a(x))) * self.mode.weight

    def script(model: Any) -> Iterator[Any]:
        for _ in range(3):
            yield after_backward(model), model.mode.value

    def case() -> Case:
        model: nn.Module = Switching()
        model.mode = Mode.SLOW  # type: ignore[assignment]
        return model, script

    follows(case, 2)
