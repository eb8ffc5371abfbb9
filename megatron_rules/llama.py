"""Llama of the hand-written layers, with the sizes and parameter names of Hugging Face's.

Per block and pass the collectives are those of GPT (see models.py): queries, keys and values are
one column-parallel product, and so are the gate and what it multiplies. Rows of the first are
ordered by heads of keys, each with the heads of queries that read it, so that a rank has whole
groups (Megatron-Core's order).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoparallel.train.models import IGNORED_LABEL, ModelOutput
from megatron_rules.dropout import RandomStream
from megatron_rules.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron_rules.models import ParallelModel, Region
from megatron_rules.regions import Group

__all__ = ["ParallelLlama"]

_QUERY_KEY_VALUE = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
_GATE_UP = ("gate_proj.weight", "up_proj.weight")


class ParallelGroupedAttention(nn.Module):
    """Attention of several heads of queries to one of keys; (s, b, h), or (s/p, b, h), to the same.

    config: Hugging Face's LlamaConfig.
    """

    def __init__(self, config: Any, region: Region) -> None:
        super().__init__()
        hidden, self.width = config.hidden_size, config.head_dim
        keys = config.num_key_value_heads
        self.queries = config.num_attention_heads // keys
        group = (self.queries + 2) * self.width
        self.query_key_value = ColumnParallelLinear(
            hidden, keys * group, bias=False, unit=group, **region.column_options()
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.width,
            hidden,
            bias=False,
            unit=self.queries * self.width,
            **region.row_options(),
        )

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return the attended values. cosine, sine: (s, head width), see `rotations`."""
        # (s, b, groups, heads of a group, width) -> (b, heads, s, width)
        heads = self.query_key_value(x).unflatten(-1, (-1, self.queries + 2, self.width))
        query, key, value = (
            part.flatten(2, 3).permute(1, 2, 0, 3)
            for part in heads.split((self.queries, 1, 1), dim=3)
        )
        context = F.scaled_dot_product_attention(
            _rotated(query, cosine, sine),
            _rotated(key, cosine, sine),
            value,
            is_causal=True,
            enable_gqa=self.queries > 1,
        )
        return self.o_proj(context.permute(2, 0, 1, 3).flatten(-2))


class ParallelGatedFeedForward(nn.Module):
    """The gated products of a block, (s, b, h) -> twice (s, b, i/p) -> (s, b, h)."""

    def __init__(self, config: Any, region: Region) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = ColumnParallelLinear(
            hidden, 2 * inner, bias=False, blocks=2, **region.column_options()
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, **region.row_options())

    def forward(self, x: Tensor) -> Tensor:
        """Return the result in the shape of x, (s, b, h) or (s/p, b, h)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class ParallelLlamaBlock(nn.Module):
    """A block of Llama; (s, b, h), or (s/p, b, h), to the same."""

    def __init__(self, config: Any, region: Region) -> None:
        super().__init__()
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = region.outside(nn.RMSNorm(hidden, epsilon))
        self.self_attn = ParallelGroupedAttention(config, region)
        self.post_attention_layernorm = region.outside(nn.RMSNorm(hidden, epsilon))
        self.mlp = ParallelGatedFeedForward(config, region)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return x plus attention plus feed-forward, in the shape of x."""
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))


class ParallelLlama(ParallelModel):
    """Hugging Face's LlamaForCausalLM over a process group; options as for ParallelGPT.

    config: its LlamaConfig, without dropout, biases, tied embeddings and scaled rotations: a
    ValueError otherwise. Weights are exchanged under Hugging Face's names, by which q_proj, k_proj
    and v_proj are parts of one weight here, and so are gate_proj and up_proj.

    Example: `ParallelLlama(LlamaConfig(), group, sequence_parallel=True)`
    """

    def __init__(
        self,
        config: Any,
        group: Group = None,
        *,
        sequence_parallel: bool = False,
        keep_gathered: bool = False,
    ) -> None:
        rotation = config.rope_parameters
        if (
            config.tie_word_embeddings
            or config.attention_bias
            or config.mlp_bias
            or config.attention_dropout
            or rotation["rope_type"] != "default"
        ):
            raise ValueError(
                "by hand there is a Llama without dropout, biases, tied embeddings and scaled "
                "rotations"
            )
        region = Region(group, sequence_parallel, keep_gathered, RandomStream(0, group))
        super().__init__(config, region)
        self.base = rotation["rope_theta"]
        blocks = [ParallelLlamaBlock(config, region) for _ in range(config.num_hidden_layers)]
        table = VocabParallelEmbedding(config.vocab_size, config.hidden_size, group=group)
        norm = region.outside(nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.model = nn.ModuleDict(
            {"embed_tokens": table, "layers": nn.ModuleList(blocks), "norm": norm}
        )
        self.lm_head = ColumnParallelLinear(
            config.hidden_size, config.vocab_size, bias=False, **region.column_options()
        )

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """Return the loss of predicting the next of `labels`, and this rank's part of the logits.

        input_ids, labels: (b, s), the same on all ranks. The logits are (b, s, V/p).
        """
        cosine, sine = rotations(input_ids.shape[1], self.config.head_dim, self.base)
        x = self._enter(self.model["embed_tokens"](input_ids.t()))
        layers = self.model["layers"]
        assert isinstance(layers, nn.ModuleList)
        for block in layers:
            x = block(x, cosine.to(x), sine.to(x))
        following = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        weight, vocabulary = self.lm_head.weight, self.config.vocab_size
        return self._output(self.model["norm"](x), weight, None, following, vocabulary)

    def load_plain(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy this rank's parts of Hugging Face's parameters, whole tensors by name.

        Raises ValueError if names are missing or left over.
        """
        fused = dict(state_dict)
        layers = range(self.config.num_hidden_layers)
        needed = [
            place + name
            for layer in layers
            for place, names in zip(_places(layer), (_QUERY_KEY_VALUE, _GATE_UP), strict=True)
            for name in names
        ]
        missing = [name for name in needed if name not in fused]
        if missing:
            raise ValueError(f"not the parameters of this model: missing {missing}")
        for layer in layers:
            attention, inner = _places(layer)
            parts = [fused.pop(attention + name) for name in _QUERY_KEY_VALUE]
            groups = [part.unflatten(0, (self._keys, -1)) for part in parts]
            fused[f"{attention}query_key_value.weight"] = torch.cat(groups, 1).flatten(0, 1)
            both = [fused.pop(inner + name) for name in _GATE_UP]
            fused[f"{inner}gate_up.weight"] = torch.cat(both)
        super().load_plain(fused)

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors under Hugging Face's names, from the parts of all ranks."""
        whole = super()._gathered(tensors)
        width = self.config.head_dim
        for layer in range(self.config.num_hidden_layers):
            attention, inner = _places(layer)
            fused = whole.pop(f"{attention}query_key_value.weight", None)
            if fused is not None:
                groups = fused.unflatten(0, (self._keys, -1, width))
                parts = groups.split((groups.shape[1] - 2, 1, 1), dim=1)
                for name, part in zip(_QUERY_KEY_VALUE, parts, strict=True):
                    whole[attention + name] = part.flatten(0, 2)
            both = whole.pop(f"{inner}gate_up.weight", None)
            if both is not None:
                for name, part in zip(_GATE_UP, both.chunk(2), strict=True):
                    whole[inner + name] = part
        return whole

    @property
    def _keys(self) -> int:
        """The heads of keys of the whole model."""
        return int(self.config.num_key_value_heads)


def rotations(positions: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles by which heads are turned, each (positions, width).

    width: of a head. base: of the wave lengths (Su et al. 2021, arXiv:2104.09864); the halves of a
    head, and not its neighbours, are the pairs that are turned.

    >>> rotations(2, 4, 10000.0)[1]
    tensor([[0.0000, 0.0000, 0.0000, 0.0000],
            [0.8415, 0.0100, 0.8415, 0.0100]])
    """
    speeds = base ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.arange(positions).float()[:, None] * speeds
    twice = torch.cat((angles, angles), dim=-1)
    return twice.cos(), twice.sin()


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return heads (b, heads, s, width) turned by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def _places(layer: int) -> tuple[str, str]:
    """Return what the names of a layer's attention and of its feed-forward begin with."""
    return f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
