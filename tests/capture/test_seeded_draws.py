"""A forward that draws by a seed of its own stays Python: a graph would draw other numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import autoparallel

Draw = Callable[[torch.Tensor], torch.Tensor]


def seeds(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(8, dtype=x.dtype)


def forks(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return torch.rand_like(x)


def sets_the_state(x: torch.Tensor) -> torch.Tensor:
    torch.set_rng_state(torch.Generator().manual_seed(5).get_state())
    return nn.functional.dropout(x, 0.5)


def passes_a_generator(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(8, dtype=x.dtype, generator=torch.Generator().manual_seed(5))


def fills_by_a_generator(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(5))


class Noisy(nn.Module):
    """A Noisy model multiplies by numbers that `draw` draws, between two products."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, 8)."""
        h = self.first(x)
        return self.second(h * self.draw(h)).square().mean()


DRAWS = [seeds, forks, sets_the_state, passes_a_generator, fills_by_a_generator]


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
def test_numbers_are_those_of_the_seed(draw: Draw) -> None:
    torch.manual_seed(0)
    model, x = Noisy(draw).double(), torch.randn(4, 8, dtype=torch.float64)
    expected = model(x)
    expected.backward()
    result = autoparallel.simulate(model, 2, example_inputs=x)
    assert result.output.item() == pytest.approx(expected.item(), rel=1e-12)
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(result.gradients[path], parameter.grad)
    assert result.apart == 0
    plan = autoparallel.make_plan(model, 2, example_inputs=x)
    assert "generator" in plan.breaks[0].reason.lower()


def test_a_seed_that_is_left_behind_is_a_break() -> None:
    """The generator is the process's: where other threads live, one of them may have seeded it."""

    def only_seeds(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return x

    model = Noisy(only_seeds)
    state = torch.get_rng_state()
    ended = threading.Event()
    threading.Thread(target=ended.wait).start()
    try:
        plan = autoparallel.make_plan(model, 2, example_inputs=torch.ones(4, 8))
    finally:
        ended.set()
    assert "seeds torch's random generator" in plan.breaks[0].reason
    assert "another thread seeds it" in plan.breaks[0].reason
    assert torch.equal(torch.get_rng_state(), state)


def test_planning_leaves_the_models_own_generator() -> None:
    generator = torch.Generator().manual_seed(5)
    model = Noisy(lambda x: torch.randn(8, generator=generator))
    model.generator = generator
    autoparallel.make_plan(model, 2, example_inputs=torch.ones(4, 8))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
