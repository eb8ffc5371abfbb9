"""Cheap ops between fused products are made again, one by one: right, priced, told, and checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzz_programs import Program
from fuzz_split import Split, Subject
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel import Mesh
from autoparallel.errors import PlanError
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.recompute import dropping, remade
from autoparallel.runtime.tensor_parts import take_layout_part

pytestmark = pytest.mark.usefixtures("one_trace")
HIDDEN, HEADS = 24, 6


class Block(nn.Module):
    """Fused attention and a gated feed-forward, with a norm of several ops before each."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.ones(HIDDEN)) for _ in range(2))
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out, self.down = nn.Linear(HIDDEN, HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.gate, self.up = (nn.Linear(HIDDEN, 2 * HIDDEN, bias=False) for _ in range(2))
        self.drop = nn.Dropout(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, sequence, hidden)."""
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(norm(x, self.one)).chunk(3, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        z = norm(x, self.two)
        return x + self.drop(self.down(functional.silu(self.gate(z)) * self.up(z)))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A norm as models write it themselves, in ops that each save something."""
    return weight * (x * torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-6))


class Model(nn.Module):
    """Three equal blocks, and a loss."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(rate) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, sequence, hidden)."""
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def planned(mesh: Mesh, rate: float = 0.0, **options: Any) -> tuple[Model, torch.Tensor, Plan]:
    torch.manual_seed(0)
    model, x = Model(rate).double(), torch.randn(6, 12, HIDDEN, dtype=torch.float64)
    return model, x, autoparallel.make_plan(model, mesh=mesh, example_inputs=x, **options)


@pytest.mark.parametrize(
    ("mesh", "demands"),
    [
        (Mesh(tp=1), []),
        (Mesh(dp=2), ["fsdp on dp"]),
        (Mesh(tp=3), ["megatron on tp"]),
        (Mesh(dp=3, tp=2), ["megatron on tp"]),
    ],
    ids=str,
)
def test_loss_and_gradients_are_the_models(mesh: Mesh, demands: list[str]) -> None:
    """In float64, with gathered copies of what is made again among them; and every op is cheap."""
    model, x, plan = planned(mesh, recompute="selective", constraints=demands)
    assert [mode for _, mode in plan.recompute] == ["selective"] * 3
    flops = {op.name: op.whole_flops for op in plan.ops}
    assert len(plan.remade) >= 3 * 5
    assert not any(flops[name] for name in plan.remade)
    made = autoparallel.simulate(model, plan=plan, example_inputs=x)
    loss = model(x)
    loss.backward()
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-12, atol=0)
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(made.gradients[path], parameter.grad, rtol=1e-11, atol=1e-15)
    assert made.apart == 0


def test_inputs_may_lie_otherwise_on_some_rank() -> None:
    """The rank that has made a batch has it turned, and those that it was sent to have it in order.
    All gather the same parameter again, though a product keeps a copy of what is turned."""
    program = Program("""
        i0 = input(4, 6, 8)
        p0 = parameter(8)
        p1 = parameter(6, 8)
        return F.linear(i0 + p0, p1).square().sum()
    """)
    subject, x = Subject(program), program.arguments()[0].detach()
    # What is gathered is added to the whole input on each rank.
    plan = subject.plan(Split(2, 128, data_parallel=True, sequence_parallel=False))
    again = tuple(replace(conversion, again=True) for conversion in plan.conversions)
    plan = replace(plan, conversions=again, remade=("add",))

    def work(ranks: Ranks) -> dict[str, int]:
        emitted = emit(subject.captured.graph, plan, ranks)
        assert "remade(made_1, tensors_0_R, p_p0_R)" in emitted.source
        leaves = []
        for path in emitted.parameters:
            whole = subject.model.get_parameter(path).detach()
            part = take_layout_part(whole, plan.storage[path], ranks.sizes, ranks.coordinates)
            leaves.append(part.clone().requires_grad_())
        given = x.clone() if ranks.rank else x.transpose(1, 2).contiguous().transpose(1, 2)
        outputs, _ = emitted.run(leaves, [], [], [given.requires_grad_()], torch.device("cpu"))
        outputs[0].backward()
        return dict(ranks.counts)

    first, second = run_ranks(thread_ranks(plan.mesh), work)
    assert first["all_gather"] > 1
    assert first == second


def test_a_product_may_be_made_again() -> None:
    """By a plan that was edited: it leaves no gradient to a gap, and takes in no bias."""
    program = Program("""
        i0 = input(4, 6)
        p1 = parameter(5, 6)
        p2 = parameter(5)
        p3 = parameter(6, 5)
        v0 = F.linear(i0.tanh(), p1, p2)
        return F.linear(v0.tanh(), p3).tanh()
    """)
    subject = Subject(program)
    # On one rank each bias could be added in the call of its product.
    for way in (Split(1), *(Split(2, seed, 0.3, True, sparing=True) for seed in range(10))):
        plan = subject.plan(way)
        taken = {name for group in plan.recomputed for name in group}
        names = (op.name for op in plan.ops if "linear" in op.target and op.name not in taken)
        plan = replace(plan, remade=tuple(names))
        for ranks in thread_ranks(plan.mesh):
            source = emit(subject.captured.graph, plan, ranks).source
            assert source.count("= remade(made_") == len(plan.remade)
        subject.compare(plan, tuple(program.arguments()), subject.expected)


def test_random_numbers_are_drawn_once() -> None:
    """Dropout is kept: its loss and gradients are those of the plan that makes nothing again."""
    model, x, plan = planned(Mesh(dp=2), rate=0.3, recompute="selective")
    assert plan.remade
    _, _, plain = planned(Mesh(dp=2), rate=0.3, recompute="none")
    again, kept = (
        autoparallel.simulate(model, plan=one, example_inputs=x) for one in (plan, plain)
    )
    assert torch.equal(again.output, kept.output)
    for path in kept.gradients:
        torch.testing.assert_close(
            again.gradients[path], kept.gradients[path], rtol=1e-12, atol=1e-15
        )


def test_what_is_made_again_is_priced_once() -> None:
    """Each cheap op is forward twice, in the plan's sum and in the timeline alike."""
    _, _, plan = planned(Mesh(dp=2), recompute="selective", overlap=False, hardware="dgx-a100")
    _, _, plain = planned(Mesh(dp=2), recompute="none", overlap=False, hardware="dgx-a100")
    step = autoparallel.timeline(plan)
    longer = step.seconds - autoparallel.timeline(plain).seconds
    assert longer == pytest.approx(plan.seconds - plain.seconds, rel=1e-9)
    assert longer > 0
    again = [event for event in step.events if event.phase == "recompute"]
    assert sorted(event.name for event in again) == sorted(
        op.name for op in plan.ops if op.name in plan.remade and op.forward_seconds
    )


def test_a_plan_says_it_and_is_read_again() -> None:
    """As JSON; an op that cannot be made again by itself is refused as it is applied."""
    model, x, plan = planned(Mesh(tp=1), rate=0.3, recompute="selective")
    assert Plan.from_json(plan.to_json()).remade == plan.remade
    dropout = next(op.name for op in plan.ops if "dropout" in op.target)
    wrong = replace(plan, remade=(*plan.remade, dropout), fingerprint=plan.fingerprint)
    with pytest.raises(PlanError, match="draws random numbers"):
        autoparallel.apply_plan(model, wrong, example_inputs=x)


def test_what_is_made_again_has_second_derivatives() -> None:
    """Saved or made again, a tensor is the same function of the inputs; so it is after a chain."""
    x = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def cubes(y: torch.Tensor) -> torch.Tensor:
        [made] = remade(lambda a: [a * a], y)
        [more] = remade(lambda a, b: [a * b], made, y)
        return (more.sin() * more).sum()

    def second(run: Any) -> torch.Tensor:
        (first,) = torch.autograd.grad(run(x), x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), x)
        return found

    torch.testing.assert_close(
        second(dropping(cubes)), second(lambda y: ((y**3).sin() * y**3).sum()), rtol=1e-12, atol=0
    )


def test_a_backward_pass_inside_of_autocast_makes_the_same() -> None:
    """Casts are in the program: a product in float32 is one again, where autocast would cast it."""
    x, kinds = torch.rand(4, 4, requires_grad=True), []

    def block(a: torch.Tensor) -> list[torch.Tensor]:
        made = torch.mm(a, a)
        kinds.append(made.dtype)
        return [made]

    loss = dropping(lambda: remade(block, x)[0].square().sum())()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert kinds == [torch.float32, torch.float32]


def test_a_source_that_was_written_to_is_told() -> None:
    """As autograd tells it of what it saves."""
    x = torch.rand(4, requires_grad=True)
    kept: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        y = x * 2
        kept.append(y)
        [made] = remade(lambda a: [a + 1], y)
        return made.square().sum()

    loss = dropping(run)()
    with torch.no_grad():
        kept[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_pass_makes_a_chain_in_few_steps() -> None:
    """Where both sources of each result come from the one before, in steps that do not double."""
    x, calls = torch.rand(4, dtype=torch.float64, requires_grad=True), [0]

    def counted(block: Any) -> Any:
        def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
            calls[0] += 1
            return [block(*tensors)]

        return run

    def chain(y: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            [factor] = remade(counted(torch.cos), y)
            [y] = remade(counted(torch.mul), y, factor)
        return y.square().sum()

    loss = dropping(chain)(x)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert calls == [2 * 16]
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    assert calls[0] < 2 * 16 + 16**2
