"""What a person sees of a plan: the report names what is there, the picture draws it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from broad_cases import broad
from rich.console import Console
from torch import nn

import autoparallel
from autoparallel.analysis.communication import collective_totals
from autoparallel.analysis.memory import memory_of
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.placement import Collective, Movement
from autoparallel.plan import Plan
from autoparallel.support.units import bytes_text
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.dot import to_dot, write_svg
from autoparallel.view.folded_rows import fold, index_text
from autoparallel.view.report import plan_text, print_plan

LAYERS = 3


def gpt(layers: int = LAYERS) -> GPT:
    return GPT(GPTConfig(layers, hidden=64, heads=8, vocabulary=211, positions=64, dropout=0.0))


def planned(sequence_parallel: bool, world_size: int = 2, layers: int = LAYERS) -> Plan:
    plan = autoparallel.make_plan(gpt(layers), world_size, sequence_parallel=sequence_parallel)
    return Plan.from_json(plan.to_json())  # what is seen must not need the graph


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "sequence_parallel"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return planned(request.param)


@pytest.fixture(scope="module")
def megatron() -> Plan:
    return planned(sequence_parallel=False)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))


# -- folding


def test_fold_joins_what_differs_in_an_index():
    rows = [(f"a.{i}.b.{j}.w", "x", (i, j)) for i in range(3) for j in range(2)]
    rows += [("a.9.b.0.w", "y", (9, 0)), ("c", "x", (0, 0))]
    folded = fold(rows)
    assert [row.path for row in folded] == ["a.{0..2}.b.{0..1}.w", "a.9.b.0.w", "c"]
    assert [row.count for row in folded] == [6, 1, 1]
    assert folded[0].first == (0, 0)


def test_fold_keeps_apart_what_differs():
    rows = [("a.0.w", "split", 0), ("a.1.w", "whole", 1), ("a.0.v", "split", 2)]
    assert [row.path for row in fold(rows)] == ["a.0.w", "a.1.w", "a.0.v"]


@pytest.mark.parametrize(
    ("indices", "text"), [([3], "3"), ([0, 1, 2], "{0..2}"), ([7, 0, 1, 2, 4], "{0..2,4,7}")]
)
def test_index_text(indices: list[int], text: str):
    assert index_text(indices) == text


# -- the report


def test_report_says_how_parameters_are_split(megatron: Plan):
    rows = {line.split()[0]: line for line in plan_text(megatron).splitlines() if line.split()}
    block = f"blocks.{{0..{LAYERS - 1}}}."
    for path, words in {
        "token_embedding.weight": "rows of the table + column: output dim",
        block + "attention.query_key_value.weight": "column: output dim, in 3 blocks",
        block + "attention.projection.weight": "row: input dim",
        block + "feed_forward.expand.weight": "column: output dim",
        block + "feed_forward.contract.weight": "row: input dim",
        block + "attention_norm.weight": "whole: ",
    }.items():
        assert words in rows[path]
        assert (f"×{LAYERS}" in rows[path]) == path.startswith(block)


def test_report_header(megatron: Plan):
    text = plan_text(megatron)
    for words in ("GPT", "Mesh(tp=2), 2 ranks", megatron.hardware, megatron.method, "gap 0.00%"):
        assert words in text
    assert f"{megatron.split_flops:.1%} of the FLOPs" in text
    assert f"{megatron.split_parameter_bytes:.1%} of the bytes" in text


def test_report_tells_the_memory(megatron: Plan):
    """Of a plan without a limit too, as it is counted by a walk through the emitted program."""
    traced = autoparallel.make_plan(gpt(), 2)
    (row,) = (line for line in plan_text(traced).splitlines() if line.split()[:1] == ["all"])
    assert bytes_text(memory_of(traced).total) in row
    uncounted = plan_text(replace(megatron, memory=()))
    assert "Memory: the plan does not say what it takes" in uncounted
    assert "optimizer state" not in uncounted


class Branching(nn.Module):
    """A model in parts: its path depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = perceptron(), perceptron()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if float(hidden.detach().sum()) > 0:
            hidden = hidden * 2
        out: torch.Tensor = self.second(hidden)
        return out.sum()


def plain_plan() -> Plan:
    return autoparallel.make_plan(gpt(), 2)


def mesh_plan() -> Plan:
    return autoparallel.make_plan(gpt(), mesh=Mesh(dp=2, tp=2))


def limited_plan() -> Plan:
    needed = sum(nbytes for _, nbytes in mesh_plan().memory)
    plan = autoparallel.make_plan(gpt(), mesh=Mesh(dp=2, tp=2), memory_limit=needed * 4 // 5)
    assert plan.recompute or sum(nbytes for _, nbytes in plan.memory) < needed
    return plan


def plan_in_parts() -> Plan:
    torch.manual_seed(0)
    plan = autoparallel.make_plan(Branching(), 2, example_inputs=torch.randn(8, 32))
    assert plan.breaks
    return plan


@pytest.mark.parametrize(
    "make", [*broad(plain_plan), mesh_plan, *broad(limited_plan, plan_in_parts)]
)
def test_a_plan_that_was_read_prints_what_the_plan_printed(make: Callable[[], Plan]):
    """Nothing is computed while printing that needs the graph."""
    plan = make()
    text = plan_text(plan)
    assert "Memory of the rank that needs most" in text
    assert text == plan_text(Plan.from_json(plan.to_json()))


def test_report_explains_the_weight(megatron: Plan):
    assert "product weight" not in plan_text(replace(megatron, product_weight=1.0))
    assert "64: the model is so small" in plan_text(replace(megatron, product_weight=64.0))


def each_collective(plan: Plan) -> Counter[str]:
    """How often each is named, where those made together are named one by one."""
    found: Counter[str] = Counter()
    for conversion in plan.conversions:
        for _, *moves in conversion.moves:
            for move in moves:
                if move.collective is not None:
                    found[move.collective.value.replace("_", "-")] += 1
    return found


def test_report_totals_are_a_recount(plan: Plan):
    counts: Counter[tuple[str, str, Collective]] = Counter()
    sizes: Counter[tuple[str, str, Collective]] = Counter()
    sums = {"forward": False, "backward": False}  # whether one of those summed together was met
    for conversion in plan.conversions:
        for _, *moves in conversion.moves:
            for direction, move in zip(sums, moves, strict=True):
                collective = move.collective
                if collective is not None:
                    together = conversion.together and moves[0] is Movement.NONE
                    if not together or not sums[direction]:
                        counts[direction, "tp", collective] += 1
                    sums[direction] |= together
                    sizes[direction, "tp", collective] += conversion.nbytes
    assert counts
    assert collective_totals(plan) == {key: (counts[key], sizes[key]) for key in counts}
    # The rows, with their counts, add up to the same.
    told: Counter[str] = Counter()
    part = plan_text(plan).split("Communications")[1].split("Collectives in one step")[0]
    for line in part.splitlines():
        times = re.search(r"×(\d+)", line)
        for kind in re.findall(r"all-reduce|all-gather|reduce-scatter|all-to-all", line):
            told[kind] += int(times.group(1)) if times else 1
    assert told == each_collective(plan)


def test_megatron_all_reduces(megatron: Plan):
    """Two forward and two backward in a block; the embedding's and the head's besides."""
    totals = {key: count for key, (count, _) in collective_totals(megatron).items()}
    assert totals == {
        ("forward", "tp", Collective.ALL_REDUCE): 2 * LAYERS + 1,
        ("backward", "tp", Collective.ALL_REDUCE): 2 * LAYERS + 1,
    }


def test_no_colour_off_a_terminal(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    print_plan(plan)
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out
    assert printed.err == ""
    file = io.StringIO()
    monkeypatch.setenv("COLUMNS", "40")  # the terminal's width is not the file's
    print_plan(plan, file=file)
    assert file.getvalue() == printed.out
    assert [line.rstrip() for line in printed.out.splitlines()] == plan_text(plan).splitlines()


def test_colour_on_a_terminal(megatron: Plan):
    file = io.StringIO()
    print_plan(megatron, console=Console(file=file, force_terminal=True, width=200))
    assert "\x1b" in file.getvalue()


# -- the picture


def svg(plan: Plan, path: Path, **options: Any) -> str:
    """The words in the picture, one a line; it is well-formed and fetches nothing."""
    write_svg(plan, path, **options)
    root = ElementTree.fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    links = {value for item in root.iter() for name, value in item.items() if "href" in name}
    assert not any(link.startswith(("http", "file", "//")) for link in links)
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    return "\n".join("".join(text.itertext()).strip("\xa0 ") for text in texts)


def test_picture_is_xml_with_legend(plan: Plan, tmp_path: Path):
    text = svg(plan, tmp_path / "plan.svg")
    for words in ("whole (I)", "S(d)", "sum pending (P)", "communicates in forward"):
        assert words in text
    for words in ("column-parallel", "row-parallel", "rows of the table", f"×{LAYERS}"):
        assert words in text


def test_picture_is_the_same_for_the_same_plan(plan: Plan, tmp_path: Path):
    svg(plan, tmp_path / "one.svg")
    svg(Plan.from_json(plan.to_json()), tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_picture_is_the_same_in_another_process(megatron: Plan, tmp_path: Path):
    (tmp_path / "plan.json").write_text(megatron.to_json())
    code = (
        "import sys; from pathlib import Path; from autoparallel.plan import Plan\n"
        "from autoparallel.view.dot import write_svg\n"
        "write_svg(Plan.from_json(Path(sys.argv[1]).read_text()), sys.argv[2])\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PATH": "", "PYTHONHASHSEED": "1"}  # no dot to be found
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "plan.json", tmp_path / "there.svg"],
        env={**environment, "PYTHONPATH": str(Path(autoparallel.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    svg(megatron, tmp_path / "here.svg")
    assert (tmp_path / "there.svg").read_bytes() == (tmp_path / "here.svg").read_bytes()


def test_picture_draws_a_run_of_layers_once(tmp_path: Path):
    few, many = planned(False, layers=2), planned(False, layers=4)
    folded = [to_dot(plan).count("all-reduce") for plan in (few, many)]
    every = [to_dot(plan, layers="all").count("all-reduce") for plan in (few, many)]
    assert folded == [6, 6]  # four in the block, the embedding's, the head's
    assert every == [10, 18]
    lines = svg(many, tmp_path / "all.svg", layers="all").splitlines()
    assert [line for line in lines if line.startswith("blocks.")] == [
        f"blocks.{index}" for index in range(4)
    ]
    lines = svg(many, tmp_path / "fold.svg").splitlines()
    assert "×4" in lines
    assert [line for line in lines if line.startswith("blocks.")] == ["blocks.{0..3}"]


def test_picture_shows_every_collective_once(plan: Plan):
    source = to_dot(plan, layers="all")
    drawn = Counter(re.findall(r"all-reduce|all-gather|reduce-scatter|all-to-all", source))
    assert drawn == each_collective(plan)


def test_picture_of_one_module(megatron: Plan, tmp_path: Path):
    text = svg(megatron, tmp_path / "block.svg", within="blocks.1")
    assert "from blocks.0" in text
    assert "to blocks.2" in text
    assert "all-reduce" in text
    assert "final_norm" not in text
    assert "query_key_value" in text


def test_picture_refuses_what_is_not_there(megatron: Plan):
    with pytest.raises(PlanError, match="layers"):
        to_dot(megatron, layers="some")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"blocks\.77"):
        to_dot(megatron, within="blocks.77")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_perceptron(world_size: int, tmp_path: Path):
    example = torch.zeros(8, 32)
    made = autoparallel.make_plan(perceptron(), world_size, example_inputs=example)
    plan = Plan.from_json(made.to_json())
    text, picture = plan_text(plan), svg(plan, tmp_path / "plan.svg")
    if world_size == 1:
        assert "there is one rank" in text
        assert "Mesh(tp=1), 1 rank\n" in text
        assert "all-reduce" not in text + picture
    else:
        assert "row: input dim" in text
        assert "row-parallel" in picture
