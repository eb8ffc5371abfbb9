"""Global variables that a forward reads, and variables of functions around it, are followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from split_ranks import as_unsplit, programs_of
from torch import nn

from autoparallel.capture.global_reads import global_reads

SCALE = 1.0
TABLE = {"shift": 0.5, "deeper": [1.0, 2.0]}
UNREAD = 0


@dataclass
class Settings:
    power: float = 1.0


class Flags:
    negate = False


SETTINGS = Settings()


def scaled(x: torch.Tensor) -> torch.Tensor:
    """A function that the forward calls; the global variable is read here."""
    return x * SCALE


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


def test_only_what_the_code_names_counts() -> None:
    Model, _ = around(1.0)
    names = {str(read.route[-1][1]) + "." + read.name for read in global_reads(Model())}
    assert {f"{__name__}.SCALE", f"{__name__}.TABLE", "SETTINGS.power", "Flags.negate"} <= names
    assert not any("UNREAD" in name for name in names)
