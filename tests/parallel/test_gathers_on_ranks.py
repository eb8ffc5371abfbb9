"""Parameters that are gathered ahead, on processes: parts of graphs, and compiled."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from pipeline_models import Language, batch_of
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.cost.hardware import find_hardware
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.planning.gathers_ahead import with_gathers_ahead

pytestmark = pytest.mark.usefixtures("one_trace")
ROWS = torch.linspace(-1, 1, 48, dtype=torch.float64).view(4, 12)


class Deep(nn.Module):
    """A Deep has eight products, and returns a loss for each half of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (rows, 12)."""
        for layer in self.layers[:4]:
            x = torch.tanh(layer(x))
        first = x.square().sum()
        for layer in self.layers[4:]:
            x = torch.tanh(layer(x))
        return first, x.square().sum()


@cache
def planned(dropped: bool) -> Plan:
    """ZeRO-3 on two ranks. dropped: all weights are gathered again."""
    plan = autoparallel.make_plan(
        Deep().double(),
        mesh=Mesh(dp=2),
        example_inputs=ROWS,
        constraints=["fsdp on dp"],
        hardware="cpu",
    )
    rows = (replace(row, again=dropped and "," in row.shape) for row in plan.conversions)
    plan = replace(plan, conversions=tuple(rows))
    return with_gathers_ahead(plan, find_hardware("cpu"))


def plans() -> None:
    planned(False)
    planned(True)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for path, parameter in model.named_parameters():
        grad: Any = parameter.grad
        if grad is not None:
            found[path] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def check(found: nn.Module, wanted: nn.Module) -> None:
    expected = gradients(wanted)
    made = gradients(found)
    assert made.keys() == expected.keys()
    for path, grad in expected.items():
        torch.testing.assert_close(made[path], grad, rtol=1e-12, atol=1e-12)
    for model in (found, wanted):
        model.zero_grad()


def on_two(rank: int) -> None:
    for dropped in (False, True):
        plan = planned(dropped)
        assert sum(bool(row.begins) for row in plan.conversions) >= 8
        assert all(bool(row.distance) == row.again for row in plan.conversions if row.begins)
        model = Deep().double()
        split = autoparallel.apply_plan(copy.deepcopy(model), plan)
        for each in (split, model):
            first, second = each(ROWS)
            (first + 2 * second).backward()
        check(split, model)
        # A part of the graph: what was begun ahead and not taken is ended, and no rank waits.
        for each in (split, model):
            first, second = each(ROWS)
            second.backward(inputs=list(each.layers[6].parameters()), retain_graph=True)
            (first + second).backward()
        check(split, model)
        with torch.no_grad():
            torch.testing.assert_close(split(ROWS), model(ROWS))
        if dropped:
            # A weight that is written to after the forward pass is told of, as by autograd.
            first, second = split(ROWS)
            for each in (split, model):
                with torch.no_grad():
                    each.layers[2].weight.mul_(1.5)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                (first + second).backward()
            split.zero_grad()
            compiled = torch.compile(split, fullgraph=True, backend="aot_eager")
            for each in (compiled, model):
                first, second = each(ROWS)
                (first + 2 * second).backward()
            check(split, model)


def test_parameters_are_gathered_ahead_on_two_ranks() -> None:
    run_processes(on_two, 2, before=plans)


def language() -> nn.Module:
    """A model that drops nothing."""
    torch.manual_seed(8)
    model: nn.Module = Language().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@cache
def planned_for_four() -> Plan:
    """ZeRO-3 beside products that are split."""
    return autoparallel.make_plan(
        language(),
        mesh=Mesh(dp=2, tp=2),
        example_inputs=batch_of("Language", 0),
        constraints=["fsdp on dp", "megatron on tp"],
        hardware="cpu",
    )


def on_four(rank: int) -> None:
    plan = planned_for_four()
    assert any(row.begins for row in plan.conversions)
    model = language()
    split = autoparallel.apply_plan(copy.deepcopy(model), plan)
    for each in (split, model):
        each(**batch_of("Language", 1))["loss"].backward()
    check(split, model)


@pytest.mark.broad
def test_parameters_are_gathered_ahead_where_products_are_split() -> None:
    run_processes(on_four, 4, before=planned_for_four)
