"""Tensors and settings that a graph takes for constant are those of the module that is called."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from unseen import Base, Case, X, after_backward, follows

import autoparallel


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


class Listed(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.kept
        return self.out(torch.tanh(self.a(x))) * (first + 2 * second)


class Copied(Listed):
    """It is traced by itself."""


class Read(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.a(x))) * self.kept.item()


def test_equal_tensors_in_a_list_are_two() -> None:
    """One of them may be written to by itself."""
    model = Listed([number(4.0), number(4.0)])
    split: Any = autoparallel.autoparallelize(model, 1, example_inputs=X)
    before = split(X)
    torch.testing.assert_close(before, model(X))
    model.kept[0].mul_(3)
    torch.testing.assert_close(split(X), model(X))
    assert not torch.equal(split(X), before)


def test_tensors_in_a_list_of_a_copy_are_its_own() -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        yield after_backward(model)
        second = copy.deepcopy(model)
        second.kept[0].mul_(3)
        yield after_backward(model)
        yield after_backward(second)
        model.kept[1].mul_(5)
        yield after_backward(second)
        yield after_backward(model)

    follows(lambda: (Copied([number(4.0), number(2.0)]), script), 2)


def test_numbers_that_are_written_past_all_versions_are_followed() -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        yield after_backward(model)
        model.kept.mul_(3)
        yield after_backward(model)
        model.kept.data.fill_(5.0)
        yield after_backward(model)

    follows(lambda: (Read(number(2.0)), script), 2)


def test_settings_of_a_thread_are_those_of_the_thread_that_calls() -> None:
    """They are found by a text, and in a variable of a function around the forward."""
    settings = threading.local()

    class Scaled(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.tanh(self.a(x))) * getattr(settings, "scale", 1.0)

    def script(model: Any) -> Iterator[torch.Tensor]:
        for value in (2.0, 3.0):
            settings.scale = value
            yield after_backward(model)
        del settings.scale
        yield after_backward(model)

    def case() -> Case:
        return Scaled(), script

    settings.scale = 7.0
    follows(case, 1)
    model, found = Scaled(), []
    split: Any = autoparallel.autoparallelize(model, 1, example_inputs=X)
    for scale in (2.0, 3.0):

        def work(scale: float = scale) -> None:
            settings.scale = scale
            found.append((split(X).detach(), model(X).detach()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    for ours, expected in found:
        torch.testing.assert_close(ours, expected)
