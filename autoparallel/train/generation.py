"""Text from a trained model, split over ranks or not: greedy or by sampling, the same on all ranks.

A GPT goes on from the keys and values of the positions before; a model of transformers does so by
its own `generate`; any other that returns logits reads the whole text again for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoparallel.train.config import TrainingError
from autoparallel.train.outputs import logits_of, whole

__all__ = ["Sampling", "generate"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The way in which the next token is chosen.

    temperature: by which logits are divided; 0 takes the likeliest token. top_k: of so many
    likeliest ones, 0 for all. top_p: of the likeliest ones that have this probability together.
    seed: of the choice.
    Raises TrainingError for numbers out of range.

    >>> Sampling(temperature=0.0).choose(torch.tensor([[0.0, 2.0, 1.0]]), torch.Generator())
    tensor([1])
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise TrainingError(
                f"temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}",
                why="a temperature and a count are not below 0, a probability is in (0, 1]",
                fix="give such numbers; temperature 0 is greedy",
            )

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Return a token for each row of logits (b, V)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.double() / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, places = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)
            logits = logits.scatter(-1, places, ordered)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    module: nn.Module, tokens: Tensor, count: int, sampling: Sampling, end: int | None = None
) -> Iterator[Tensor]:
    """Yield the next token of each row, up to `count` times.

    module: split or plain, in evaluation mode. tokens: (b, s), the same on every rank.
    sampling: how they are chosen. end: a token after which a row has ended; when all have, so does
    the text, and an ended row repeats it. All ranks must take as many tokens. Raises TrainingError
    for a model that returns no logits.

    Example: `torch.stack([*generate(model, tokens, 20, Sampling())], dim=1)`
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    rows = _LastLogits(module, tokens)
    for number in range(count):
        chosen = sampling.choose(rows.last().cpu(), generator)
        if end is not None:
            chosen = torch.where(ended, end, chosen)
            ended |= chosen == end
        yield chosen
        if bool(ended.all()):
            return
        if number < count - 1:
            rows.append(chosen.to(tokens.device))


class _LastLogits:
    """The logits of the last position of a text that grows."""

    def __init__(self, module: nn.Module, tokens: Tensor) -> None:
        self.module, self.tokens = module, tokens
        names = inspect.signature(module.forward).parameters
        self.ours = {"cache", "use_cache"} <= set(names)
        self.theirs = "past_key_values" in names
        self.cache: Any = None
        self.new = tokens

    def append(self, chosen: Tensor) -> None:
        """Add a token to each row."""
        self.new = chosen[:, None]
        self.tokens = torch.cat([self.tokens, self.new], dim=1)

    def last(self) -> Tensor:
        """Return the logits after the last position, (b, V)."""
        if self.ours:
            before = {} if self.cache is None else {"cache": self.cache}
            output = self.module(self.new, use_cache=True, **before)
            own = whole(output.cache)
            self.cache = own if self.cache is None else torch.cat([self.cache, own], dim=4)
            return whole(output.logits)[:, -1]
        if self.theirs:
            output = self.module(
                input_ids=self.new,
                attention_mask=torch.ones_like(self.tokens),
                past_key_values=self.cache,
                use_cache=True,
            )
            self.cache = output.past_key_values
            return whole(output.logits)[:, -1]
        return whole(logits_of(self.module(self.tokens))[:, -1:])[:, -1]
