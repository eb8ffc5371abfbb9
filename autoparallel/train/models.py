"""Plain GPT and BERT in torch alone: models of a user who never heard of parallelism.

Both are Transformers with a fused query-key-value product and an output head tied to the token
embedding; their norms come before each branch, in a BERT also after it, if it is asked for. Nothing
in them knows about devices; splitting them is the planner's work. They construct on the meta device
and trace with a symbolic batch and sequence.

Sources: Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3), Devlin et al. 2018 (BERT), Shoeybi
et al. 2019, section 5.3 (why BERT's norms come first in large models).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoparallel.train.layers import Block
from autoparallel.train.model_sizes import BertConfig, GPTConfig

__all__ = [
    "GPT",
    "IGNORED_LABEL",
    "Bert",
    "BertConfig",
    "CachedOutput",
    "GPTConfig",
    "ModelOutput",
    "SentenceOutput",
    "fill_weights",
]

IGNORED_LABEL = -100
INITIAL_DEVIATION = 0.02


class ModelOutput(NamedTuple):
    """The output of both models.

    loss: scalar mean over the labels that count, None without labels. logits: (b, s, V).
    """

    loss: Tensor | None
    logits: Tensor


class CachedOutput(NamedTuple):
    """The output of a GPT that goes on with a text.

    logits: (b, 1, V), of the token after the last position. cache: (layers, 2, b, heads, s,
    h / heads), the keys and values of the positions that were given.
    """

    logits: Tensor
    cache: Tensor


class SentenceOutput(NamedTuple):
    """The output of a BERT that also learns the order of sentences.

    loss, logits: as of ModelOutput; the loss is the sum of both tasks'. sentence_logits: (b, 2), of
    segments that are in order, and of those that are swapped.
    """

    loss: Tensor | None
    logits: Tensor
    sentence_logits: Tensor


class GPT(nn.Module):
    """Causal language model; logits are the product with the token embedding (tied head).

    config: its sizes. Weights are drawn on the default device; on the meta device they are left
    out.

    Example: `GPT(GPTConfig.gpt2())(**GPT(GPTConfig.gpt2()).example_inputs()).loss`
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(config.vocabulary, config.hidden)
            self.position_embedding = nn.Embedding(config.positions, config.hidden)
            self.embedding_dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(
                Block(config, causal=True, gelu="tanh") for _ in range(config.layers)
            )
            self.final_norm = nn.LayerNorm(config.hidden)
        _initialize(self)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw one module's weights; materialization of meta models looks for this name."""
        fill_weights(module)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cache: Tensor | None = None,
        use_cache: bool = False,
    ) -> ModelOutput | CachedOutput:
        """Return logits of the next token at every position, and the loss if labels are given.

        input_ids: (b, s) integers, s at most config.positions (IndexError beyond). labels: (b, s)
        the target of each position, already shifted; -100 does not count. use_cache: return the
        last logits, and keys and values by which a later call goes on; dropout is left out. cache:
        of all positions before these, put together along dim 4.
        """
        if use_cache:
            return self._go_on(input_ids, cache)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.token_embedding.weight)
        return ModelOutput(_loss(logits, labels), logits)

    def _go_on(self, input_ids: Tensor, cache: Tensor | None) -> CachedOutput:
        """Return what forward does with a cache."""
        length, mask = input_ids.shape[1], None
        positions = torch.arange(length, device=input_ids.device)
        if cache is not None:
            positions = positions + cache.shape[4]
            everywhere = torch.arange(cache.shape[4] + length, device=input_ids.device)
            mask = everywhere <= positions[:, None]
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        kept = []
        block: Any
        for number, block in enumerate(self.blocks):
            x, own = block.go_on(x, None if cache is None else cache[number], mask)
            kept.append(own)
        logits = F.linear(self.final_norm(x[:, -1:]), self.token_embedding.weight)
        return CachedOutput(logits, torch.stack(kept))

    def example_inputs(self, batch: int = 2, sequence: int | None = None) -> dict[str, Tensor]:
        """Return arguments of forward on the model's device, the same on every call.

        sequence: by default config.positions. labels are input_ids moved one position ahead.
        """
        sequence = self.config.positions if sequence is None else sequence
        tokens = _example_tokens(self, (batch, sequence + 1), self.config.vocabulary)
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


class Bert(nn.Module):
    """Masked language model; the decoder is tied to the token embedding.

    config: its sizes, the arrangement of its norms, its heads. Weights as of GPT.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(config.vocabulary, config.hidden)
            self.position_embedding = nn.Embedding(config.positions, config.hidden)
            self.token_type_embedding = nn.Embedding(config.token_types, config.hidden)
            self.embedding_norm = nn.LayerNorm(config.hidden)
            self.embedding_dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(
                Block(config, causal=False, gelu="none") for _ in range(config.layers)
            )
            # Where norms come last, the last block has ended in one.
            last = config.norm == "post"
            self.final_norm = nn.Identity() if last else nn.LayerNorm(config.hidden)
            self._add_heads(config)
        _initialize(self)

    def _add_heads(self, config: BertConfig) -> None:
        self.head_dense = nn.Linear(config.hidden, config.hidden)
        self.head_norm = nn.LayerNorm(config.hidden)
        self.head_bias = nn.Parameter(torch.zeros(config.vocabulary))
        if config.sentence_order:
            self.pooler = nn.Linear(config.hidden, config.hidden)
            self.sentence_head = nn.Linear(config.hidden, 2)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw one module's weights; materialization of meta models looks for this name."""
        fill_weights(module)
        if isinstance(module, Bert):
            nn.init.zeros_(module.head_bias)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> Tensor:
        """Return the hidden states (b, s, h) that the heads read; arguments as of forward."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        x = x + self.token_type_embedding(token_type_ids)
        x = self.embedding_dropout(self.embedding_norm(x))
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_labels: Tensor | None = None,
    ) -> ModelOutput | SentenceOutput:
        """Return logits of the original token at every position, and the loss if labels are given.

        input_ids: (b, s) integers, s at most config.positions (IndexError beyond). attention_mask:
        (b, s) of 1 (token) and 0 (padding); all ones without it. token_type_ids: (b, s) integers
        below config.token_types; all zeros without it. labels: (b, s) the original tokens; -100
        where nothing was masked. sentence_order_labels: (b,) 1 where the segments are swapped, for
        models with that head.
        """
        x = self.encode(input_ids, attention_mask, token_type_ids)
        hidden = self.head_norm(F.gelu(self.head_dense(x)))
        logits = F.linear(hidden, self.token_embedding.weight, self.head_bias)
        loss = _loss(logits, labels)
        if not self.config.sentence_order:
            return ModelOutput(loss, logits)
        sentence_logits = self.sentence_head(torch.tanh(self.pooler(x[:, 0])))
        if loss is not None and sentence_order_labels is not None:
            loss = loss + F.cross_entropy(sentence_logits, sentence_order_labels)
        return SentenceOutput(loss, logits, sentence_logits)

    def example_inputs(self, batch: int = 2, sequence: int | None = None) -> dict[str, Tensor]:
        """Return arguments of forward on the model's device, the same on every call.

        sequence: by default config.positions. The last position of every row but the first is
        padding, the second half of each row is of type 1, and every third token is a label.
        """
        sequence = self.config.positions if sequence is None else sequence
        tokens = _example_tokens(self, (batch, sequence), self.config.vocabulary)
        column = torch.arange(sequence, device=tokens.device).expand(batch, sequence)
        row = torch.arange(batch, device=tokens.device)[:, None]
        padding = (row > 0) & (column == sequence - 1)
        example = {
            "input_ids": tokens,
            "attention_mask": torch.where(padding, 0, 1),
            "token_type_ids": (column * 2 // sequence).clamp(max=self.config.token_types - 1),
            "labels": torch.where((column % 3 == 0) & ~padding, tokens, IGNORED_LABEL),
        }
        if self.config.sentence_order:
            example["sentence_order_labels"] = row[:, 0] % 2
        return example


def _initialize(model: "GPT | Bert") -> None:
    """Give a model built on the meta device its memory and weights, unless it is to stay there.

    Nothing but `_init_weights` draws numbers, which is what fills a meta model part by part.
    """
    device = torch.get_default_device()
    if device.type != "meta":
        model.to_empty(device=device)
        model.apply(model._init_weights)


def fill_weights(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02); biases 0, norms 1; the last product of a residual branch less.

    Such a product's deviation is divided by sqrt(2 layers), so that the residual stream does not
    grow with the depth. Source: Radford et al. 2019, section 2.3.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        scale = getattr(module, "initial_scale", 1.0)
        nn.init.normal_(module.weight, std=INITIAL_DEVIATION * scale)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Return the mean cross-entropy of logits (b, s, V) at labels (b, s), None without labels."""
    if labels is None:
        return None
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)


def _example_tokens(model: nn.Module, shape: tuple[int, int], vocabulary: int) -> Tensor:
    """Return scattered tokens without a generator: the middle digits of scaled squares."""
    device = next(model.parameters()).device
    count = torch.arange(shape[0] * shape[1], device=device)
    return ((count * count * 40_503 + 12_345) // 64 % vocabulary).view(shape)
