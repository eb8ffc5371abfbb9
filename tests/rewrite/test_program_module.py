"""A rank's program as a torch.fx.GraphModule gives what the program itself gives, to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from any_plans import any_plans, network_of
from broad_cases import broad
from families import Float64, build, inputs_for
from torch import nn

import autoparallel
from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.pytree import flatten

Results = list[torch.Tensor | None]


def compare(model: nn.Module, plan: Plan, captured: Captured, inputs: dict[str, Any]) -> set[str]:
    """Run both on all ranks; returns the names of the functions that nodes call."""
    tensors = flatten(dict(bind_inputs(model, (), inputs).arguments))[0]
    weights = dict(model.named_parameters(remove_duplicate=False))
    start = dict(model.named_buffers(remove_duplicate=False))

    def backward(outputs: Any, leaves: Any) -> Results:
        total = sum(o.double().square().sum() for o in outputs if o.requires_grad)
        total.backward()
        return [leaf.grad for leaf in leaves]

    def by_program(own: Ranks) -> tuple[Results, Results, Results]:
        program = emit(captured.graph, plan, own, plan.model)
        leaves = [
            take_layout_part(
                weights[path].detach(), plan.storage[path], own.sizes, own.coordinates
            ).clone().requires_grad_(weights[path].requires_grad)
            for path in program.parameters
        ]  # fmt: skip
        buffers = {path: start[path].clone() for path in program.buffers}
        constants = [captured.constants[path] for path in program.constants]
        with rng.using(rng.Generator(3)):
            outputs, written = program.run(
                leaves, list(buffers.values()), constants, tensors, torch.device("cpu")
            )
        gradients = backward(outputs, leaves)
        buffers.update(zip(program.mutations, written, strict=True))
        return outputs, gradients, list(buffers.values())

    called: set[str] = set()

    def by_module(own: Ranks) -> tuple[Results, Results, Results]:
        program = emit(captured.graph, plan, own, plan.model)
        module = autoparallel.to_fx(plan, model, rank=own)
        module.graph.lint()
        for inner in module.modules():
            for node in inner.graph.nodes if isinstance(inner, torch.fx.GraphModule) else ():
                if node.op == "call_function":
                    called.add(node.target.__name__)
        with rng.using(rng.Generator(3)):
            outputs = module(*tensors)
        leaves = [module.get_parameter(path) for path in program.parameters]
        gradients = backward(outputs, leaves)
        return list(outputs), gradients, [module.get_buffer(path) for path in program.buffers]

    expected = run_ranks(thread_ranks(plan.mesh), by_program)
    actual = run_ranks(thread_ranks(plan.mesh), by_module)
    for rank, (own, other) in enumerate(zip(actual, expected, strict=True)):
        for kind, mine, its in zip(("output", "gradient", "buffer"), own, other, strict=True):
            assert len(mine) == len(its)
            for index, (one, two) in enumerate(zip(mine, its, strict=True)):
                same = one is two is None or torch.equal(one, two)
                assert same, f"{kind} {index} of rank {rank}"
    return called


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("name", ["mlp", "gpt", "hf-llama"])
@pytest.mark.parametrize("mesh", [*broad(Mesh(tp=3)), Mesh(dp=2, tp=2)], ids=str)
def test_outputs_gradients_and_buffers_are_the_programs_own(name: str, mesh: Mesh) -> None:
    """On one axis and on two."""
    with Float64():
        model, inputs = build(name), inputs_for(name)
        plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs)
        called = compare(model, plan, plan.captured, inputs)
    assert "convert" in called


def test_recomputed_blocks_dropout_and_written_buffers() -> None:
    """A block is a module of its own that reads sizes from outside; a buffer counts the calls."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = build("gpt", dropout=0.3)
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.gpt(input_ids, labels).loss * (1 + 0 * self.calls)

    torch.manual_seed(0)
    model, inputs = Counting(), inputs_for("gpt")
    plan = autoparallel.make_plan(
        model, mesh=Mesh(dp=2, tp=2), example_inputs=inputs, recompute="full"
    )
    assert plan.recomputed
    called = compare(model, plan, plan.captured, inputs)
    assert {"recomputed", "dropout", "copy_.default"} <= called


def test_ops_that_are_made_again_are_modules_of_their_own() -> None:
    """Each is a function of one op in the program, and saves what the program saves."""
    with Float64():
        model, inputs = build("hf-llama"), inputs_for("hf-llama")
        plan = autoparallel.make_plan(
            model, mesh=Mesh(tp=2), example_inputs=inputs, recompute="selective"
        )
        assert plan.remade
        assert "remade" in compare(model, plan, plan.captured, inputs)


@pytest.mark.parametrize("seeds", [range(4), *broad(range(4, 8))], ids=str)
def test_plans_that_nobody_would_choose(seeds: range) -> None:
    """Random states of the cost network: kernels, copies that are dropped, all conversions."""
    model, inputs = build("gpt"), inputs_for("gpt")
    mesh = Mesh(dp=2, tp=2)
    captured, network = network_of(model, inputs, mesh, recompute="auto", memory_limit=10**12)
    for plan, _ in any_plans(captured, network, seeds):
        compare(model, replace(plan, captured=captured), captured, inputs)


def test_a_program_may_have_many_things_that_nobody_reads() -> None:
    """Such as the gaps of conversions that no other product fills, which all have the name "_"."""
    with Float64():
        model, inputs = build("gpt"), inputs_for("gpt")
        plan = autoparallel.make_plan(
            *(model, 2),
            example_inputs=inputs,
            constraints=["megatron on tp"],
            sequence_parallel=False,
        )
        plan = replace(plan, fills_gaps=False)
        assert autoparallel.export(plan, "python", model).text.count(", _ = ") > 1
        compare(model, plan, plan.captured, inputs)
