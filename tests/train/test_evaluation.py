"""Measures on made data whose answers are known, and the same from a split model."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_model import Counting, tokenizer
from processes import run_processes
from torch import nn
from traces import trace_ahead

import autoparallel
from autoparallel.train.config import TrainingError
from autoparallel.train.evaluation import (
    Scorer,
    cloze_accuracy,
    masked_accuracy,
    read_texts,
    word_perplexity,
)
from autoparallel.train.models import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_trace")


@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_word_perplexity(shifts, stride):
    """Every token but the first is scored once; the sum is divided by the words of the text."""
    text = "a b c d e f g h xy a b"  # eleven words in twelve tokens, ten of which follow
    scorer = Scorer(Counting(0.5, shifts), sequence=5, shifts=shifts)
    score = word_perplexity(scorer, tokenizer(), text, stride)
    right, wrong = -math.log(0.5), -math.log(0.5 / 10)
    # h -> x and x -> y are the next ones; y -> a is not, as "?" comes after y.
    assert score.count == 11
    assert score.value == pytest.approx(math.exp((10 * right + wrong) / 11), rel=1e-12)


def test_windows_see_as_much_as_they_can():
    """With windows of 6 that move by 2, each later token is read with at least 4 before it."""
    model = Counting(0.5)
    word_perplexity(Scorer(model, sequence=5), tokenizer(), "a b c d e f g h a b c d", stride=2)
    assert model.read == 5 + 3 * 5
    with pytest.raises(TrainingError, match="windows move by 9"):
        word_perplexity(Scorer(model, sequence=5), tokenizer(), "a b c", stride=9)


@pytest.mark.parametrize("shifts", [False, True])
def test_cloze_accuracy(shifts):
    """All tokens of the last word count: "h xy" is known, "g xy" is not, nor is "a c"."""
    texts = ["a b c", "h xy", "g xy", "a c", "b c d e f g h x"]
    scorer = Scorer(Counting(0.5, shifts), sequence=4, shifts=shifts, rows=2)
    score = cloze_accuracy(scorer, tokenizer(), texts)
    assert (score.value, score.count) == (3 / 5, 5)
    with pytest.raises(TrainingError, match="no word before its last"):
        cloze_accuracy(scorer, tokenizer(), ["alone"])


def test_masked_accuracy():
    batch = {
        "input_ids": torch.tensor([[0, 1, 2, 3]]),
        "labels": torch.tensor([[1, -100, 3, 7]]),
    }
    score = masked_accuracy(Counting(0.5), [batch, batch])
    assert (score.value, score.count) == (4 / 6, 6)


def test_passages_are_read(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n\n{"text": "three"}\n')
    (tmp_path / "b.txt").write_text("one two\nthree\n")
    assert (
        read_texts(tmp_path / "a.jsonl") == read_texts(tmp_path / "b.txt") == ["one two", "three"]
    )
    (tmp_path / "c.jsonl").write_text('{"words": "one"}\n')
    with pytest.raises(TrainingError, match="no passages"):
        read_texts(tmp_path / "c.jsonl")


def scores(model: nn.Module) -> list[float]:
    scorer = Scorer(model, sequence=8, rows=2)
    batch = {"input_ids": torch.tensor([[0, 1, 2, 3]]), "labels": torch.tensor([[1, -100, 3, 7]])}
    return [
        word_perplexity(scorer, tokenizer(), "a b c d e f g h xy a b d", 3).value,
        cloze_accuracy(scorer, tokenizer(), ["a b c", "h xy", "g a xy"]).value,
        masked_accuracy(model, [batch]).value,
    ]


def on_ranks(count: int) -> list[float]:
    inputs = plain().example_inputs(2, 8)
    return scores(autoparallel.autoparallelize(plain(), count, example_inputs=inputs))


def on_rank(_: int) -> list[float]:
    return on_ranks(2)


def plain() -> Any:
    torch.manual_seed(0)
    return GPT(GPTConfig(1, 16, 4, 11, positions=8, dropout=0.0)).double()


def test_a_split_model_has_the_same_scores():
    expected = scores(plain())
    for result in run_processes(on_rank, 2, before=partial(trace_ahead, on_ranks, 1)):
        assert result == pytest.approx(expected, rel=1e-12)
