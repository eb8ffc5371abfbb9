"""A trained model's knowledge, measured by published methods on the user's files.

All ranks call these functions with the same texts. The sums of losses come from the model's own
loss, so that the logits stay split; where a token has to be the likeliest, logits are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn

from autoparallel.support.json_text import read_other_json
from autoparallel.train.config import TrainingError
from autoparallel.train.models import IGNORED_LABEL
from autoparallel.train.outputs import logits_of, loss_of, whole

__all__ = [
    "Score",
    "Scorer",
    "cloze_accuracy",
    "masked_accuracy",
    "mean_loss",
    "read_texts",
    "word_perplexity",
]


@dataclass(frozen=True, slots=True)
class Score:
    """A measured number.

    name: of the measure. value: the number. count: of the things that it is a mean over.

    >>> print(Score("cloze accuracy", 0.25, 4))
    cloze accuracy 0.25 of 4
    """

    name: str
    value: float
    count: int

    def __str__(self) -> str:
        return f"{self.name} {self.value:.6g} of {self.count}"


@dataclass(frozen=True, slots=True)
class Scorer:
    """A causal model that is asked how likely texts are.

    module: split or plain. sequence: positions that it reads at most. shifts: whether the model
    moves the labels by one position itself, as those of transformers do. rows: texts that are read
    at once. device: of the inputs.
    """

    module: nn.Module
    sequence: int
    shifts: bool = False
    rows: int = 8
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def nll(self, tokens: Sequence[int], scored: int) -> float:
        """Return the sum of -log p of the last `scored` tokens of a text, given those before.

        The first token of a text has none before it, and is not scored.
        """
        scored = min(scored, len(tokens) - 1)
        if scored < 1:
            return 0.0
        inputs, labels = self._batch([tokens], [scored])
        was = self.module.training
        self.module.eval()
        loss = float(loss_of(self.module(input_ids=inputs, labels=labels)))
        self.module.train(was)
        return loss * scored

    @torch.no_grad()
    def all_likeliest(self, texts: Sequence[Sequence[int]], scored: Sequence[int]) -> list[bool]:
        """Return for each text whether each of its last `scored` tokens is the likeliest."""
        was = self.module.training
        self.module.eval()
        results = []
        for start in range(0, len(texts), self.rows):
            group = texts[start : start + self.rows]
            if not any(scored[start : start + self.rows]):
                results += [True] * len(group)  # texts of one token leave nothing to read
                continue
            inputs, labels = self._batch(group, scored[start : start + self.rows])
            logits = whole(logits_of(self.module(input_ids=inputs, labels=labels)))
            if self.shifts:
                logits, labels = logits[:, :-1], labels[:, 1:]
            right = (logits.argmax(-1) == labels) | (labels == IGNORED_LABEL)
            results += right.all(-1).tolist()
        self.module.train(was)
        return results

    def _batch(
        self, texts: Sequence[Sequence[int]], scored: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return inputs and labels; short texts are filled behind their end, which nothing sees."""
        extra = 0 if self.shifts else 1
        longest = max(len(text) for text in texts) - extra
        inputs = torch.zeros(len(texts), longest, dtype=torch.int64)
        labels = torch.full((len(texts), longest), IGNORED_LABEL)
        for row, (text, count) in enumerate(zip(texts, scored, strict=True)):
            line = torch.tensor(text)
            end = len(text) - extra
            inputs[row, :end] = line[:end]
            labels[row, end - count : end] = line[len(line) - count :]
        return inputs.to(self.device), labels.to(self.device)


def word_perplexity(
    scorer: Scorer, tokenizer: tokenizers.Tokenizer, text: str, stride: int = 32
) -> Score:
    """Return the perplexity of a text for each of its words, however many tokens it becomes.

    The model reads windows of its whole length that move by `stride`, and of each but the first
    only the last `stride` tokens are scored, so that each has as much before it as can be. The sum
    is divided by the number of words of the original text, which is not tokenized.
    Source: Shoeybi et al. 2019, appendix E (WikiText-103). Raises TrainingError for a text without
    two tokens.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    words = len(text.split())
    if len(tokens) < 2 or not words:
        raise TrainingError("the text has fewer than two tokens", fix="give a longer text")
    window = scorer.sequence if scorer.shifts else scorer.sequence + 1
    if not 0 < stride < window:
        raise TrainingError(
            f"windows move by {stride}, and are {window} tokens long",
            fix="give a stride between 1 and that",
        )
    total = scorer.nll(tokens[:window], window)
    for end in range(window, len(tokens), stride):
        last = min(end + stride, len(tokens))
        total += scorer.nll(tokens[max(0, last - window) : last], last - end)
    return Score("word perplexity", math.exp(total / words), words)


def cloze_accuracy(scorer: Scorer, tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> Score:
    """Return how often the last word of a text is predicted from all before it, in whole.

    texts: as LAMBADA has them, one passage each. All tokens of the word must be the likeliest, each
    given the true ones before it. Passages that are too long lose their beginning.
    Source: Paperno et al. 2016; Shoeybi et al. 2019, appendix E.
    """
    rows, scored = [], []
    for text in texts:
        before, _, word = text.rstrip().rpartition(" ")
        start = tokenizer.encode(before, add_special_tokens=False).ids
        end = tokenizer.encode(f" {word}", add_special_tokens=False).ids
        if not start or not end:
            raise TrainingError(
                f"the passage {text[:60]!r} has no word before its last",
                fix="write one passage of several words in each line",
            )
        row = [*start, *end][-(scorer.sequence if scorer.shifts else scorer.sequence + 1) :]
        rows.append(row)
        scored.append(min(len(end), len(row) - 1))
    if not rows:
        raise TrainingError("there are no passages", fix="write one in each line")
    right = scorer.all_likeliest(rows, scored)
    return Score("cloze accuracy", sum(right) / len(right), len(right))


@torch.no_grad()
def masked_accuracy(module: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Score:
    """Return how often the likeliest token at a hidden place is the original.

    batches: arguments of forward, with labels that are -100 where nothing is hidden.
    Source: Devlin et al. 2018, section 3.1.
    """
    was, right, count = module.training, 0, 0
    module.eval()
    for batch in batches:
        hidden = batch["labels"] != IGNORED_LABEL
        likeliest = whole(logits_of(module(**batch))).argmax(-1)
        right += int((likeliest[hidden] == batch["labels"][hidden]).sum())
        count += int(hidden.sum())
    module.train(was)
    return Score("masked accuracy", right / max(1, count), count)


@torch.no_grad()
def mean_loss(module: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Score:
    """Return the mean of the losses of some batches, in evaluation mode."""
    was = module.training
    module.eval()
    losses = [float(loss_of(module(**batch))) for batch in batches]
    module.train(was)
    return Score("loss", sum(losses) / max(1, len(losses)), len(losses))


def read_texts(file: Path) -> list[str]:
    """Return the passages of a file: the texts of JSON lines ({"text": ...}), or its lines.

    Raises TrainingError where it cannot be read.
    """
    try:
        # Only this ends a line: a passage may hold others that splitlines knows, such as U+2028.
        lines = [line for line in file.read_text().split("\n") if line.strip()]
        if file.suffix != ".jsonl":
            return lines
        return [str(read_other_json(line)["text"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"no passages in {file}",
            why=f"{type(error).__name__}: {error}",
            fix='write one in each line, or {"text": "..."} in each line of a .jsonl file',
        ) from error
