"""The picture of threads: what is drawn for a GPT, and that it is well-formed SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest
import torch

import autoparallel
from autoparallel.analysis.thread_splits import thread_splits
from autoparallel.errors import PlanError
from autoparallel.plan import Plan
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.threads_picture import Lane, Mark, Row, ThreadsPicture, draw_threads
from autoparallel.view.threads_svg import threads_svg, write_threads


@cache
def plan_of_gpt() -> Plan:
    """Three layers on two ranks, without sequence parallelism."""
    config = GPTConfig(layers=3, hidden=48, heads=4, vocabulary=210, positions=32, dropout=0.0)
    tokens = torch.zeros(3, 10, dtype=torch.long)
    return autoparallel.make_plan(
        GPT(config), 2, example_inputs=(tokens, tokens), sequence_parallel=False
    )


@cache
def picture() -> ThreadsPicture:
    plan = plan_of_gpt()
    splits = thread_splits(plan)
    assert plan.captured is not None
    return draw_threads(splits.threads, "GPT", plan.captured.blocks, splits)


def lane(name: str) -> Lane:
    return next(lane for lane in picture().lanes if lane.thread.name == name)


def row(where: str) -> Row:
    return next(row for row in picture().rows if row.where.endswith(where))


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("heads", "split", "by columns where it begins, by rows at its end"),
        ("feed-forward", "split", "by columns where it begins, by rows at its end"),
        ("hidden", "whole", "layer norm needs all of it"),
        ("head size", "whole", "needs all of it"),
        ("batch", "free", "data parallelism"),
        ("sequence", "free", "free forward but for scaled dot product attention"),
    ],
)
def test_the_verdict_on_a_thread(name: str, kind: str, words: str) -> None:
    """As the field knows it."""
    assert lane(name).kind == kind
    assert words in lane(name).verdict


def test_equal_blocks_are_drawn_once() -> None:
    """The first of them, with their number."""
    assert picture().repeats == {"blocks.0": 3}
    assert not any(row.where.startswith(("blocks.1", "blocks.2")) for row in picture().rows)


def test_the_marks_of_columns_then_rows() -> None:
    """The feed-forward thread begins in one product and ends in the next; both are split."""
    number = lane("feed-forward").thread.number
    expand, contract = (row(f"feed_forward.{name}") for name in ("expand", "contract"))
    assert Mark.BORN in expand.meetings[number].marks
    assert expand.meetings[number].backward
    assert Mark.SUM in contract.meetings[number].marks
    assert expand.meetings[number].axes == contract.meetings[number].axes == ("tp",)
    assert any("feed-forward ends in a sum" in text for _, text in contract.synchronizations)


def test_heads_and_their_size_are_merged_before_attention() -> None:
    """The product makes one dim of three threads, and the split takes the outermost away."""
    names = [
        {lane.thread.name for lane in picture().lanes if lane.thread.number in dim}
        for dim in row("query_key_value").merged
    ]
    assert names == [{"fused parts", "heads", "head size"}]


@pytest.mark.parametrize("splits", [True, False])
def test_it_is_well_formed(tmp_path: Path, splits: bool) -> None:
    """Also without the plan's splits, and the same each time."""
    path = tmp_path / "threads.svg"
    write_threads(plan_of_gpt(), path, splits=splits)
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    assert path.read_text() == threads_svg(plan_of_gpt(), splits=splits)
    assert ("all-reduce" in path.read_text()) is splits


def test_one_module_alone() -> None:
    """Its ops only."""
    svg = threads_svg(plan_of_gpt(), within="blocks.1.feed_forward")
    assert "feed-forward" in svg
    assert "query_key_value" not in svg


def test_a_module_that_is_none() -> None:
    """Is told, and no empty picture drawn."""
    with pytest.raises(PlanError, match=r"blocks\.7"):
        threads_svg(plan_of_gpt(), within="blocks.7")


def test_a_plan_that_was_read_has_no_threads(tmp_path: Path) -> None:
    """It is refused before anything is written."""
    read = Plan.from_json(plan_of_gpt().to_json())
    with pytest.raises(PlanError, match="no graph"):
        write_threads(read, tmp_path / "threads.svg")
    assert not list(tmp_path.iterdir())
