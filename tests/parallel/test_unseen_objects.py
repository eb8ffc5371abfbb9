"""Objects that a forward reads or writes to by other ways than plain attributes of modules."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from broad_cases import share_of
from processes import run_processes
from torch import nn
from unseen import Base, Case, X, after_backward, differences, follows

import autoparallel
from autoparallel.errors import AutoParallelError, CaptureError


def set_kept(model: Any) -> Any:
    for value in (1.0, 2.0, 1.0):
        model.kept = value
        yield after_backward(model)


def dictionary() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * self.__dict__["kept"])

    return Model(1.0), set_kept


def names_in_a_dictionary() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own = vars(self)
            scale = own.get("other", 1.0) * (2.0 if "third" in own else 1.0)
            return self.out(self.a(x) * scale * sum(name[:3] == "new" for name in own))

    def script(model: Any) -> Any:
        for name in ("new", "other", "third", "newer"):
            setattr(model, name, 3.0)
            yield model(X)

    model: Any = Model()
    model.news = 1
    return model, script


def method_for_missing_attributes() -> Case:
    class Model(Base):
        def __getattr__(self, name: str) -> Any:
            settings = self.__dict__.get("kept", {})
            return settings[name] if name in settings else super().__getattr__(name)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * self.scale)

    def script(model: Any) -> Any:
        for value in (1.0, 2.0):
            model.kept["scale"] = value
            yield model(X)

    return Model({"scale": 1.0}), script


def method_for_all_attributes() -> Case:
    class Model(Base):
        def __getattribute__(self, name: str) -> Any:
            if name == "scale":
                return object.__getattribute__(self, "kept")
            return super().__getattribute__(name)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * self.scale)

    return Model(1.0), set_kept


def past_all_methods() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * object.__getattribute__(self, "kept"))

    return Model(1.0), set_kept


@dataclass(slots=True)
class Slotted:
    scale: float = 1.0
    scales: list[float] = field(default_factory=lambda: [1.0])


def slots() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            missing = 1.0 if hasattr(self.kept, "nothing") else 2.0
            return self.out(self.a(x) * self.kept.scale * self.kept.scales[0] * missing)

    def script(model: Any) -> Any:
        yield model(X)
        model.kept.scale = 2.0
        yield model(X)
        model.kept.scales[0] = 3.0
        yield model(X)
        model.kept.scale, model.kept.scales[0] = 1.0, 1.0
        yield model(X)

    return Model(Slotted()), script


def written_slot() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.scale += 1
            self.kept.scales.append(1.0)
            return self.out(self.a(x) * self.kept.scale)

    def script(model: Any) -> Any:
        for _ in range(3):
            yield model(X)
            yield model.kept.scale, len(model.kept.scales)

    return Model(Slotted()), script


def class_attribute() -> Case:
    class Model(Base):
        scale, other, third = 1.0, 1.0, [1.0]

        @classmethod
        def get(cls) -> float:
            return cls.other * cls.third[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * type(self).scale * self.get())

    def script(model: Any) -> Any:
        for values in ((1.0, 1.0, [1.0]), (2.0, 1.0, [1.0]), (1.0, 3.0, [1.0]), (1.0, 1.0, [5.0])):
            Model.scale, Model.other, Model.third = values
            yield model(X)

    return Model(), script


class Tempered(nn.Linear):
    temperature = 1.0


def class_of_a_submodule() -> Case:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tempered(8, 8).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(self.inner(x)) * type(self.inner).temperature)

    def script(model: Any) -> Any:
        for value in (1.0, 2.0, 1.0):
            Tempered.temperature = value
            yield model(X)

    return Model(), script


class Scale:
    value = 1.0


REFERRED = Scale()


def weak_reference() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * self.kept().value)

    def script(model: Any) -> Any:
        for value in (1.0, 2.0, 1.0):
            REFERRED.value = value
            yield model(X)

    return Model(weakref.ref(REFERRED)), script


def counted_in_the_class() -> Case:
    class Model(Base):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).calls += 1
            return self.out(self.a(x) * self.calls)

    def script(model: Any) -> Any:
        for _ in range(2):
            yield model(X)
        yield Model.calls
        type(model).calls = 0
        yield Model.calls

    return Model(), script


def asked_for_classes() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = 5.0 if float(x.sum()) > 1e9 else 1.0  # it stays Python
            scales = {nn.Linear: 2.0}
            known = type(self) in (Model,) and type(self.a) in (nn.Linear, nn.Conv1d)
            return self.out(self.a(x) * scale * scales[type(self.b)] * (3.0 if known else 1.0))

    return Model(), lambda model: iter([after_backward(model)])


class Logging(nn.Module):
    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self.log, self.linear = log, nn.Linear(8, 8).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        self.log.append(y)
        return y


def shared_lists() -> Case:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__([])
            self.same = self.kept
            self.layers = nn.ModuleList(Logging(self.kept) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.same.clear()
            for layer in self.layers:
                x = layer(x)
            return self.out(self.a(x)) + sum(item.sum() for item in self.kept)

    def script(model: Any) -> Any:
        yield after_backward(model)
        yield len(model.kept), model.same is model.kept, model.layers[0].log is model.kept

    return Model(), script


class Log:
    def __init__(self) -> None:
        self.items: list[int] = []


def list_of_an_object() -> Case:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__(Log())
            self.items = self.kept.items

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.items.append(1)
            return self.out(self.a(x) * len(self.items))

    def script(model: Any) -> Any:
        for _ in range(2):
            yield model(X)
        yield len(model.items), len(model.kept.items)

    return Model(), script


def iterators() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * next(self.kept[0]) * next(self.numbers))

    def script(model: Any) -> Any:
        for _ in range(3):
            yield after_backward(model)

    model: Any = Model([iter([1.0, 2.0, 3.0])])
    model.numbers = map(abs, iter([-1.0, -2.0, -3.0]))
    return model, script


def random_generators() -> Case:
    numbers, others = random.Random(1), np.random.default_rng(2)

    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            drawn = self.kept["random"].random() * self.kept["old"].rand()
            return self.out(self.a(x) * drawn * numbers.random() * others.random())

    def script(model: Any) -> Any:
        numbers.seed(1)
        others.bit_generator.state = np.random.default_rng(2).bit_generator.state
        for _ in range(3):
            yield after_backward(model)

    return Model({"random": random.Random(3), "old": np.random.RandomState(4)}), script


CASES = [
    *(dictionary, names_in_a_dictionary, method_for_missing_attributes, past_all_methods),
    *(method_for_all_attributes, slots, class_attribute, asked_for_classes, shared_lists),
    *(class_of_a_submodule, weak_reference),
]
# The copies of one process would share their objects, which the forwards change.
ALONE = [written_slot, counted_in_the_class, list_of_an_object, iterators, random_generators]


@pytest.mark.parametrize("case", share_of(CASES, 3))
def test_objects_are_followed(case: Any) -> None:
    follows(case, 2)


@pytest.mark.parametrize("case", ALONE)
def test_changing_objects_are_followed(case: Any) -> None:
    follows(case, 1)


def _alone(rank: int) -> dict[str, str]:
    return differences(rank, {case.__name__: case for case in ALONE})


def test_changing_objects_are_followed_by_processes() -> None:
    assert run_processes(_alone, 2) == [{}, {}]


@pytest.mark.parametrize("case", [dictionary, slots, class_attribute, past_all_methods])
def test_what_can_be_followed_is_split(case: Any) -> None:
    assert autoparallel.make_plan(case()[0], 2, example_inputs=X).breaks == ()


class Consuming(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * next(self.kept))


def test_a_generator_is_not_used_up() -> None:
    def numbers() -> Iterator[float]:
        yield from (1.0, 2.0, 3.0)

    model = Consuming(numbers())
    with pytest.raises(CaptureError, match="goes on with a generator"):
        autoparallel.make_plan(model, 2, example_inputs=X)
    assert next(model.kept) == 1.0


class Drawing(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * self.kept.random())


def _seeded_apart(rank: int) -> str:
    model = Drawing(random.Random(rank))
    try:
        autoparallel.autoparallelize(model, 2, example_inputs=X)
    except AutoParallelError as error:
        return str(error)
    return ""


def test_random_generators_that_differ_are_refused() -> None:
    for text in run_processes(_seeded_apart, 2):
        assert "the ranks start from different models: kept" in text
