"""Global variables that a forward reads, and variables of functions around it, are followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from split_ranks import as_unsplit, programs_of
from torch import nn

from autoparallel.capture.export import capture
from autoparallel.capture.global_reads import global_reads

SCALE = 1.0
TABLE = {"shift": 0.5, "deeper": [1.0, 2.0]}
UNREAD = 0


@dataclass
class Settings:
    power: float = 1.0


class Flags:
    negate = False


class Bounds(NamedTuple):
    low: float = -2.0
    high: float = 2.0


SETTINGS = Settings()
BOUNDS = Bounds()


def scaled(x: torch.Tensor) -> torch.Tensor:
    """A function that the forward calls; the global variable is read here."""
    return x * SCALE


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Paired(nn.Module):
    """Reads the fields of a tuple, whose names its code has: the class has them as descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = Pair(self.up(x), x)
        return pair.left.sum() * pair.right.sum()


def test_a_class_of_named_tuples_is_no_variable_that_changes() -> None:
    assert capture(Paired(), (torch.ones(2, 6),), {}).graph.calls


def around(factor: float) -> tuple[type[nn.Module], Any]:
    """A class whose forward reads a variable of this function, and a function that changes it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
            self.double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.middle(torch.tanh(self.up(x)) * factor)
            if Flags.negate:
                x = -x
            x = x.clamp(BOUNDS.low, BOUNDS.high)
            return (x + TABLE["shift"] * TABLE["deeper"][1]).abs().pow(SETTINGS.power).sum()

        def middle(self, x: torch.Tensor) -> torch.Tensor:
            return scaled(self.down(x))

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return Model, change


CHANGES = {
    "a number": (("SCALE", 3.0),),
    "of an object": (("SETTINGS.power", 2.0),),
    "of a class": (("Flags.negate", True),),
    "in a dict": (("TABLE.shift", -1.0),),
    "another dict": (("TABLE", {"shift": 2.0, "deeper": [1.0, 5.0]}),),
    "a named tuple": (("BOUNDS", Bounds(high=0.05)),),
    "of a function around": (("around", 0.25),),
}


def put(monkeypatch: pytest.MonkeyPatch, change: Any, path: str, value: Any) -> None:
    name, _, inner = path.partition(".")
    if name == "around":
        change(value)
    elif not inner:
        monkeypatch.setitem(globals(), name, value)
    elif isinstance(globals()[name], dict):
        monkeypatch.setitem(globals()[name], inner, value)
    else:
        monkeypatch.setattr(globals()[name], inner, value)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_followed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank, and the plain model, runs with both values; the old program is found again."""
    Model, change = around(1.0)
    ((path, value),) = CHANGES[kind]
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)

    def script(model: Any) -> Any:
        counts = []
        for put_value in (None, value, None):
            with monkeypatch.context() as patch:
                change(1.0)
                if put_value is not None:
                    put(patch, change, path, put_value)
                patch.setitem(globals(), "UNREAD", UNREAD + 1)
                model.zero_grad()
                loss = model(x)
                loss.backward()
                yield loss
            counts.append(programs_of(model))
        change(1.0)
        return counts

    torch.manual_seed(0)
    assert as_unsplit(Model(), 1, (x,), script) == [1, 2, 2]


class Inherited(nn.Module):
    """Its methods read a global variable, and are called by those that override them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        self.last = [lambda x: x]
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last[0](self.middle(self.up(x))).pow(2).sum()

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(x))


class ByForward(Inherited):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * SCALE


class AboveForward(ByForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class ByMethod(Inherited):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return super().middle(x) * SCALE


class AboveMethod(ByMethod):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return super().middle(x) * 2


class Scales:
    """An object that modules keep, whose methods read a global variable."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * SCALE

    @property
    def scale(self) -> float:
        return SCALE

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)

    @classmethod
    def of_class(cls, x: torch.Tensor) -> torch.Tensor:
        return x * SCALE


SCALES = Scales()


def with_last(last: Any) -> Any:
    def make() -> nn.Module:
        model = Inherited()
        model.last = [last]
        return model

    return make


METHODS = [
    with_last(Scales()),
    with_last(lambda x: SCALES(x)),
    with_last(lambda x: x * SCALES.scale),
    with_last(lambda x: SCALES.scaled(x)),
    with_last(lambda x: Scales.of_class(x)),
]


def listed() -> nn.Module:
    model = Inherited()
    model.last = [scaled]
    return model


def hooked() -> nn.Module:
    model = Inherited()
    model.down.register_forward_hook(lambda _, __, result: result * SCALE)
    return model


@pytest.mark.parametrize("make", [AboveForward, AboveMethod, listed, hooked, *METHODS])
def test_a_change_is_followed_wherever_it_is_read(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In methods that others override or that objects have, in a list's functions, in hooks."""
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)

    def script(model: Any) -> Any:
        for value in (1.0, 3.0):
            with monkeypatch.context() as patch:
                patch.setitem(globals(), "SCALE", value)
                model.zero_grad()
                loss = model(x)
                loss.backward()
                yield loss

    torch.manual_seed(0)
    as_unsplit(make(), 1, (x,), script)


def test_only_what_the_code_names_counts() -> None:
    Model, _ = around(1.0)
    names = {str(read.route[-1][1]) + "." + read.name for read in global_reads(Model())}
    assert {f"{__name__}.SCALE", f"{__name__}.TABLE", "SETTINGS.power", "Flags.negate"} <= names
    assert not any("UNREAD" in name for name in names)
