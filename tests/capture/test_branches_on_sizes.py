"""A branch on a size holds for the sizes that go the same way, whatever becomes of that size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import one_of_each
from torch import nn

import autoparallel

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def scaled(x: torch.Tensor, condition: Any) -> torch.Tensor:
    return x * 2 if condition else x * 3


# The other tensor has as many rows, or twice as many. Sizes of it are known to be those of the
# first one when they meet, which in most cases is after the branch.
CASES: dict[str, tuple[int, Forward]] = {
    "of the first": (1, lambda x, y: scaled(x, x.size(0) > 4) + y),
    "of the other": (1, lambda x, y: scaled(x, y.size(0) > 4) + y),
    "of both": (1, lambda x, y: scaled(x, x.size(0) + y.size(0) > 9) + y),
    "of elements": (1, lambda x, y: scaled(x, x.numel() > 16) + y),
    "of half": (1, lambda x, y: scaled(x, x.chunk(2)[0].size(0) > 2) + y),
    "of the larger": (1, lambda x, y: scaled(x, max(x.size(0), y.size(0)) > 4) + y),
    "when they have met": (1, lambda x, y: scaled(x + y, y.size(0) > 4)),
    "of twice as many": (2, lambda x, y: torch.cat([scaled(x, y.size(0) > 8), x]) + y),
    "of half as many": (2, lambda x, y: torch.cat([scaled(x, x.size(0) > 4), x]) + y),
    "of an odd number": (1, lambda x, y: scaled(x, x.size(0) % 2 == 1) + y),
    # Torch writes the name of a symbol into a text, and has no hash of it.
    "written out": (1, lambda x, y: scaled(x, str(x.size(0)) == "3") + y),
    "in a text": (1, lambda x, y: x * TABLE.get(f"{tuple(y.shape)}", 1.0) + y),
    "with zeros": (1, lambda x, y: x * TABLE.get(f"{y.size(0):03d}", 1.0) + y),
    "looked up": (1, lambda x, y: x * TABLE.get(y.size(0), 1.0) + y),
    "in a set": (1, lambda x, y: scaled(x, len({3, x.size(0)}) == 1) + y),
}
TABLE: dict[object, float] = {"(3, 4)": 2.0, "003": 3.0, 3: 4.0}


class Branches(nn.Module):
    """A product, and what a function makes of it and another tensor."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(x), y)


class Layer(nn.Module):
    """A product, scaled by whether the other tensor is long."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return scaled(self.layer(x), y.size(0) > 4) + y


class Blocks(nn.Module):
    """Equal blocks with a branch in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, y)
        return x


def check(model: nn.Module, times: int, world_size: int) -> None:
    """Plan with few rows and call with few and many, and the other way around."""
    model = model.double()
    for planned in (3, 6):
        inputs = [
            tuple(torch.randn(rows * k, 4, dtype=torch.float64) for k in (1, times))
            for rows in (planned, 3, 4, 5, 6)
        ]
        plan = autoparallel.make_plan(model, world_size, example_inputs=inputs[0])
        assert plan.captured is not None
        for given in inputs:
            if plan.captured.fits(list(given)):
                made = autoparallel.simulate(model, plan=plan, example_inputs=given).output
                torch.testing.assert_close(made, model(*given))
        assert plan.captured.fits(list(inputs[0]))
        split = autoparallel.autoparallelize(model, 1, example_inputs=inputs[0])
        for given in inputs:
            torch.testing.assert_close(split(*given), model(*given))


KEPT = ("of the first", "of elements", "of twice as many", "in a text", "looked up")


@pytest.mark.parametrize("name", one_of_each(CASES, lambda name: name in KEPT))
def test_a_program_is_not_for_sizes_that_go_another_way(name: str) -> None:
    times, function = CASES[name]
    check(Branches(function), times, 2)


def test_equal_blocks_with_a_branch_in_each() -> None:
    check(Blocks(), 1, 3)


def test_a_power_of_a_size_is_planned_for() -> None:
    """Plans are for larger sizes than those of examples, of which this one would have no end."""
    model = Branches(lambda x, y: x * 2 ** y.size(0) + y)
    check(model, 1, 2)


def test_texts_of_torch_s_own_have_symbols() -> None:
    """And so have all texts, in other threads and afterwards."""
    seen: list[str] = []

    class Shown(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and isinstance(result.shape[0], torch.SymInt):
                thread = threading.Thread(target=lambda: seen.append(str(result.shape[0])))
                thread.start()
                thread.join()
            return result

    with Shown():
        model = Branches(lambda x, y: x + y)
        plan = autoparallel.make_plan(model, 1, example_inputs=(torch.ones(3, 4),) * 2)
    assert plan.captured is not None
    assert plan.captured.fits([torch.ones(5, 4)] * 2)
    assert seen
    assert not any(text.isdigit() for text in seen)
    assert "__format__" not in vars(torch.SymInt)


LIBRARY = """
import functools

def halved(shape):
    return shape[0] // 1, shape[1] // 2, 2

remembered = functools.lru_cache(halved)

def in_pairs(x):
    try:
        shape = remembered(x.shape)
    except TypeError:  # sizes may be symbols
        shape = halved(x.shape)
    return x.reshape(shape)
"""


def test_caches_of_libraries_keep_no_sizes_of_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would give symbols for equal numbers to the calls that come after."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "rows_in_pairs.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(folder))
    in_pairs = import_module("rows_in_pairs").in_pairs
    model = Branches(lambda x, y: in_pairs(x).sum(-1).sum() + y)
    given = (torch.ones(3, 4),) * 2
    plan = autoparallel.make_plan(model, 1, example_inputs=given)
    assert plan.captured is not None
    assert plan.captured.fits([torch.ones(5, 4)] * 2)
    model(*given)
