"""A made folder of questions in RACE's format, and a small BERT with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch

from autoparallel.train.models import Bert, BertConfig
from autoparallel.train.weights import export_weights

__all__ = ["WORDS", "tokenizer", "write_passages", "write_weights"]

MARKS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*MARKS, *"the sky is what colour ? blue red green black no yes".split()]


def tokenizer() -> tokenizers.Tokenizer:
    """A token for each word."""
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[PAD]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(MARKS)
    return made


def write_passages(folder: Path, count: int) -> None:
    """Write questions of which the right answer is yes."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = "blue red green black".split()
    for number in range(count):
        right = number * 7 % 4
        passage = {
            "article": f"the sky is {colours[number * 3 % 4]}",
            "questions": ["what is the sky ?"],
            "options": [["yes" if place == right else "no" for place in range(4)]],
            "answers": ["ABCD"[right]],
        }
        (folder / f"{number:02}.txt").write_text(json.dumps(passage))


def write_weights(folder: Path) -> None:
    """Write the weights of a BERT that reads 16 words, and its tokenizer."""
    torch.manual_seed(5)
    sizes = BertConfig(1, 24, 3, len(WORDS), 16, norm="post", sentence_order=True)
    folder.mkdir()
    export_weights(Bert(sizes), folder)
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
