"""Reads are followed at any depth, by names that a forward puts together, and past caches."""

from __future__ import annotations

import contextvars
import functools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from unseen import Base, X, after_backward

import autoparallel
from autoparallel.parallel.module_state import state_of


class Node:
    """A plain object; `chain` hangs each of several on the one before."""


def chain(depth: int) -> Any:
    node = Node()
    node.scale = 1.0  # type: ignore[attr-defined]
    for _ in range(depth):
        node, below = Node(), node
        node.sub = below  # type: ignore[attr-defined]
    return node


def last(node: Any) -> Any:
    while hasattr(node, "sub"):
        node = node.sub
    return node


class Scaled(Base):
    """A model whose result is multiplied by what its child class finds."""

    def factor(self) -> Any:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.a(x))) * self.factor()


DEEP = chain(7)
FLAT = types.SimpleNamespace(a_scale=1.0)
TABLE = {"k": 1.0}
Place = Callable[[], tuple[type[nn.Module], Callable[[Any, float], Any]]]


def of_the_model() -> Any:
    class Model(Scaled):
        def __init__(self) -> None:
            super().__init__(chain(7))

        def factor(self) -> Any:
            return self.kept.sub.sub.sub.sub.sub.sub.sub.scale

    return Model, lambda model, number: setattr(last(model.kept), "scale", number)


def below_containers() -> Any:
    class Model(Scaled):
        def __init__(self) -> None:
            super().__init__({"blocks": [(chain(3),)]})

        def factor(self) -> Any:
            return self.kept["blocks"][0][0].sub.sub.sub.scale

    def change(model: Any, number: float) -> None:
        last(model.kept["blocks"][0][0]).scale = number

    return Model, change


def of_a_variable() -> Any:
    class Model(Scaled):
        def factor(self) -> Any:
            return DEEP.sub.sub.sub.sub.sub.sub.sub.scale

    last(DEEP).scale = 1.0
    return Model, lambda _, number: setattr(last(DEEP), "scale", number)


def enclosed() -> Any:
    deep = chain(7)

    class Model(Scaled):
        def factor(self) -> Any:
            return deep.sub.sub.sub.sub.sub.sub.sub.scale

    return Model, lambda _, number: setattr(last(deep), "scale", number)


def by_a_name_put_together() -> Any:
    class Own(Node):
        a_scale = 1.0

    own = Own()

    class Model(Scaled):
        which = "a"

        def factor(self) -> Any:
            return getattr(own, f"{self.which}_scale")

    return Model, lambda _, number: setattr(own, "a_scale", number)


def by_a_way_put_together() -> Any:
    deep, way = chain(2), ".".join(["sub", "sub", "scale"])

    class Model(Scaled):
        def factor(self) -> Any:
            return operator.attrgetter(way)(deep)

    return Model, lambda _, number: setattr(last(deep), "scale", number)


def past_the_class() -> Any:
    class Model(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.a_scale = 1.0

        def factor(self) -> Any:
            return object.__getattribute__(self, "_".join(["a", "scale"]))

    return Model, lambda model, number: setattr(model, "a_scale", number)


@functools.lru_cache
def number_of(size: int) -> float:
    return TABLE["k"] * size


@functools.lru_cache
def mask_of(size: int) -> torch.Tensor:
    return torch.full((size,), TABLE["k"], dtype=torch.float64)


def remembered(function: Any) -> Any:
    """The function gives what it remembers, until it is told to forget."""

    class Model(Scaled):
        def factor(self) -> Any:
            return torch.as_tensor(function(2)).sum()

    def change(_: Any, number: float) -> None:
        if number == 4:
            function.cache_clear()
        else:
            TABLE["k"] = number

    TABLE["k"] = 1.0
    function.cache_clear()
    return Model, change


def remembered_number() -> Any:
    return remembered(number_of)


def remembered_tensor() -> Any:
    return remembered(mask_of)


def another_in_a_variable() -> Any:
    class Model(Scaled):
        def factor(self) -> Any:
            return DEEP.sub.sub.sub.sub.sub.sub.sub.scale

    def change(_: Any, number: float) -> None:
        global DEEP
        DEEP = chain(7)
        last(DEEP).scale = number

    change(None, 1.0)
    return Model, change


def another_in_an_object() -> Any:
    class Model(Scaled):
        def factor(self) -> Any:
            return DEEP.sub.sub.sub.sub.sub.sub.sub.scale

    def change(_: Any, number: float) -> None:
        DEEP.sub.sub = chain(5)
        last(DEEP).scale = number

    last(DEEP).scale = 1.0
    return Model, change


def in_a_class_of_a_class() -> Any:
    class Inner:
        scale = 1.0
        deep = chain(1)

    class Settings:
        inner = Inner

    class Model(Scaled):
        def factor(self) -> Any:
            return Settings.inner.scale * Settings.inner.deep.sub.scale

    def change(_: Any, number: float) -> None:
        Inner.scale = number
        last(Inner.deep).scale = number

    return Model, change


def in_a_set() -> Any:
    some, others = {chain(0)}, frozenset({chain(0)})

    class Model(Scaled):
        def factor(self) -> Any:
            return sum(each.scale for each in (*some, *others))

    def change(_: Any, number: float) -> None:
        for each in some if number % 2 else others:
            each.scale = number

    return Model, change


class Open(dict[str, Any]):
    """Its keys are attributes, and it fails otherwise than by AttributeError for all others."""

    __getattr__ = dict.__getitem__


def open_settings() -> Any:
    settings = Open(inner=Open(scale=1.0))

    class Model(Scaled):
        def factor(self) -> Any:
            return settings.inner.scale

    return Model, lambda _, number: settings.inner.update(scale=number)


def of_an_enclosed_module() -> Any:
    home = types.ModuleType("settings_of_a_test")
    home.__file__ = __file__
    home.kept = 1.0  # type: ignore[attr-defined]
    home.__getattr__ = lambda name: home.kept  # type: ignore[method-assign, attr-defined]
    sys.modules[home.__name__] = home

    class Model(Scaled):
        def factor(self) -> Any:
            return home.scale

    return Model, lambda _, number: setattr(home, "kept", number)


@functools.lru_cache
def table_of(size: int) -> Any:
    return {"numbers": [1.0] * size, "node": chain(2), "tensors": (torch.ones(size),) * 2}


def remembered_contents() -> Any:
    class Model(Scaled):
        def factor(self) -> Any:
            table = table_of(2)
            number = sum(table["numbers"]) + table["node"].sub.sub.scale
            return table["tensors"][1].sum() + number

    def change(_: Any, number: float) -> None:
        table = table_of(2)
        if number == 2:
            table["numbers"][0] = number
        elif number == 3:
            last(table["node"]).scale = number
        else:
            table["tensors"][1].fill_(number)

    table_of.cache_clear()
    return Model, change


def of_a_class_that_gets_it() -> Any:
    class Settings(Node):
        pass

    settings = Settings()

    class Model(Scaled):
        def factor(self) -> Any:
            return getattr(settings, "scale", 1.0)

    return Model, lambda _, number: setattr(Settings, "scale", number)


def of_a_container() -> Any:
    class Settings(list[float]):
        scale = 1.0

    settings = Settings([1.0])
    settings.own = 1.0  # type: ignore[attr-defined]

    class Model(Scaled):
        def factor(self) -> Any:
            return settings[0] * settings.own * settings.scale  # type: ignore[attr-defined]

    def change(_: Any, number: float) -> None:
        setattr(Settings if number == 2 else settings, "scale" if number < 4 else "own", number)

    return Model, change


def of_a_context() -> Any:
    current = contextvars.ContextVar[Any]("current")
    current.set(chain(1))

    class Model(Scaled):
        def factor(self) -> Any:
            return current.get().sub.scale

    return Model, lambda _, number: setattr(last(current.get()), "scale", number)


PLACES: dict[str, Place] = {
    place.__name__: place
    for place in (
        *(of_the_model, below_containers, of_a_variable, enclosed, by_a_name_put_together),
        *(by_a_way_put_together, past_the_class, remembered_number, remembered_tensor),
        *(another_in_a_variable, another_in_an_object, in_a_class_of_a_class, in_a_set),
        *(open_settings, of_an_enclosed_module, remembered_contents),
        *(of_a_class_that_gets_it, of_a_container, of_a_context),
    )
}


def holds(split: Any) -> bool:
    """Return whether the program that was planned is right for a call that is made now."""
    ((entry,),) = state_of(split).entries.values()
    return entry.guards.hold()


@pytest.mark.parametrize("name", PLACES)
def test_it_is_followed(name: str) -> None:
    build, change = PLACES[name]()
    model = build()
    split = autoparallel.autoparallelize(build(), 1, example_inputs=X)
    for number in (1.0, 2.0, 3.0):
        assert number > 1 or holds(split), "what has not changed is right"
        results = []
        for each in (model, split):
            if number > 1:
                change(each, number)
        for each in (model, split):
            results.append(after_backward(each, X))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=0)
    assert not state_of(split).plan.breaks, "it is split, and no Python"


class Latest(Base):
    """Does something else with the input that it was given last time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 2.0 if x is self.kept else 1.0
        self.kept = x
        return self.out(self.a(x)) * factor


def test_an_input_that_an_earlier_call_has_kept() -> None:
    model, split = Latest(), autoparallel.autoparallelize(Latest(), 1, example_inputs=X)
    other = X + 1
    for x in (X, X, other, X, X):
        torch.testing.assert_close(after_backward(split, x), after_backward(model, x))


@functools.cache
def noise(size: int) -> torch.Tensor:
    return torch.rand(size, dtype=torch.float64)


class Noisy(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * noise(12))


def test_a_function_that_remembers_what_it_has_drawn() -> None:
    noise.cache_clear()
    split = autoparallel.autoparallelize(Noisy(), 1, example_inputs=X)
    found = [after_backward(split, X) for _ in range(2)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], after_backward(Noisy(), X))
    assert "draws random numbers" in str(state_of(split).plan.breaks[0])


class Unshown:
    """Fails where its attributes are asked for as a whole."""

    scale = 1.0

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            raise RuntimeError("it shows nothing")
        return object.__getattribute__(self, name)


def test_an_object_that_cannot_be_looked_at() -> None:
    kept = Unshown()

    class Model(Scaled):
        def factor(self) -> Any:
            return kept.scale

    model, split = Model(), autoparallel.autoparallelize(Model(), 1, example_inputs=X)
    assert "RuntimeError is raised where it is looked at" in str(state_of(split).plan.breaks[0])
    for number in (1.0, 2.0):
        kept.scale = number
        torch.testing.assert_close(after_backward(split, X), after_backward(model, X))
