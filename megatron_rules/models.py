"""GPT and BERT of the hand-written layers, with the plain models' sizes and parameter names.

Per block and pass: two all-reduces of b*s*h numbers without sequence parallelism; with it two
all-gathers and two reduce-scatters, and two more all-gathers backward unless keep_gathered. The
embedding, the output head and the loss are split over the vocabulary. Outside the split products
every rank does the same work, or with sequence parallelism that of its own positions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoparallel.train.models import IGNORED_LABEL, BertConfig, GPTConfig, ModelOutput
from megatron_rules.dropout import ParallelDropout, RandomStream
from megatron_rules.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel_linear,
    finish_gradients,
    vocab_parallel_cross_entropy,
)
from megatron_rules.regions import (
    Group,
    Split,
    group_rank,
    group_size,
    scatter_to_sequence_parallel,
)

__all__ = ["ParallelBert", "ParallelGPT"]

INITIAL_DEVIATION = 0.02
ModuleType = TypeVar("ModuleType", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Region:
    """The settings that all layers of one model share.

    group: the ranks. sequence_parallel, keep_gathered: see ParallelGPT. stream: random numbers of
    this rank alone.
    """

    group: Group
    sequence_parallel: bool
    keep_gathered: bool
    stream: RandomStream

    def column_options(self) -> dict[str, Any]:
        """Return the keyword arguments of a column-parallel product."""
        return {
            "group": self.group,
            "sequence_parallel": self.sequence_parallel,
            "keep_gathered": self.keep_gathered,
        }

    def row_options(self) -> dict[str, Any]:
        """Return the keyword arguments of a row-parallel product."""
        return {"group": self.group, "sequence_parallel": self.sequence_parallel}

    def dropout(self, probability: float) -> ParallelDropout:
        """Return dropout of activations outside the split products."""
        return ParallelDropout(probability, self.stream if self.sequence_parallel else None)

    def outside(self, module: ModuleType) -> ModuleType:
        """Return a whole module that is used between the split products.

        If sequence-parallel it sees this rank's positions alone, so that its gradients are marked
        as pending: they have to be summed over the group.
        """
        if self.sequence_parallel:
            names = tuple(name for name, _ in module.named_parameters())
            module.pending_gradients = names  # type: ignore[assignment]
        return module


class ParallelAttention(nn.Module):
    """Self-attention over this rank's heads; (s, b, h), or (s/p, b, h), to the same."""

    def __init__(self, config: GPTConfig | BertConfig, causal: bool, region: Region) -> None:
        super().__init__()
        hidden = config.hidden
        self.width = hidden // config.heads
        self.dropout = config.dropout
        self.causal = causal
        self.stream = region.stream
        self.query_key_value = ColumnParallelLinear(
            hidden, 3 * hidden, blocks=3, unit=self.width, **region.column_options()
        )
        self.projection = RowParallelLinear(
            hidden,
            hidden,
            unit=self.width,
            deviation=_residual_deviation(config),
            **region.row_options(),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attended values.

        x: (s, b, h), or (s/p, b, h). mask: boolean, broadcasts to (b, heads, s, s), True where to
        attend.
        """
        query, key, value = (
            part.unflatten(-1, (-1, self.width)).permute(1, 2, 0, 3)
            for part in self.query_key_value(x).chunk(3, dim=-1)
        )
        probability = self.dropout if self.training else 0.0
        arguments = (query, key, value, mask, probability, self.causal)
        # Heads are split, so each rank must drop other entries than its neighbours.
        if probability:
            with self.stream.active(x.device):
                context = F.scaled_dot_product_attention(*arguments)
        else:
            context = F.scaled_dot_product_attention(*arguments)
        return self.projection(context.permute(2, 0, 1, 3).flatten(-2))


class ParallelFeedForward(nn.Module):
    """The two products of a block, (s, b, h) -> (s, b, 4h/p) -> (s, b, h).

    gelu: "tanh" (GPT-2) or "none" (exact, BERT).
    """

    def __init__(self, config: GPTConfig | BertConfig, gelu: str, region: Region) -> None:
        super().__init__()
        hidden = config.hidden
        self.gelu = gelu
        self.expand = ColumnParallelLinear(hidden, 4 * hidden, **region.column_options())
        self.contract = RowParallelLinear(
            4 * hidden, hidden, deviation=_residual_deviation(config), **region.row_options()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the result in the shape of x, (s, b, h) or (s/p, b, h)."""
        return self.contract(F.gelu(self.expand(x), approximate=self.gelu))


class ParallelBlock(nn.Module):
    """Pre-norm Transformer block; (s, b, h), or (s/p, b, h), to the same."""

    def __init__(
        self, config: GPTConfig | BertConfig, causal: bool, gelu: str, region: Region
    ) -> None:
        super().__init__()
        self.attention_norm = region.outside(nn.LayerNorm(config.hidden))
        self.attention = ParallelAttention(config, causal, region)
        self.attention_dropout = region.dropout(config.dropout)
        self.feed_forward_norm = region.outside(nn.LayerNorm(config.hidden))
        self.feed_forward = ParallelFeedForward(config, gelu, region)
        self.feed_forward_dropout = region.dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x plus attention plus feed-forward, in the shape of x."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), mask))
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))


class ParallelModel(nn.Module):
    """The parts that all models share: the output head, and the exchange with a plain model.

    config: the plain model's.
    """

    def __init__(self, config: Any, region: Region) -> None:
        super().__init__()
        self.config: Any = config
        self.region = region

    def finish_gradients(self) -> None:
        """Sum the gradients that are pending; to be called after every backward pass."""
        finish_gradients(self, self.region.group)

    @torch.no_grad()
    def load_plain(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy this rank's parts of a plain model's parameters.

        state_dict: whole tensors by name. Raises ValueError if names are missing or left over.
        """
        parameters = dict(self.named_parameters())
        if parameters.keys() != state_dict.keys():
            raise ValueError(
                f"not the parameters of this model: missing "
                f"{sorted(parameters.keys() - state_dict.keys())}, "
                f"left over {sorted(state_dict.keys() - parameters.keys())}"
            )
        splits = self._splits()
        rank, world_size = group_rank(self.region.group), group_size(self.region.group)
        for name, parameter in parameters.items():
            whole = state_dict[name]
            split = splits.get(name)
            parameter.copy_(split.local(whole, rank, world_size) if split else whole)

    def gathered_state(self) -> dict[str, Tensor]:
        """Return whole parameters under the plain model's names, on every rank."""
        return self._gathered({name: value.data for name, value in self.named_parameters()})

    def gathered_gradients(self) -> dict[str, Tensor]:
        """Return whole gradients under the plain model's names, on every rank.

        To be called after finish_gradients. Parameters without a gradient are left out.
        """
        return self._gathered(
            {name: value.grad for name, value in self.named_parameters() if value.grad is not None}
        )

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors from the parts of all ranks."""
        splits = self._splits()
        return {
            name: splits[name].gather(tensor, self.region.group) if name in splits else tensor
            for name, tensor in tensors.items()
        }

    def _splits(self) -> dict[str, Split]:
        """Return the layout of every parameter that is split, by path."""
        return {
            f"{path}.{name}" if path else name: split
            for path, module in self.named_modules()
            for name, split in getattr(module, "splits", {}).items()
        }

    def _enter(self, x: Tensor) -> Tensor:
        """Return this rank's positions of x (s, b, h) if sequence-parallel, else x."""
        if not self.region.sequence_parallel:
            return x
        return scatter_to_sequence_parallel(x, self.region.group)

    def _output(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        vocabulary: int,
    ) -> ModelOutput:
        """Return the loss and this rank's part of the logits, (b, s, V/p).

        x: (s, b, h), or (s/p, b, h). weight: (V/p, h). bias: (V/p). labels: (b, s). vocabulary: V.
        """
        logits = column_parallel_linear(x, weight, bias, **self.region.column_options())
        loss = None
        if labels is not None:
            loss = vocab_parallel_cross_entropy(
                logits,
                labels.t(),
                vocabulary,
                ignored_label=IGNORED_LABEL,
                group=self.region.group,
            )
        return ModelOutput(loss, logits.transpose(0, 1))


class ParallelGPT(ParallelModel):
    """The plain GPT over a process group.

    config: the plain model's. group: the ranks, None for all. sequence_parallel: split the
    activations outside the products along the sequence, which must be a multiple of the ranks.
    keep_gathered: keep gathered activations for backward, instead of gathering them once more.
    seed: of the dropout that differs between the ranks; the default generators of the ranks must be
    in step.

    Example: `ParallelGPT(GPTConfig.gpt2(), group, sequence_parallel=True)`
    """

    def __init__(
        self,
        config: GPTConfig,
        group: Group = None,
        *,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        seed: int = 0,
    ) -> None:
        region = Region(group, sequence_parallel, keep_gathered, RandomStream(seed, group))
        super().__init__(config, region)
        self.token_embedding = VocabParallelEmbedding(config.vocabulary, config.hidden, group=group)
        self.position_embedding = _embedding(config.positions, config.hidden)
        self.embedding_dropout = region.dropout(config.dropout)
        self.blocks = nn.ModuleList(
            ParallelBlock(config, True, "tanh", region) for _ in range(config.layers)
        )
        self.final_norm = region.outside(nn.LayerNorm(config.hidden))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """Return the plain model's output, but of the logits this rank's part, (b, s, V/p).

        input_ids, labels: (b, s), the same on all ranks.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embedding(input_ids.t()) + self.position_embedding(positions)[:, None]
        x = self.embedding_dropout(self._enter(x))
        for block in self.blocks:
            x = block(x)
        weight, vocabulary = self.token_embedding.weight, self.config.vocabulary
        return self._output(self.final_norm(x), weight, None, labels, vocabulary)


class ParallelBert(ParallelModel):
    """The plain BERT over a process group; arguments as for ParallelGPT.

    The dense layer of the head is whole: as in Megatron it is work on a rank's positions.
    """

    def __init__(
        self,
        config: BertConfig,
        group: Group = None,
        *,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
        seed: int = 0,
    ) -> None:
        if config.norm != "pre" or config.sentence_order:
            raise ValueError("by hand there is a BERT with norms first and one head alone")
        region = Region(group, sequence_parallel, keep_gathered, RandomStream(seed, group))
        super().__init__(config, region)
        hidden = config.hidden
        vocabulary_split = Split(0, config.vocabulary)
        local_vocabulary = vocabulary_split.local_size(group_rank(group), group_size(group))
        self.token_embedding = VocabParallelEmbedding(config.vocabulary, hidden, group=group)
        self.position_embedding = _embedding(config.positions, hidden)
        self.token_type_embedding = _embedding(config.token_types, hidden)
        self.embedding_norm = region.outside(nn.LayerNorm(hidden))
        self.embedding_dropout = region.dropout(config.dropout)
        self.blocks = nn.ModuleList(
            ParallelBlock(config, False, "none", region) for _ in range(config.layers)
        )
        self.final_norm = region.outside(nn.LayerNorm(hidden))
        self.head_dense = region.outside(nn.Linear(hidden, hidden))
        nn.init.normal_(self.head_dense.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.head_dense.bias)
        self.head_norm = region.outside(nn.LayerNorm(hidden))
        self.head_bias = nn.Parameter(torch.zeros(local_vocabulary))
        self.splits = {"head_bias": vocabulary_split}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Return the plain model's output, but of the logits this rank's part, (b, s, V/p).

        All arguments are as of the plain model, and the same on all ranks.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.token_embedding(input_ids.t()) + self.position_embedding(positions)[:, None]
        x = x + self.token_type_embedding(token_type_ids.t())
        x = self.embedding_dropout(self.embedding_norm(self._enter(x)))
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        x = self.head_norm(F.gelu(self.head_dense(self.final_norm(x))))
        weight, vocabulary = self.token_embedding.weight, self.config.vocabulary
        return self._output(x, weight, self.head_bias, labels, vocabulary)


def _embedding(count: int, hidden: int) -> nn.Embedding:
    """Return a whole embedding with normal weights."""
    embedding = nn.Embedding(count, hidden)
    nn.init.normal_(embedding.weight, std=INITIAL_DEVIATION)
    return embedding


def _residual_deviation(config: GPTConfig | BertConfig) -> float:
    """Return the deviation of the last product of a residual branch (Radford et al. 2019)."""
    return INITIAL_DEVIATION / math.sqrt(2 * config.layers)
