"""Rows of a batch, each a function of the seed and the number of the batch, and nothing else.

Every epoch goes through all rows once, in an order that is computed and not stored: any process
finds any row by itself, reads no other, and a run goes on where it was at any number of ranks.
"""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoparallel.train.config import TrainingError
from autoparallel.train.documents import CorpusError
from autoparallel.train.models import IGNORED_LABEL
from autoparallel.train.token_files import TokenFiles

__all__ = ["FunctionRows", "Rows", "TokenRows", "permuted", "user_function"]

_ROUNDS = 6

Batch = dict[str, Tensor]
# Called with the part of the text, the number of the batch, the first row and how many.
Rows = Callable[[str, int, int, int], Batch]


def permuted(index: int, count: int, key: str) -> int:
    """Return where a pseudo-random order of `count` things has its index-th.

    A Feistel network on as many bits as `count` needs; what falls behind the end goes through it
    again. Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking.

    >>> sorted(permuted(index, 7, "a key") for index in range(7))
    [0, 1, 2, 3, 4, 5, 6]
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            text = f"{key}/{number}/{right}".encode()
            word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
            left, right = right, left ^ (word & mask)
        index = left << half | right
        if index < count:
            return index


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of token files.

    tokens: the files. batch: rows of one step. sequence: tokens of a row. objective: "next" for
    labels one position ahead, "same" for labels that the model shifts itself, "masked" for the
    originals of hidden tokens. seed: of all choices. segments: a masked row has two segments that
    may be swapped, and says so. vocabulary: from which a hidden token may be replaced.
    Raises CorpusError for too little text, and for a tokenizer without the tokens that it takes.

    Example: `TokenRows(tokens, 8, 128, "next", seed=0)("train", 0, 0, 8)["input_ids"]`
    """

    tokens: TokenFiles
    batch: int
    sequence: int
    objective: str
    seed: int
    segments: bool = False
    masked_fraction: float = 0.15

    def __post_init__(self) -> None:
        marks = self.tokens.marks
        needed = {"mask": marks.mask, "first": marks.first, "between": marks.between}
        lacking = [name for name, number in needed.items() if number is None]
        if self.objective == "masked" and lacking:
            raise CorpusError(
                f"the tokenizer has no token for {', '.join(lacking)}",
                why="a masked model's rows need [CLS], [SEP] and [MASK], or tokens that do as well",
                fix='data.tokenizer = "wordpiece", or add them as special tokens',
            )
        for part in ("train", "held_out"):
            if self._count(part) < 1:
                raise CorpusError(
                    f"too little text in {self.tokens.source}",
                    why=f"its {part} part has {len(getattr(self.tokens, part))} tokens, and one "
                    f"row needs {self._stride + (self.objective == 'next')}",
                    fix="give more text, or shorter rows: data.sequence",
                )

    @property
    def _stride(self) -> int:
        """The tokens of the text that a row has of its own."""
        if self.objective != "masked":
            return self.sequence
        return self.sequence - (3 if self.segments else 2)

    def _count(self, part: str) -> int:
        length = len(getattr(self.tokens, part)) - (self.objective == "next")
        return max(0, length) // self._stride

    def __call__(self, part: str, number: int, first: int, count: int) -> Batch:
        """Return rows of a batch, by the names that forward has for them.

        part: "train" or "held_out". number: of the batch. first, count: which rows of it.
        """
        rows = [self._row(part, number * self.batch + first + row) for row in range(count)]
        if not rows:  # a rank with none of too few rows; the others say how long they are
            rows, count = [self._row(part, 0)], 0
        return {name: torch.stack([row[name] for row in rows])[:count] for name in rows[0]}

    def _row(self, part: str, number: int) -> Batch:
        """Return the number-th row of the whole run."""
        total = self._count(part)
        epoch, index = divmod(number, total)
        place = permuted(index, total, f"{self.seed}/{part}/{epoch}")
        start = place * self._stride
        length = self._stride + (self.objective == "next")
        text = getattr(self.tokens, part)[start : start + length]
        tokens = torch.from_numpy(text.astype(np.int64))
        if self.objective == "next":
            return {"input_ids": tokens[:-1], "labels": tokens[1:]}
        if self.objective == "same":
            return {"input_ids": tokens, "labels": tokens}
        digest = hashlib.sha256(f"{self.seed}/{part}/{epoch}/{place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return self._masked(tokens, generator)

    def _masked(self, text: Tensor, generator: torch.Generator) -> Batch:
        """Return a row between its marks, with tokens to predict.

        Of those 80% become the mask, 10% another token, 10% stay (Devlin et al. 2018, section 3.1).
        Every row predicts as many, so that the mean of rows' means is that of all tokens.
        """
        marks = self.tokens.marks
        first, between = torch.tensor([marks.first]), torch.tensor([marks.between])
        row = {}
        if self.segments:
            # As long where they are swapped as where they are not: the lengths tell nothing.
            half = len(text) // 2
            swapped = bool(torch.rand((), generator=generator) < 0.5)
            one, two = (text[-half:], text[:-half]) if swapped else (text[:half], text[half:])
            original = torch.cat([first, one, between, two, between])
            types = torch.zeros_like(original)
            types[len(one) + 2 :] = 1
            row = {"token_type_ids": types, "sentence_order_labels": torch.tensor(int(swapped))}
        else:
            original = torch.cat([first, text, between])
        free = torch.ones(len(original), dtype=torch.bool)
        free[0] = free[-1] = False
        if self.segments:
            free[len(one) + 1] = False
        places = free.nonzero()[:, 0]
        wanted = max(1, round(self.masked_fraction * len(places)))
        chosen = places[torch.randperm(len(places), generator=generator)[:wanted]]
        fate = torch.rand(wanted, generator=generator)
        others = self._ordinary(torch.randint(
            self.tokens.vocabulary - len(marks.special), (wanted,), generator=generator
        ))  # fmt: skip
        kept = original[chosen]
        shown = torch.where(fate < 0.8, marks.mask or 0, torch.where(fate < 0.9, others, kept))
        labels = torch.full_like(original, IGNORED_LABEL)
        labels[chosen] = kept
        hidden = original.clone()
        hidden[chosen] = shown
        return {"input_ids": hidden, "labels": labels, **row}

    def _ordinary(self, numbers: Tensor) -> Tensor:
        """Return tokens of the text by their numbers among those: special ones are passed over."""
        for special in self.tokens.marks.special:  # ascending
            numbers = numbers + (numbers >= special)
        return numbers


@dataclass(frozen=True, slots=True, eq=False)
class FunctionRows:
    """Rows that a function of the user's makes. name: "module:function"."""

    name: str

    def __call__(self, part: str, number: int, first: int, count: int) -> Batch:
        """Return rows of a batch. Raises TrainingError where the function returns something else.

        part: "train" or "held_out". number: of the batch. first, count: which rows of it.
        """
        batch = user_function(self.name)(part, number, first, count)
        if not isinstance(batch, dict) or not all(
            isinstance(value, Tensor) and value.ndim and len(value) == count
            for value in batch.values()
        ):
            raise TrainingError(
                f"{self.name} returned no batch of {count} rows",
                why="it returns a dict from arguments of forward to tensors, with the rows as dim "
                "0",
                fix=f"return such a dict, for the call {self.name.partition(':')[2]}"
                f"({part!r}, {number}, {first}, {count})",
            )
        return batch


def user_function(name: str) -> Callable[..., Any]:
    """Return the function that "module:function" names. Raises TrainingError where there is none.

    >>> user_function("math:sqrt")(4.0)
    2.0
    """
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # the user's module may fail in any way as it is imported
        raise TrainingError(
            f"{name} cannot be imported",
            why=f"{type(error).__name__}: {error}",
            fix="write module:function, of a module that Python finds (see PYTHONPATH)",
        ) from error
    if not callable(found):
        raise TrainingError(f"{name} is no function", fix="name a function of that module")
    called: Callable[..., Any] = found
    return called
