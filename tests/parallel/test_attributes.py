"""Attributes that a forward reads are followed when they change, as on the unsplit model."""

from __future__ import annotations

import copy
import dataclasses
import types
from typing import Any

import pytest
import torch
from broad_cases import share_of
from split_ranks import as_unsplit, programs_of
from torch import nn

import autoparallel
from autoparallel.errors import PlanError


class Config:
    def __init__(self) -> None:
        self.scale, self.unread, self.layers = 1.0, 0, [1.0, 2.0]


@dataclasses.dataclass
class Settings:
    shift: float = 0.5


class Slotted:
    __slots__ = ("power",)

    def __init__(self) -> None:
        self.power = 2


class Layer(nn.Module):
    gain = 1.0

    def __init__(self, config: Config, number: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)
        self.config, self.number = config, number
        self.temperature, self.unread = 1.0, 0

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixed(x) * self.config.scale * self.temperature * self.gain


class Model(nn.Module):
    extra = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.settings = Config(), Settings()
        self.table: dict[str, Any] = {"shift": 0.0, "deeper": {"factor": 1.0}}
        self.slotted = Slotted()
        self.layers = nn.ModuleList(Layer(self.config, number) for number in range(4))
        self.head, self.dropout = nn.Linear(8, 5), nn.Dropout(0.0)
        self._hidden_scale = 1.0
        self.double()

    @property
    def hidden_scale(self) -> float:
        return self._hidden_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        x = self.dropout(x) * self.hidden_scale + self.table["shift"]
        x = x * self.table["deeper"]["factor"] * self.config.layers[1] + self.settings.shift
        x = self.head(x) * getattr(self, "optional", 1.0)
        return x.abs().pow(self.slotted.power).mean() * self.extra


class Broken(Model):
    """It stays Python, and its layers are parts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 1e9:
            return x.sum()
        return super().forward(x)


def set_path(path: str, value: Any) -> Any:
    """A change of the attribute at a path, such as "layers.2.temperature"."""

    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        item = model
        for step in filter(None, owner.split(".")):
            item = item[int(step)] if step.isdigit() else getattr(item, step)
        setattr(item, name, value)

    return change


def set_item(table: str, key: Any, value: Any) -> Any:
    def change(model: Any) -> None:
        item = model
        for step in table.split("."):
            item = item[step] if isinstance(item, dict) else getattr(item, step)
        item[key] = value

    return change


def new_method(model: Any) -> None:
    layer = model.layers[1]
    layer.mixed = types.MethodType(lambda self, x: self.outer(self.inner(x)), layer)


def new_forward(model: Any) -> None:
    layer = model.layers[3]
    layer.forward = types.MethodType(lambda self, x: x * self.temperature, layer)


def deleted(model: Any) -> None:
    model.settings = Settings(3.0)
    del model.layers[0].temperature
    model.layers[0].temperature = 0.3


CHANGES = {
    "an attribute": set_path("layers.2.temperature", 0.5),
    "of a module of torch": set_path("head.forward", lambda x: x[..., :5] * 2),
    "of a config": set_path("config.scale", 0.25),
    "a config": set_path("settings", Settings(2.0)),
    "of a dataclass": set_path("settings.shift", -1.0),
    "of a slot": set_path("slotted.power", 3),
    "in a dict": set_item("table", "shift", 0.75),
    "in a dict in a dict": set_item("table.deeper", "factor", -2.0),
    "in a list of a config": set_item("config.layers", 1, 5.0),
    "behind a property": set_path("_hidden_scale", 3.0),
    "that was not there": set_path("optional", 4.0),
    "of the class, on the object": set_path("extra", 0.5),
    "of a layer's class, on the object": set_path("layers.1.gain", -1.0),
    "a method": new_method,
    "a layer's forward": new_forward,
    "several": deleted,
}


def script(change: Any) -> Any:
    def run(model: Any) -> Any:
        torch.manual_seed(1)
        x = torch.randn(3, 8, dtype=torch.float64)
        for _ in range(2):
            model.zero_grad()
            loss = model(x)
            loss.backward()
            yield loss
        before = programs_of(model)
        change(model)
        for _ in range(2):
            model.zero_grad()
            loss = model(x)
            loss.backward()
            yield loss
        return before, programs_of(model)

    return run


@pytest.mark.parametrize("kind", share_of(CHANGES, 4))
def test_a_change_is_followed(kind: str) -> None:
    """One program before, and one more afterwards, however often it is called."""
    x = torch.ones(3, 8, dtype=torch.float64)
    assert as_unsplit(Model(), 2, (x,), script(CHANGES[kind])) == (1, 2)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("model", [Model, Broken])
def test_it_is_followed_on_any_number_of_ranks_and_in_parts(world_size: int, model: Any) -> None:
    x = torch.ones(3, 8, dtype=torch.float64)

    def change(model: Any) -> None:
        model.layers[2].temperature = 0.5
        model.config.scale = 0.25

    # In parts, the head is one that does not depend on what has changed.
    programs = (1, 2) if model is Model else (5, 9)
    assert as_unsplit(model(), world_size, (x,), script(change)) == programs


def back_and_forth(model: Any) -> Any:
    """An old value finds its program, and what is never read makes none."""
    x = torch.ones(3, 8, dtype=torch.float64)
    for value in (1.0, 0.5, 1.0, 0.5, 1):
        model.layers[0].temperature = value
        model.layers[1].unread = model.config.unread = model.unread = value
        yield model(x)
    return programs_of(model)


def test_programs_for_old_values_stay() -> None:
    x = torch.ones(3, 8, dtype=torch.float64)
    # The whole number 1 is no 1.0, which a tensor of whole numbers could tell.
    assert as_unsplit(Model(), 2, (x,), back_and_forth) == 3


class Asking(nn.Module):
    """It asks whether gradients are recorded, and makes tensors of the default type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12).double(), nn.Linear(12, 8).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if torch.is_grad_enabled():
            hidden = hidden * 2
        weights = torch.full((12,), 1 / 3)
        return (self.second(hidden) + (hidden * weights).sum()).square().mean()


def switches(model: Any) -> Any:
    x = torch.ones(3, 8, dtype=torch.float64)
    with torch.no_grad():
        yield model(x)
    with torch.inference_mode():
        yield model(x)
    loss = model(x)
    loss.backward()
    yield loss
    torch.set_default_dtype(torch.float64)
    try:
        yield model(x)
    finally:
        torch.set_default_dtype(torch.float32)
    yield model(x)
    return programs_of(model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_switches_of_torch_are_followed(world_size: int) -> None:
    x = torch.ones(3, 8, dtype=torch.float64)
    assert as_unsplit(Asking(), world_size, (x,), switches) == 3


def test_a_plan_for_other_attributes_is_not_simulated() -> None:
    """A plan knows what its trace has read; one that is applied is followed where it fits."""
    model, x = Model(), torch.ones(3, 8, dtype=torch.float64)
    plan = autoparallel.make_plan(model, 2, example_inputs=x)
    model.layers[1].temperature = 0.25
    with pytest.raises(PlanError, match="temperature"):
        autoparallel.simulate(model, plan=plan, example_inputs=x)
    model.layers[1].temperature = 1.0
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(PlanError, match="torch is in another state"),
    ):
        autoparallel.simulate(model, plan=plan, example_inputs=x)
    single = autoparallel.make_plan(model, 1, example_inputs=x)
    model.layers[1].temperature = 0.25
    applied = autoparallel.apply_plan(model, single)
    torch.testing.assert_close(applied(x), model(x), rtol=1e-12, atol=0)


def test_attributes_that_are_set_before_the_first_call() -> None:
    model, x = Model(), torch.ones(3, 8, dtype=torch.float64)
    waiting: Any = autoparallel.autoparallelize(model, 1)
    waiting.layers[1].temperature, waiting.extra = 0.25, 2.0
    expected = copy.deepcopy(model)
    expected.layers[1].temperature, expected.extra = 0.25, 2.0
    torch.testing.assert_close(waiting(x), expected(x), rtol=1e-12, atol=0)
    # It is planned once: the parameters, which are the same objects as before, are no others.
    ((entry,),) = waiting._autoparallel.entries.values()
    assert entry.plan is waiting.plan


class Base:
    """Of its instances, which have no dictionary, the forward reads what their class has."""

    __slots__ = ("power",)
    number = 2.0

    def times(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.number**self.power


def test_attributes_of_the_class_of_an_object_without_a_dictionary() -> None:
    class Raised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.base = Base()
            self.base.power = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base.times(self.inner(x)).sum()

    model, x = Raised().double(), torch.ones(3, 4, dtype=torch.float64)
    made = autoparallel.simulate(model, 2, example_inputs=x)
    torch.testing.assert_close(made.output, model(x).detach(), rtol=1e-12, atol=0)
