"""Plans that were found once are read where the same is asked for again, and nowhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoparallel
from autoparallel import Mesh, Plan, Shard
from autoparallel.discovery import unknown_ops
from autoparallel.discovery.probe_processes import EndedError
from autoparallel.options import Options
from autoparallel.planning import kept_plans, plan_model
from autoparallel.planning.plan_model import trace_model
from autoparallel.rules import registry
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.registry import rule

INPUTS = torch.zeros(4, 8)


class Layers(nn.Module):
    """Two products, of which the first may be checkpointed, or have the second one's weight."""

    def __init__(self, saved: bool = True, tied: bool = False, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, 8)
        self.saved = saved
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.first(x) if self.saved else checkpoint(self.first, x, use_reentrant=False)
        return self.second(torch.relu(made)).sum()


class Parts(nn.Module):
    """A model of which Python stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.first(x)
        return self.second(made * float(made.tolist()[0][0] > 0)).sum()


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of plans of its own, in which every plan is kept."""
    monkeypatch.setenv("AUTOPARALLEL_KEEP_PLANS", "1")
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path))
    monkeypatch.setattr(plan_model, "_WORTH_KEEPING", -1.0)
    return tmp_path / "plans"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Mesh]:
    """The meshes for which a search was begun."""
    begun: list[Mesh] = []
    search: Callable[..., Plan] = plan_model._search

    def counted(model: Any, traced: Any, mesh: Mesh, *rest: Any, **more: Any) -> Plan:
        begun.append(mesh)
        return search(model, traced, mesh, *rest, **more)

    monkeypatch.setattr(plan_model, "_search", counted)
    return begun


ASKED: dict[str, dict[str, Any]] = {
    "one axis": {"world_size": 2},
    "two axes": {"mesh": Mesh(dp=2, tp=2)},
    "chosen": {"world_size": 4, "mesh": "auto"},
    "limited": {"mesh": Mesh(dp=2), "memory_limit": "1MiB"},
    "stages": {"mesh": Mesh(pp=2), "microbatches": 2},
    "pinned": {"world_size": 2, "pins": {"first.weight": Shard(1)}},
}


@pytest.mark.parametrize("name", ASKED)
def test_what_was_asked_before_is_read(name: str, kept: Path, searches: list[Mesh]) -> None:
    plans = []
    for _ in range(2):
        asked = {"example_inputs": INPUTS, **ASKED[name]}
        plans.append(autoparallel.make_plan(Layers(), **asked))
        assert searches
        count = len(searches)
    assert count == len(searches)
    assert len([*kept.glob("*.json")]) == 1
    first, second = plans
    assert second == first
    assert str(second) == str(first)
    assert second.is_traced
    assert str(autoparallel.timeline(second)) == str(autoparallel.timeline(first))


def test_a_plan_that_is_read_trains_as_the_model_does(searches: list[Mesh]) -> None:
    torch.manual_seed(0)
    model, inputs = Layers(width=12).double(), torch.randn(4, 8, dtype=torch.float64)
    autoparallel.make_plan(model, 2, example_inputs=inputs)
    simulation = autoparallel.simulate(model, 2, example_inputs=inputs)
    assert len(searches) == 1
    model(inputs).backward()
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(simulation.gradients[path], parameter.grad, atol=1e-12, rtol=0)


def test_of_a_model_in_parts(searches: list[Mesh]) -> None:
    first, second = (autoparallel.make_plan(Parts(), 2, example_inputs=INPUTS) for _ in range(2))
    assert len(searches) == 1
    assert first.breaks
    assert second == first
    assert str(second) == str(first)


class Named(nn.Module):
    """Two products that are returned by names; its inputs are called as it is told."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.names = names

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        layers = (self.first, self.second)
        made = [layer(each) for layer, each in zip(layers, inputs.values(), strict=True)]
        return dict(zip(self.names, made, strict=True))


def key(model: nn.Module, inputs: Any = INPUTS, **asked: Any) -> str | None:
    options = asked.pop("options", Options())
    given = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    traced = trace_model(model, *given, options)
    return kept_plans.key_of(model, traced, options, asked)


OTHERS: dict[str, Callable[[], str | None]] = {
    "longer inputs": lambda: key(Layers(), torch.zeros(6, 8)),
    "double precision": lambda: key(Layers().double(), INPUTS.double()),
    "a frozen weight": lambda: key(_frozen()),
    "a tied weight": lambda: key(Layers(tied=True)),
    "a checkpoint": lambda: key(Layers(saved=False)),
    "another width": lambda: key(Layers(width=16)),
    "an option": lambda: key(Layers(), options=replace(Options(), optimizer="sgd")),
    "the hardware": lambda: key(Layers(), options=replace(Options(), hardware="dgx-a100")),
    "another mesh": lambda: key(Layers(), mesh=Mesh(tp=3)),
}


def _frozen() -> nn.Module:
    model = Layers()
    model.second.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_has_another_key(name: str) -> None:
    assert OTHERS[name]() not in (None, key(Layers()))


def _named(returned: str, given: str) -> str | None:
    return key(Named(*returned.split()), dict.fromkeys(given.split(), INPUTS))


def _beside(dtype: torch.dtype) -> str | None:
    """A model in parts, with a parameter beside them that none of them reads."""
    model = Parts()
    model.beside = nn.Parameter(torch.zeros(8, dtype=dtype))
    return key(model)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: _named("p q", "x y"), lambda: _named("q p", "x y")),
        (lambda: _named("p q", "x y"), lambda: _named("p q", "x z")),
        (lambda: _beside(torch.float32), lambda: _beside(torch.float64)),
    ],
    ids=["returned names", "names of inputs", "a parameter that stays with Python"],
)
def test_what_no_program_says_has_another_key(
    one: Callable[[], str | None], other: Callable[[], str | None]
) -> None:
    """A plan tells of these, and demands may call an input by its name."""
    assert one() is not None
    assert one() == one()
    assert one() != other()


def test_equal_models_have_one_key() -> None:
    assert key(Layers()) == key(Layers())


def test_another_planner_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(Layers())
    monkeypatch.setattr(kept_plans, "_code", lambda: "changed")
    assert key(Layers()) != before


def test_with_rules_of_the_users_own_nothing_is_kept(kept: Path) -> None:
    """A rule may look at anything: its text alone says not what it will say."""
    author = find_rule("aten.relu.default")
    assert author is not None
    before = dict(registry._RULES)
    try:

        def mine(call: Any) -> Any:
            return author(call)

        rule("aten.relu.default", replace=True)(mine)
        assert key(Layers()) is None
        autoparallel.make_plan(Layers(), 2, example_inputs=INPUTS)
        assert not kept.exists()
    finally:
        registry._RULES.clear()
        registry._RULES.update(before)


def test_what_could_not_be_tried_this_time_is_tried_again(
    kept: Path, searches: list[Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that probes an op may be ended by its machine: its op is whole only this once."""

    class Unknown(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.polygamma(1, self.first(x).abs() + 1).sum()

    found = unknown_ops._cached
    ends = Mock(side_effect=EndedError("could not be tried", lasting=False))
    for name, value in (("_REASONS", {}), ("_NOT_TRIED", set()), ("_cached", ends)):
        monkeypatch.setattr(unknown_ops, name, value)
    monkeypatch.setattr(registry, "_REMEMBERED", {})
    autoparallel.make_plan(Unknown(), 2, example_inputs=INPUTS)
    assert ends.called
    assert not kept.exists()
    # As in the next process.
    for name, value in (("_REASONS", {}), ("_NOT_TRIED", set()), ("_cached", found)):
        monkeypatch.setattr(unknown_ops, name, value)
    monkeypatch.setattr(registry, "_REMEMBERED", {})
    for _ in range(2):
        autoparallel.make_plan(Unknown(), 2, example_inputs=INPUTS)
    assert len(searches) == 2


def damaged(text: str) -> Iterator[str]:
    """Yield files that are no plan of the model."""
    yield from ("", "{", "[" * 10_000, text[: len(text) // 2], json.dumps({"key": 1}))
    rows = json.loads(text)
    plan = json.loads(rows["plan"])
    plan["ops"][0]["operands"][0] = ["P"]
    yield json.dumps({**rows, "plan": json.dumps(plan)})
    digest = kept_plans._digest(json.dumps(plan))
    yield json.dumps({**rows, "plan": json.dumps(plan), "digest": digest})
    yield json.dumps({**rows, "plan": rows["plan"].replace('"seconds": ', '"seconds": 1')})
    yield json.dumps({**rows, "plan": 7})
    yield json.dumps({**rows, "key": "0" * 64})


def test_a_file_that_is_damaged_is_written_anew(kept: Path, searches: list[Mesh]) -> None:
    first = autoparallel.make_plan(Layers(), 2, example_inputs=INPUTS)
    (path,) = kept.glob("*.json")
    text = path.read_text()
    for number, damage in enumerate(damaged(text)):
        path.write_text(damage)
        assert autoparallel.make_plan(Layers(), 2, example_inputs=INPUTS) == first
        assert len(searches) == number + 2
        assert path.read_text() == text


def test_the_oldest_make_room(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_plans, "_MOST_PLANS", 2)
    for number, width in enumerate((8, 12, 16)):
        autoparallel.make_plan(Layers(width=width), 2, example_inputs=INPUTS)
        newest = max(kept.glob("*.json"), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (number, number))
    assert len([*kept.glob("*.json")]) == 2


def test_a_start_and_the_environment_switch_it_off(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPARALLEL_KEEP_PLANS", "0")
    plan = autoparallel.make_plan(Layers(), 2, example_inputs=INPUTS)
    monkeypatch.setenv("AUTOPARALLEL_KEEP_PLANS", "1")
    autoparallel.make_plan(Layers(), 2, example_inputs=INPUTS, start=plan)
    assert not kept.exists()


def test_a_folder_that_cannot_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path / "file"))
    autoparallel.make_plan(Layers(), 2, example_inputs=INPUTS)


def test_a_user_without_a_home_plans_each_time(
    searches: list[Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AUTOPARALLEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    for _ in range(2):
        autoparallel.make_plan(Layers(), 2, example_inputs=INPUTS)
    assert len(searches) == 2
