"""Parameters are gathered ahead of their use: right, in time, within bounds, told, and checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from broad_cases import broad
from changed_plans import blocks_again, copies_again
from noting_groups import noted_pass
from torch import nn

import autoparallel
from autoparallel import Mesh
from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.step_simulation import StepSimulation
from autoparallel.analysis.timeline import step_and_waits
from autoparallel.analysis.training_step import COMMUNICATION
from autoparallel.cost.hardware import Hardware, find_hardware
from autoparallel.errors import PlanError
from autoparallel.plan import Plan
from autoparallel.planning.gathers_ahead import with_gathers_ahead, without_gathers_ahead
from autoparallel.planning.plan_check import require_sound

pytestmark = pytest.mark.usefixtures("one_trace")
WIDTH, ROWS = 24, 12


class Layers(nn.Module):
    """Three equal layers of three products each, without biases, and a loss. The first one's input
    has a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        products = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(6))
        self.gates = nn.ModuleList(products)
        self.shift = nn.Parameter(torch.ones(WIDTH))
        self.downs = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (rows, width)."""
        x = x + self.shift
        for at, down in enumerate(self.downs):
            gated = torch.sigmoid(self.gates[2 * at](x)) * self.gates[2 * at + 1](x)
            x = x + down(gated)
        return x.square().sum()


def planned(mesh: Mesh, *demands: str, **options: Any) -> tuple[Layers, torch.Tensor, Plan]:
    torch.manual_seed(0)
    model, x = Layers().double(), torch.randn(ROWS, WIDTH, dtype=torch.float64)
    plan = autoparallel.make_plan(
        model,
        mesh=mesh,
        example_inputs=x,
        constraints=["fsdp on dp", *demands],
        hardware="cpu",
        **options,
    )
    return model, x, plan


def linked(bytes_per_second: float) -> Hardware:
    """A processor on a link of this rate."""
    cpu = find_hardware("cpu")
    regimes = tuple(replace(each, bytes_per_second=bytes_per_second) for each in cpu.inside.regimes)
    return replace(cpu, inside=replace(cpu.inside, regimes=regimes))


# A gather takes longer than a product.
SLOW = linked(1e6)


def ahead(plan: Plan) -> Plan:
    """The plan with its gathers where the planner would have them begin on a slow link."""
    return with_gathers_ahead(plan, SLOW)


def dropped(plan: Plan) -> Plan:
    """The plan with the copies of all weights, which products save, dropped and gathered again."""
    rows = (replace(row, again="p_" in row.value and "," in row.shape) for row in plan.conversions)
    return ahead(replace(plan, conversions=tuple(rows)))


WAYS = {
    "kept": ahead,
    "dropped": dropped,
    "blocks": lambda plan: ahead(blocks_again(plan, 5)),
    "both": lambda plan: ahead(blocks_again(copies_again(plan), 7)),
}


@pytest.mark.parametrize("way", ["kept", "dropped", *broad("blocks"), "both"])
@pytest.mark.parametrize(
    ("mesh", "demands"),
    [(Mesh(dp=3), ()), *broad((Mesh(dp=2, tp=2), ("megatron on tp",)))],
    ids=str,
)
def test_loss_and_gradients_are_the_models(mesh: Mesh, demands: tuple[str, ...], way: str) -> None:
    """In float64, and no more or fewer collectives run than without."""
    model, x, plan = planned(mesh, *demands)
    plan = WAYS[way](plan)
    assert sum(bool(row.begins) for row in plan.conversions) >= 6
    made = autoparallel.simulate(model, plan=plan, example_inputs=x)
    loss = model(x)
    loss.backward()
    assert torch.allclose(made.output, loss, rtol=1e-13)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(made.gradients[name], parameter.grad, rtol=1e-12, atol=1e-12), name
    waiting = autoparallel.simulate(model, plan=without_gathers_ahead(plan), example_inputs=x)
    assert made.collectives == waiting.collectives


def recorded(model: Layers, plan: Plan, x: torch.Tensor, forward: bool) -> list[str]:
    """Return the starts, waits and products of the first rank in one pass."""
    first, second = noted_pass(model, plan, [x], forward)
    assert first == second
    return ["product" if note[0] == "(" else note for note in first]


def predicted(plan: Plan, phase: str) -> list[str]:
    """The same of the simulated step, its waits among them."""
    notes: list[str] = []
    simulation = StepSimulation(plan, SLOW, None)
    streams, ends = simulation.streams, dict[float, str]()
    issue, wait = streams.issue, streams.wait
    products = {op.name for op in plan.ops if op.whole_flops}

    def noted_issue(stream: str, name: str, its: str, seconds: float, ready: float) -> float:
        end = issue(stream, name, its, seconds, ready)
        if its == phase and stream == COMMUNICATION:
            ends[end] = name.split(" ")[0].replace("-", "_")
            notes.append(f"start {ends[end]}")
        elif its == phase and name in products:
            notes.extend(["product"] * (2 if phase == "backward" else 1))
        return end

    def noted_wait(until: float, what: str = "") -> None:
        if until in ends:
            notes.append(f"wait {ends.pop(until)}")
        wait(until, what)

    streams.issue, streams.wait = noted_issue, noted_wait  # type: ignore[method-assign]
    simulation.simulate()
    return notes


@pytest.mark.parametrize("way", ["kept", "dropped"])
def test_the_timeline_has_the_order_of_the_program(way: str) -> None:
    """Gathers, their ends, and what reduces gradients, in both passes."""
    model, x, plan = planned(Mesh(dp=2))
    plan = WAYS[way](plan)
    for phase in ("forward", "backward"):
        found = recorded(model, plan, x, phase == "forward")
        expected = predicted(plan, phase)
        assert found == expected, phase
        # Most begin before something that does not wait for them: they end in their order.
        begun, ended = (
            [at for at, note in enumerate(found) if note.startswith(what)]
            for what in ("start", "wait")
        )
        assert sum(one + 1 < other for one, other in zip(begun, ended, strict=True)) >= 6


def test_a_step_is_shorter_and_memory_is_counted() -> None:
    _, _, plan = planned(Mesh(dp=2))
    for way in (plan, ahead(plan), dropped(plan)):
        waiting = without_gathers_ahead(way)
        step, longer = (step_and_waits(each, SLOW)[0] for each in (way, waiting))
        assert step < longer
        assert memory_of(way).temporary >= memory_of(waiting).temporary


def test_slow_links_do_not_gather_all_at_once() -> None:
    """Where gathers take longer than all that could hide them, two are in flight, and no more."""
    _, _, plan = planned(Mesh(dp=2))
    made = with_gathers_ahead(plan, linked(1e3))
    place = {op.name: at for at, op in enumerate(made.ops)}
    rows = [(place[row.begins], place[row.readers[0]]) for row in made.conversions if row.begins]
    assert len(rows) == 10
    for at in range(len(plan.ops)):
        assert sum(begin <= at <= read for begin, read in rows) <= 3


def test_a_plan_says_where_gathers_begin() -> None:
    """In its text; one that cannot be is refused by name."""
    model, _, plan = planned(Mesh(dp=2))
    again = Plan.from_json(plan.to_json())
    assert again.conversions == plan.conversions
    assert any(row.begins for row in plan.conversions)
    at = next(at for at, row in enumerate(plan.conversions) if row.begins)
    for change, why in (
        ({"begins": plan.ops[-1].name}, "does not come before what reads it"),
        ({"begins": "nowhere"}, "does not come before what reads it"),
        ({"distance": 2}, "only a dropped copy"),
    ):
        rows = list(plan.conversions)
        rows[at] = replace(rows[at], **change)
        with pytest.raises(PlanError, match=why):
            require_sound(replace(plan, conversions=tuple(rows)), model)


def test_waiting_plans_begin_nothing_ahead() -> None:
    _, _, plan = planned(Mesh(dp=2), overlap=False)
    assert not any(row.begins for row in plan.conversions)
