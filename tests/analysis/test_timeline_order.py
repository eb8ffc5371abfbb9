"""The timeline against the order of calls that is recorded on a program that runs."""

from dataclasses import replace

import pytest
import torch
from broad_cases import broad
from noting_groups import noted_pass

import autoparallel
from autoparallel.analysis.timeline import timeline
from autoparallel.analysis.training_step import COMMUNICATION
from autoparallel.plan import Plan
from autoparallel.train.models import GPT, GPTConfig

BATCH, SEQUENCE = 3, 4


def recorded(model: GPT, plan: Plan, tokens: torch.Tensor, forward: bool) -> list[str]:
    """Return the starts, waits and products of two kinds of the first rank in one pass."""

    rows = f"({BATCH * SEQUENCE}, "
    kinds = {True: "product", False: "weight"}
    first, second = (
        [note if note[0] != "(" else kinds[note.startswith(rows)] for note in notes]
        for notes in noted_pass(model, plan, [tokens, tokens], forward)
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


@pytest.mark.parametrize(
    ("overlap", "fills_gaps"),
    [(True, True), (True, False), (False, True)],
    ids=["overlapping", "keeping little", "waiting"],
)
@pytest.mark.parametrize("sequence_parallel", [True, *broad(False)], ids=["sp", "tp"])
def test_the_timeline_has_the_order_of_the_program(
    sequence_parallel: bool, overlap: bool, fills_gaps: bool
) -> None:
    model = GPT(GPTConfig(2, hidden=20, heads=2, vocabulary=31, positions=SEQUENCE, dropout=0.0))
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    plan = autoparallel.make_plan(
        model,
        2,
        example_inputs=(tokens, tokens),
        sequence_parallel=sequence_parallel,
        overlap=overlap,
    )
    plan = replace(plan, fills_gaps=fills_gaps)
    for phase in ("forward", "backward"):
        found = recorded(model, plan, tokens, phase == "forward")
        expected = predicted(plan, phase, overlap)
        # Torch's own product computes both gradients, in an order of its own.
        if not (overlap and fills_gaps):
            found, expected = ([n for n in notes if n != "weight"] for notes in (found, expected))
        assert found == expected, phase
        assert found.count("start all_reduce") + found.count("start reduce_scatter") > 3
