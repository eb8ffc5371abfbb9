"""The rows of habits notice what is not as with the unsplit module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from habits.case import Case
from habits.launch import ran
from habits.models import plain, rows
from habits.registry import Habit

from autoparallel.errors import PlanError


def is_split(model: Any) -> bool:
    return "_autoparallel" in vars(model)


def fails(model: Any) -> None:
    raise ValueError("no")


def fails_split(model: Any) -> None:
    if is_split(model):
        raise ValueError("no")


def refuses(model: Any) -> None:
    if is_split(model):
        raise PlanError("it cannot be", fix="do this;\nor that")


def hooked(model: Any) -> torch.Tensor:
    """A hook that is registered later makes the model run as Python."""
    model.up.register_forward_hook(lambda module, args, output: None)
    return model(*rows(6, 0))


def other_gradient(model: Any) -> None:
    (model(*rows(6, 0)) * (2 if is_split(model) else 1)).backward()


def other_parameter(model: Any) -> None:
    with torch.no_grad():
        model.down.bias[0] += 1e-6 * is_split(model)


def right(model: Any) -> torch.Tensor:
    loss = model(*rows(6, 0))
    loss.backward()
    return loss


ROWS: list[tuple[Callable[[Case], Any], str]] = [
    (lambda case: case.compare(right), "works"),
    (lambda case: case.compare(hooked), "works as Python"),
    (lambda case: case.compare(refuses), "refused"),
    (lambda case: case.compare(fails, fails=True), "same error"),
    (lambda case: case.compare(fails), "error"),
    (lambda case: case.compare(fails_split), "error"),
    (lambda case: case.compare(fails_split, fails=True), "error"),
    (lambda case: case.compare(right, fails=True), "error"),
    (lambda case: case.compare(other_gradient), "wrong"),
    (lambda case: case.compare(other_parameter), "wrong"),
    (lambda case: case.compare(lambda model: 1.0 + 1e-6 * is_split(model)), "wrong"),
    (lambda case: case.compare(lambda model: {"a": is_split(model)}), "wrong"),
    (lambda case: case.compare(lambda model: [1] * (1 + is_split(model))), "wrong"),
    (lambda case: case.same(torch.ones(2), torch.ones(2).requires_grad_()), "wrong"),
]


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_kinds(number: int, tmp_path: Path) -> None:
    run, kind = ROWS[number]
    row = Habit("a group", "a habit", run, False, ())
    outcome = ran(row, Case(1, 0, tmp_path))
    assert outcome.kind == kind, outcome
    if kind == "refused":
        assert (outcome.message, outcome.fix) == ("it cannot be", "do this")


def test_a_row_that_must_be_refused(tmp_path: Path) -> None:
    row = Habit("a group", "a habit", lambda case: case.split(plain(), rows(6, 0)), True, ())
    assert ran(row, Case(1, 0, tmp_path)).kind == "wrong"
