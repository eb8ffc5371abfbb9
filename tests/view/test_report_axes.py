"""What a person sees of a plan on several mesh axes: which axis does what, ZeRO, memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import autoparallel
from autoparallel.analysis.communication import collective_totals, transfers
from autoparallel.mesh import Mesh
from autoparallel.placement import Collective, Shard, Step, parse_layout
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.dot import to_dot
from autoparallel.view.report import plan_text
from autoparallel.view.words import Words


@pytest.fixture(scope="module")
def plan() -> Plan:
    """On two axes, read back: what is seen must not need the graph."""
    model = GPT(GPTConfig(2, hidden=64, heads=8, vocabulary=212, positions=64, dropout=0.0))
    made = autoparallel.make_plan(model, mesh=Mesh(dp=2, tp=2), hardware="dgx-a100")
    return Plan.from_json(made.to_json())


def product(plan: Plan, weight: ParameterChoice, target: str, seen: str) -> Plan:
    """y = x w, with the weight read as `target` and `x` as `seen`; the rest of `plan` kept."""
    steps = tuple(
        Step(axis, one, two)
        for axis, (one, two) in enumerate(zip(weight.storage, parse_layout(target), strict=True))
        if one != two
    )
    moved = Conversion(
        value=weight.name,
        source=weight.storage,
        target=parse_layout(target),
        steps=steps,
        readers=("y",),
        shape="64, 32",
        nbytes=8192,
        requires_grad=True,
        together=True,
    )
    op = OpChoice(
        name="y",
        target="aten.linear.default",
        where="layer",
        line="",
        reads=("x", weight.name),
        makes=("y",),
        operands=(parse_layout(seen), parse_layout(target)),
        results=(parse_layout(seen.replace("R", "S(1)")),),
        kernels=("", ""),
        flops=1.0,
        whole_flops=4.0,
    )
    return replace(
        plan, parameters=(weight,), ops=(op,), conversions=(moved,), outputs=(), returned=()
    )


def stored(storage: str, gradient: str, state: str) -> ParameterChoice:
    layouts = (parse_layout(text) for text in (storage, gradient, state))
    return ParameterChoice("w", "layer.weight", (64, 32), 8192, *layouts)


@pytest.mark.parametrize(
    ("layouts", "words", "sent"),
    [
        (
            ("I | S(0)", "I | S(0)", "S(1) | S(0)"),
            "whole, its optimizer state in parts (ZeRO-1) on dp; column: output dim on tp",
            ["reduce-scatter 4.0 KiB together on dp", "all-gather 4.0 KiB after the update on dp"],
        ),
        (
            ("I | S(0)", "S(1) | S(0)", "S(1) | S(0)"),
            "whole, its gradient and optimizer state in parts (ZeRO-2) on dp; column: output dim",
            ["reduce-scatter 4.0 KiB on dp\n", "all-gather 4.0 KiB after the update on dp"],
        ),
        (
            ("S(1) | S(0)", "S(1) | S(0)", "S(1) | S(0)"),
            "stored in parts, gathered for use (ZeRO-3) on dp; column: output dim on tp",
            ["all-gather 4.0 KiB on dp", "reduce-scatter 4.0 KiB on dp"],
        ),
        (
            ("I | S(0)", "I | S(0)", "I | S(0)"),
            "column: output dim on tp",
            ["all-reduce 4.0 KiB together on dp"],
        ),
    ],
    ids=["zero 1", "zero 2", "zero 3", "data parallel"],
)
def test_stages_of_zero_are_told_from_layouts(
    plan: Plan, layouts: tuple[str, str, str], words: str, sent: list[str]
) -> None:
    """Data parallel outside (the input split, the weight read as R), column-parallel inside."""
    one = product(plan, stored(*layouts), "R | S(0)", "S(0) | R")
    told = Words(one).split(one.parameters[0])
    assert told.startswith(words)
    text = plan_text(one)
    folded = " ".join(text.split())
    for words in sent:
        assert " ".join(words.split()) in folded
    assert "column-parallel on tp" in to_dot(one)


def test_totals_are_by_axis(plan: Plan) -> None:
    """Counted again, axis by axis; bytes are of the tensor as the axis finds it."""
    counts: dict[tuple[str, str, Collective], float] = {}
    for transfer in transfers(plan):
        key = (transfer.phase, plan.mesh.axes[transfer.step.axis][0], transfer.collective)
        counts[key] = counts.get(key, 0.0) + transfer.nbytes
        other = transfer.layout[1 - transfer.step.axis]
        shares = 2 if isinstance(other, Shard) else 1
        assert transfer.nbytes * shares == transfer.conversion.nbytes
    assert {key: nbytes for key, (_, nbytes) in collective_totals(plan).items()} == counts
    text = plan_text(plan)
    assert {axis for _, axis, _ in counts} == {"dp", "tp"}
    rows = text.split("Collectives in one step")[1].split("Left whole")[0].splitlines()
    for phase, axis, collective in counts:
        name = collective.value.replace("_", "-")
        assert any(row.split()[:3] == [phase, axis, name] for row in rows)


def test_picture_names_axes(plan: Plan) -> None:
    source = to_dot(plan)
    assert " on dp" in source
    assert " on tp" in source
    assert "S(0) on dp and tp" in Words(plan).layout(parse_layout("S(0) | S(0)"))
    assert Words(plan).layout(parse_layout("I | S(1)")) == "S(1) on tp"
    assert "Mesh(dp=2, tp=2), 4 ranks" in source.replace("&#160;", " ").replace("</b>", "")


def test_memory_and_what_is_run_again_are_told(plan: Plan) -> None:
    seen = replace(
        plan,
        options=replace(plan.options, memory_limit=4096, recompute="auto"),
        memory=(("parameters", 1024), ("optimizer_state", 1024), ("buffers", 0)),
        recompute=(("blocks.0", "full"), ("blocks.1", "full"), ("head", "none")),
    )
    text = plan_text(seen)
    assert "in the backward pass: blocks.{0..1} (full)" in text
    table = text.split("Memory of the rank that needs most")[1]
    told = " ".join(table.split())
    assert "parameters 1.0 KiB 50.0% optimizer state 1.0 KiB 50.0% all 2.0 KiB" in told
    assert "limit 4.0 KiB 50.0% of it used" in told
    assert "buffers" not in table
    assert "Memory of the rank" not in plan_text(replace(plan, memory=()))


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("full", "nothing: no block is repeated\n"),
        ("selective", "nothing: no block is repeated and has products of activations\n"),
    ],
)
def test_nothing_to_run_again_is_told(plan: Plan, mode: str, words: str) -> None:
    """Whoever asks for recomputation learns that there was nothing to recompute."""
    assert "recomputed" not in plan_text(replace(plan, recompute=()))
    seen = replace(plan, options=replace(plan.options, recompute=mode), recompute=())
    line = next(line for line in plan_text(seen).split("\n") if line.startswith("recomputed"))
    assert line.split(maxsplit=1)[1] == words.strip()


@pytest.mark.parametrize(("rows", "idle"), [(3, 5), (8, 0), (9, 0), (5, 3)])
def test_ranks_that_hold_nothing_are_told(rows: int, idle: int) -> None:
    """Three rows on eight ranks leave five without one: the costs are those of the busiest."""
    made = autoparallel.make_plan(
        torch.nn.Linear(8, 8), mesh=Mesh(dp=8), example_inputs=torch.ones(rows, 8)
    )
    (given,) = made.inputs
    assert not given.dims[0].isdigit()
    whole, split = parse_layout("I"), parse_layout("S(0)")
    step, shape = Step(0, whole[0], split[0]), f"{given.dims[0]}, 8"
    taken = Conversion(given.name, whole, split, (step,), ("linear",), shape, 64 * rows, False)
    read = Plan.from_json(replace(made, conversions=(taken,)).to_json())
    lines = [line for line in plan_text(read).splitlines() if line.startswith("idle")]
    assert len(lines) == (1 if idle else 0)
    told = f"{idle} of 8 ranks hold nothing of input, whose dim 0 has {rows} elements"
    assert all(told in line for line in lines)


@pytest.mark.parametrize("stages", [2, 6])
def test_more_stages_than_there_is_work_for_are_told(stages: int) -> None:
    """Layers of which one takes longest are no work for six stages: all wait for that one."""
    sizes = (2048, 2048, 8, 8, 8, 8, 8)
    layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    plan = autoparallel.make_plan(
        torch.nn.Sequential(*layers),
        mesh=Mesh(pp=stages),
        example_inputs=torch.ones(4096, 2048),
        microbatches=8,
        hardware="dgx-a100",
    )
    for text in (str(plan), plan_text(plan)):
        assert ("pp=3 would be about as fast" in " ".join(text.split())) == (stages > 2)
