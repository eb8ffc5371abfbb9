"""Sizes, inputs and what is returned are told by names that the user has given or knows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel import Mesh, Plan
from autoparallel.analysis.memory import memory_of
from autoparallel.plan import PlannedInput
from autoparallel.support.units import bytes_text
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.closed_forms_text import plan_forms_text
from autoparallel.view.dot import to_dot
from autoparallel.view.report import plan_text
from autoparallel.view.size_names import assumed_text, returned_text, shape_text, size_names


def gpt(**options: Any) -> Plan:
    """64 positions, and inputs of 8 x 64."""
    model = GPT(GPTConfig(2, hidden=64, heads=8, vocabulary=212, positions=64, dropout=0.0))
    tokens = torch.zeros(8, 64, dtype=torch.long)
    inputs = {"input_ids": tokens, "labels": tokens}
    return autoparallel.make_plan(model, example_inputs=inputs, hardware="dgx-a100", **options)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return gpt(mesh=Mesh(dp=2, tp=2))


def given(path: str, dims: str, sizes: tuple[int, ...], whole: bool = False) -> PlannedInput:
    return PlannedInput(f"tensors_{path}", path, tuple(dims.split(", ")), sizes, sizes, whole)


def test_the_first_two_dims_of_tokens_are_batch_and_sequence() -> None:
    """All other sizes are called by the input that they are of."""
    inputs = (
        given("input_ids", "s95, s11", (3, 5), True),
        given("mask", "s95, 1, s11, s12", (3, 1, 5, 7)),
        given("labels", "s1, s2", (3, 5), True),
    )
    names = size_names(inputs)
    assert names == {
        "s95": "batch",
        "s11": "sequence",
        "s12": "mask.3",
        "s1": "labels.0",
        "s2": "labels.1",
    }
    assert shape_text("2*s11*s95, s9511, 64", names) == "2*sequence*batch, s9511, 64"
    assert assumed_text(inputs) == "batch 3, sequence 5, mask.3 7, as in the example inputs"
    images = (given("x", "s0, 3, s1, s2", (2, 3, 8, 9)),)
    assert list(size_names(images).values()) == ["batch", "x.2", "x.3"]


def test_the_batch_is_assumed_and_memory_is_not(plan: Plan) -> None:
    """8192 tokens are 128 sequences of 64; the activations are those of 8 of them."""
    text = plan_text(plan)
    assert "batch 128, sequence 64; the example inputs have batch 8" in text
    assert plan.memory == memory_of(plan).rows
    as_given = gpt(mesh=Mesh(dp=2, tp=2), memory_limit="1GiB")
    assert "batch 8, sequence 64, as in the example inputs" in plan_text(as_given)
    inputs = dict(as_given.memory)["inputs"]
    assert inputs == dict(plan.memory)["inputs"]
    (row,) = (line for line in text.splitlines() if line.split()[:1] == ["inputs"])
    assert bytes_text(inputs) in row


def test_no_symbol_of_the_tracer_is_shown(plan: Plan) -> None:
    """Nor the names that it has for inputs; a plan that was read tells the same."""
    symbols = [dim for item in plan.inputs for dim in item.dims]
    labels = " ".join(re.findall(r"label=(.*)", to_dot(plan)))
    for text in (plan_text(plan), labels, plan_forms_text(plan)):
        for name in (*symbols, *(item.name for item in plan.inputs)):
            assert name not in text
    assert "batch, sequence, 64" in plan_text(gpt(world_size=2))
    assert "input input_ids" in labels
    assert "b = 128 (batch), s = 64 (sequence)" in plan_forms_text(plan)
    assert plan_text(Plan.from_json(plan.to_json())) == plan_text(plan)


def test_older_texts_are_read(plan: Plan) -> None:
    """Version 2 did not always say what goes in and comes out."""
    older = replace(plan, inputs=(), returned=())
    assert not {"inputs", "returned"} & set(json.loads(older.to_json()))
    read = Plan.from_json(older.to_json())
    assert read == older
    assert "inputs of at least 8192 elements" in plan_text(read)


def test_equal_things_are_returned_together(plan: Plan) -> None:
    """By the names that the user has for them, where there are such."""
    assert returned_text(plan, ["whole", "split as S(2)"]).startswith("loss: whole; logits: split")
    cache = tuple(f"past_key_values.{layer}.{half}" for layer in range(2) for half in (0, 1))
    named = replace(plan, returned=("loss", *cache))
    told = returned_text(named, ["whole", *["split as S(1)"] * 4])
    assert told == "loss: whole; past_key_values: 4 tensors split as S(1)"
    unnamed = replace(plan, returned=())
    assert returned_text(unnamed, ["whole", "R", "R"]) == "whole; 2 tensors R"
    assert returned_text(replace(plan, returned=("0", "1")), ["R", "R"]) == "2 tensors R"


class Deep(nn.Module):
    """Modules with long names, many levels down."""

    def __init__(self) -> None:
        super().__init__()
        inner: nn.Module = nn.Linear(8, 8)
        for name in ("a_projection_of_considerable_length", "attention", "decoder_layers") * 3:
            inner = nn.ModuleDict({name: inner})
        self.backbone = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, 8). The one layer's result."""
        inner: Any = self.backbone
        while isinstance(inner, nn.ModuleDict):
            inner = next(iter(inner.values()))
        y: torch.Tensor = inner(x)
        return y


def test_paths_break_at_dots() -> None:
    """No word of them is cut."""
    plan = autoparallel.make_plan(Deep(), mesh=Mesh(dp=2, tp=2), example_inputs=torch.ones(4, 8))
    rows = plan_text(plan).partition("Parameters")[2].partition("Communications")[0].splitlines()
    pieces = [line.split()[0] for line in rows if line[2:3].isalpha() and "." in line]
    assert len(pieces) > 2
    words = {"backbone", "weight", "bias", "decoder_layers", "attention"}
    words.add("a_projection_of_considerable_length")
    for piece in pieces:
        assert set(filter(None, piece.split("."))) <= words, piece


def test_the_placements_are_explained_at_the_end(plan: Plan) -> None:
    """One line each; every word that a placement may have is among them."""
    lines = plan_text(plan).splitlines()[-4:]
    assert [line.split()[0] for line in lines] == ["I", "R", "S(d)", "P"]
    assert "blocks=k" in lines[2]
    assert "unit=u" in lines[2]


def test_rare_words_are_explained_where_they_occur(plan: Plan) -> None:
    """A gradient bucket, and a copy that is made once more in the backward pass."""
    bucket, again = "in one collective with the gradients", "sent once more in the backward pass"
    assert any(conversion.together for conversion in plan.conversions)
    assert bucket in plan_text(plan)
    assert again not in plan_text(plan)
    moved = tuple(replace(c, together=False, again=bool(c.again)) for c in plan.conversions)
    assert bucket not in plan_text(replace(plan, conversions=moved))
