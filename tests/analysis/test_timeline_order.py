"""The timeline against the order of calls that is recorded on a program that runs."""

from typing import Any

import pytest
import torch
from broad_cases import broad
from noting_groups import NotedProducts, NotingGroup

import autoparallel
from autoparallel.analysis.timeline import timeline
from autoparallel.analysis.training_step import COMMUNICATION
from autoparallel.mesh import Mesh
from autoparallel.parallel.simulate import take_layout_part
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.train.models import GPT, GPTConfig

BATCH, SEQUENCE = 3, 4


def recorded(model: GPT, plan: Plan, tokens: torch.Tensor, forward: bool) -> list[str]:
    """What the first rank does in one pass: starts and waits, and the two kinds of products."""

    def work(rank: Any) -> list[str]:
        notes: list[str] = []
        noting = NotingGroup(rank.groups[0], notes)
        program = emit(plan.captured.graph, plan, Ranks(rank.names, (noting,), noting))
        weights = dict(model.named_parameters())
        leaves = [
            take_layout_part(weights[path].detach(), plan.storage[path], (2,), rank.coordinates)
            .clone()
            .requires_grad_()
            for path in program.parameters
        ]
        with NotedProducts(notes):
            outputs, _ = program.run(leaves, [], [], [tokens, tokens], torch.device("cpu"))
        if not forward:
            notes.clear()
            with NotedProducts(notes):
                outputs[0].backward()
        return notes

    rows = f"({BATCH * SEQUENCE}, "
    kinds = {True: "product", False: "weight"}
    first, second = (
        [note if note[0] != "(" else kinds[note.startswith(rows)] for note in notes]
        for notes in run_ranks(thread_ranks(Mesh(tp=2)), work)
    )
    assert first == second
    return first


def predicted(plan: Plan, phase: str, overlap: bool) -> list[str]:
    """The same of the timeline: a collective is waited for when the next thing waits for it."""
    made = timeline(plan, hardware="dgx-a100", overlap=overlap)
    products = {op.name for op in plan.ops if op.target == "aten.linear.default"}
    notes, underway = [], ""
    for event in made.events:
        if event.phase != phase:
            continue
        name = event.name.removesuffix(" (weight)")
        if underway and name == event.name:
            notes.append(f"wait {underway}")
            underway = ""
        if event.stream == COMMUNICATION:
            if event.name.endswith("gradients"):
                break
            underway = event.name.split(" ")[0].replace("-", "_")
            notes.append(f"start {underway}")
        elif name in products:
            notes.append("weight" if name != event.name else "product")
    return notes + ([f"wait {underway}"] if underway else [])


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping", "waiting"])
@pytest.mark.parametrize("sequence_parallel", [True, *broad(False)], ids=["sp", "tp"])
def test_the_timeline_has_the_order_of_the_program(sequence_parallel: bool, overlap: bool) -> None:
    model = GPT(GPTConfig(2, hidden=20, heads=2, vocabulary=31, positions=SEQUENCE, dropout=0.0))
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    plan = autoparallel.make_plan(
        model,
        2,
        example_inputs=(tokens, tokens),
        sequence_parallel=sequence_parallel,
        overlap=overlap,
    )
    for phase in ("forward", "backward"):
        found = recorded(model, plan, tokens, phase == "forward")
        # Torch's own product computes both gradients, in an order of its own.
        found = [note for note in found if overlap or note != "weight"]
        expected = predicted(plan, phase, overlap)
        assert found == expected, phase
        assert found.count("start all_reduce") + found.count("start reduce_scatter") > 3
