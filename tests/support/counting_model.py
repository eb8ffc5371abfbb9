"""A model of letters that knows which one comes next, and the tokenizer of its words."""

from __future__ import annotations

import math

import tokenizers
import torch
from torch import Tensor, nn

from autoparallel.train.models import ModelOutput

WORDS = "a b c d e f g h".split()


def tokenizer() -> tokenizers.Tokenizer:
    """A letter is a token, also in the one word of two, "xy"."""
    model = tokenizers.models.WordLevel({w: n for n, w in enumerate([*WORDS, "x", "y", "?"])}, "?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.WhitespaceSplit(),
        tokenizers.pre_tokenizers.Split("y", "isolated"),
    ])  # fmt: skip
    return made


class Counting(nn.Module):
    """Knows that the next word is the next letter, with a probability that it states.

    Its output is of the same kind as that of the bundled models; every call is counted.
    """

    def __init__(self, probability: float, shifts: bool = False) -> None:
        super().__init__()
        self.shifts, self.read = shifts, 0
        size = len(WORDS) + 3
        other = math.log((1 - probability) / (size - 1))
        self.table = nn.Parameter(torch.full((size, size), other, dtype=torch.float64))
        with torch.no_grad():
            for token in range(size):
                self.table[token, (token + 1) % size] = math.log(probability)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> ModelOutput:
        self.read += input_ids.numel()
        logits = self.table[input_ids]
        if labels is None:
            return ModelOutput(None, logits)
        one, two = (logits[:, :-1], labels[:, 1:]) if self.shifts else (logits, labels)
        loss = nn.functional.cross_entropy(one.flatten(0, 1), two.flatten())
        return ModelOutput(loss, logits)
