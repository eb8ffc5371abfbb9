"""A BERT that is fine-tuned to choose between texts: its body, and one score for each of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoparallel.train.model_sizes import BertConfig
from autoparallel.train.models import Bert, fill_weights

__all__ = ["BertForChoices", "ChoiceOutput"]


class ChoiceOutput(NamedTuple):
    """The output of a model that chooses.

    loss: mean cross-entropy of the right choices, None without labels. logits: (b, c), a score of
    each choice.
    """

    loss: Tensor | None
    logits: Tensor


class BertForChoices(Bert):
    """Multiple choice: each text is read by itself, and its first position is scored.

    config: as of Bert, whose body it has by the same names. The pooler is that of the head of
    sentence order, where the body was trained with it. Source: Devlin et al. 2018, section 4.4;
    Shoeybi et al. 2019, section 5.3 (RACE).

    Example: `BertForChoices(config)(input_ids, labels=torch.tensor([2])).logits`
    """

    def _add_heads(self, config: BertConfig) -> None:
        self.pooler = nn.Linear(config.hidden, config.hidden)
        self.pooler_dropout = nn.Dropout(config.dropout)
        self.choice_head = nn.Linear(config.hidden, 1)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw one module's weights; materialization of meta models looks for this name."""
        fill_weights(module)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ChoiceOutput:
        """Return the scores, and the loss if labels are given.

        input_ids: (b, c, s) integers, c texts to choose from. attention_mask, token_type_ids: of
        the same shape, as of Bert. labels: (b,) the right ones.
        """
        batch, choices, length = input_ids.shape

        def flat(each: Tensor | None) -> Tensor | None:
            return None if each is None else each.reshape(batch * choices, length)

        tokens = input_ids.reshape(batch * choices, length)
        first = self.encode(tokens, flat(attention_mask), flat(token_type_ids))[:, 0]
        pooled = self.pooler_dropout(torch.tanh(self.pooler(first)))
        logits = self.choice_head(pooled).reshape(batch, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ChoiceOutput(loss, logits)

    def example_inputs(self, batch: int = 2, sequence: int | None = None) -> dict[str, Tensor]:
        """Return arguments of forward with four texts to choose from, as Bert does."""
        rows = super().example_inputs(4 * batch, sequence)
        del rows["labels"]
        example = {name: value.unflatten(0, (batch, 4)) for name, value in rows.items()}
        labels = torch.arange(batch, device=rows["input_ids"].device) % 4
        return {**example, "labels": labels}
