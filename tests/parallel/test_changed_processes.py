"""Changes of a split module after planning are followed on two real processes with DTensors."""

from __future__ import annotations

import copy
import types
from functools import cache
from typing import Any

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from test_replaced import Model, deleted, head, tied, weight
from torch import nn
from torch.distributed.tensor import DTensor

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.plan import Plan


def attribute(model: Any) -> None:
    model.blocks[1].inner.forward = types.MethodType(lambda self, x: x.repeat(1, 2)[:, :12], model)


def whole_forward(model: Any) -> None:
    before = model.forward
    model.forward = lambda x: before(x) * 2


def other_forward(model: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](self.first(x))).abs().sum()

    model.forward = types.MethodType(forward, model)


def hook(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 0.5)


def unfrozen(model: Any) -> None:
    model.first.requires_grad_(True)


def converted(model: Any) -> None:
    model.float()


CHANGES = (tied, attribute, whole_forward, hook, unfrozen, converted)
# tests/parallel/test_replaced.py shows these on all ranks of one process.
OTHERS = (head, weight, deleted, other_forward)


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def frozen() -> Any:
    model = Model()
    model.first.requires_grad_(False)
    return model


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)


@cache
def planned() -> Plan:
    return autoparallel.make_plan(frozen(), 2, example_inputs=X)


def both_ways(rank: int, changes: tuple[Any, ...]) -> list[Any]:
    """The plain and the split module's loss and gradients after each of the changes."""
    rows: list[Any] = []
    for change in changes:
        plain = frozen()
        split = autoparallel.apply_plan(copy.deepcopy(plain), planned())
        split(X)
        results: list[Any] = []
        for module in (plain, split):
            change(module)
            loss = module(X.to(next(module.parameters()).dtype))
            loss.backward()
            named = module.named_parameters()
            results.append(
                [loss.item(), {k: whole(p.grad) for k, p in named if p.grad is not None}]
            )
        rows.append((change.__name__, *results))
    return rows


def refused(rank: int) -> list[str]:
    """The messages for what a split parameter cannot follow."""
    split: Any = autoparallel.autoparallelize(Model(), 2, example_inputs=X)
    cut = next(p for p in split.parameters() if any(one.is_shard() for one in p.placements))
    kept, messages = split.head.weight, []
    cut.data = torch.zeros(cut.shape, dtype=cut.dtype)
    other = autoparallel.apply_plan(Model(), split.plan)
    torch.manual_seed(rank)
    other.head = nn.Linear(8, 3).double()
    for module in (split, other):
        try:
            module(X)
        except AutoParallelError as error:
            messages.append(str(error))
    assert kept is split.head.weight
    return messages


@pytest.mark.parametrize("changes", [CHANGES, *broad((OTHERS,))], ids=["some", "others"])
def test_changes_are_followed_on_two_processes(changes: tuple[Any, ...]) -> None:
    for rows in run_processes(both_ways, 2, changes, before=planned):
        for name, plain, split in rows:
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "converted" else {}
            torch.testing.assert_close(split, plain, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_what_cannot_be_followed_is_refused_in_words() -> None:
    for messages in run_processes(refused, 2):
        assert "was given other memory" in messages[0]
        assert "different parameters into a split model: head.weight, head.bias" in messages[1]


@pytest.mark.parametrize("change", [whole_forward, other_forward])
def test_a_forward_of_the_user_is_followed_until_it_is_taken_away(change: Any) -> None:
    plain = Model()
    split = autoparallel.autoparallelize(copy.deepcopy(plain), 1, example_inputs=X)
    before = split(X)
    for module in (plain, split):
        change(module)
    torch.testing.assert_close(split(X), plain(X), rtol=1e-12, atol=0)
    del split.forward
    torch.testing.assert_close(split(X), before, rtol=0, atol=0)
