"""Random numbers of Python and numpy in a forward: those of its own seed are in the program."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import relative_error, worst_gradient
from torch import nn

import autoparallel

WIDTH = 8


class Attending(nn.Module):
    """Three equal layers that pick features by chance, as sparse attention picks its keys."""

    def __init__(self, pick: Callable[[int], list[int]]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)
        )
        self.pick = pick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x + layer(x[:, torch.tensor(self.pick(number))])
        return x.square().mean()


def by_numpy(number: int) -> list[int]:
    np.random.seed(number)
    return [int(index) for index in np.random.permutation(WIDTH)]


def by_python(number: int) -> list[int]:
    random.seed(f"layer {number}")
    return random.sample(range(WIDTH), WIDTH)


def seeded_once(number: int) -> list[int]:
    """Equal layers have other numbers: one of them does not tell those of all."""
    if number == 0:
        random.seed(3)
    return random.sample(range(WIDTH), WIDTH)


def put_back(number: int) -> list[int]:
    """The user's generator is left as it was."""
    state = random.getstate()
    picked = by_python(number)
    random.setstate(state)
    return picked


def states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()[1].tolist()


def dropped(draw: Callable[[], float], probability: float) -> list[int]:
    """Leave features as they are with a probability, as LayerDrop leaves out layers."""
    return list(range(WIDTH)) if draw() < probability else list(range(WIDTH))[::-1]


def never(number: int) -> list[int]:
    return dropped(lambda: random.uniform(0, 1), 0.0)


def always(number: int) -> list[int]:
    return dropped(np.random.random, 1.0)


@pytest.mark.parametrize("pick", [by_numpy, by_python, seeded_once, put_back, never, always])
def test_numbers_of_a_seed_of_its_own_are_split(pick: Callable[[int], list[int]]) -> None:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model = Attending(pick).double()
    for world_size in (2, 3):
        plan = autoparallel.make_plan(model, world_size, example_inputs=(x,))
        assert not plan.breaks
        made = autoparallel.simulate(model, example_inputs=(x,), plan=plan)
        model.zero_grad()
        loss = model(x)
        loss.backward()
        assert relative_error(made.output.detach(), loss.detach()) < 1e-13
        gradients = {path: parameter.grad for path, parameter in model.named_parameters()}
        assert worst_gradient(dict(made.gradients), gradients)[0] < 1e-12


@pytest.mark.parametrize("pick", [by_numpy, by_python, put_back, never, always])
def test_the_user_draws_on_from_where_the_forward_leaves_off(
    pick: Callable[[int], list[int]],
) -> None:
    """In the call that is planned and in those after it, from wherever the generators are."""
    x, model = torch.randn(4, WIDTH), Attending(pick)
    split = autoparallel.autoparallelize(Attending(pick), 1)
    for _ in range(3):
        random.seed(11)
        np.random.seed(11)
        model(x)
        expected = states()
        random.seed(11)
        np.random.seed(11)
        split(x)
        assert states() == expected
    assert not split.plan.breaks


def by_chance(number: int) -> list[int]:
    return random.sample(range(WIDTH), WIDTH)


def by_the_clock(number: int) -> list[int]:
    random.seed()
    return random.sample(range(WIDTH), WIDTH)


def now() -> int:
    return int(time.time())


def by_a_second(number: int) -> list[int]:
    random.seed(now() + number)
    return random.sample(range(WIDTH), WIDTH)


def by_noise(number: int) -> list[int]:
    np.random.seed(os.urandom(1)[0] + number)
    return [int(index) for index in np.random.permutation(WIDTH)]


def before_the_seed(number: int) -> list[int]:
    picked = random.sample(range(WIDTH), WIDTH)
    random.seed(7)
    return picked


def put_back_unseeded(number: int) -> list[int]:
    state = random.getstate()
    picked = random.sample(range(WIDTH), WIDTH)
    random.setstate(state)
    return picked


def sometimes(number: int) -> list[int]:
    return dropped(random.random, 0.5)


def scaled(number: int) -> list[int]:
    return [int(2 * random.random())] * WIDTH


def in_a_tensor(number: int) -> list[int]:
    return [int(torch.ones(1).mul(np.random.uniform()).sum() > 2)] * WIDTH


@pytest.mark.parametrize(
    "pick",
    [
        *(by_chance, by_the_clock, by_a_second, by_noise, before_the_seed, put_back_unseeded),
        *(sometimes, scaled, in_a_tensor),
    ],
)
def test_numbers_that_are_others_in_each_call_stay_python(
    pick: Callable[[int], list[int]],
) -> None:
    plan = autoparallel.make_plan(Attending(pick), 2, example_inputs=(torch.randn(4, WIDTH),))
    assert [item.path for item in plan.breaks] == [""]
    assert "random numbers with Python or numpy" in plan.breaks[0].reason
