"""Small models with routed experts, each with a router and a form of experts of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import autoparallel.strategy.build_network as building
from autoparallel.rules.rule import ShardingRule
from autoparallel.rules.strategies import Strategy, strategies

__all__ = ["FAMILIES", "build", "inputs_for", "only"]

_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "use_cache": False,
}
_LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_shared_experts": 1,
}
_QWEN = {"moe_intermediate_size": 8, "num_experts": 8, "head_dim": 4, "decoder_sparse_step": 1}


def _hugging_face(kind: str, form: str, **options: Any) -> Callable[[], nn.Module]:
    """Return the maker of a Hugging Face model, with experts in one of their forms."""

    def make() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **options})
        config._experts_implementation = form
        model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
        # Experts begin as zeros, or as anything.
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model

    return make


class TopOne(nn.Module):
    """Experts as in Llama 4, on rows that are sorted and added up by index_add: one for each token,
    on its row times the score's sigmoid, beside one that all tokens share.
    """

    def __init__(self, experts: int = 6, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * inner) / 4)
        self.down = nn.Parameter(torch.randn(experts, inner, width) / 4)
        self.shared = nn.Linear(width, width)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        import transformers.integrations.moe  # noqa: F401  # its op

        x = self.embedding(input_ids).flatten(0, 1)
        score, chosen = self.router(x).topk(1, dim=-1)
        order = torch.sort(chosen.flatten()).indices
        count = self.up.size(0)
        counts = torch.histc(chosen.flatten().to(x.dtype), bins=count, min=0, max=count)
        ends = counts.cumsum(0).to(torch.int32)
        rows = x[order // 1] * score.flatten()[order].sigmoid().unsqueeze(-1)
        product = torch.ops.transformers.grouped_mm_fallback
        gate, up = product(rows, self.up, ends).chunk(2, -1)
        made = product(nn.functional.silu(gate) * up, self.down, ends)
        y = torch.zeros_like(x).index_add(0, order // 1, made) + self.shared(x)
        logits = y @ self.embedding.weight.t()
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten())}


class Expert(nn.Module):
    """A gated expert with a bias."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class Listed(nn.Module):
    """A Python loop over a list of experts, each with the tokens that chose it.

    put: rows are read, added to and written back, as Mistral's own code has it; else they are added
    by index_add, as Hugging Face had it.
    """

    def __init__(self, put: bool, experts: int = 6, width: int = 8, choices: int = 2) -> None:
        super().__init__()
        self.put, self.choices = put, choices
        self.embedding = nn.Embedding(32, width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, 12) for _ in range(experts))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(input_ids)
        flat = x.view(-1, x.size(-1))
        weights, chosen = self.router(flat).softmax(-1).topk(self.choices, dim=-1)
        y = torch.zeros_like(flat)
        masks = nn.functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            if self.put:
                token, choice = torch.where(chosen == number)
                y[token] += weights[token, choice, None] * expert(flat[token])
            else:
                choice, token = torch.where(masks[number])
                made = expert(flat[token]) * weights[token, choice, None]
                y.index_add_(0, token, made)
        logits = (flat + y) @ self.embedding.weight.t()
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten())}


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _hugging_face("Mixtral", "grouped_mm", num_local_experts=6),
    "mixtral-batched": _hugging_face("Mixtral", "batched_mm", num_local_experts=6),
    "qwen3-moe": _hugging_face("Qwen3Moe", "grouped_mm", **_QWEN),
    "deepseek-v3": _hugging_face("DeepseekV3", "grouped_mm", **_LATENT),
    "gpt-oss": _hugging_face(
        "GptOss", "grouped_mm", num_local_experts=4, head_dim=4, layer_types=["full_attention"]
    ),
    "top-one": TopOne,
    "listed": lambda: Listed(False),
    "listed-put": lambda: Listed(True),
}


def build(name: str, form: str = "") -> nn.Module:
    """Return the model in float64 and train mode, with the same weights at every call.

    form: of a Hugging Face model's experts, in place of the family's own.
    """
    torch.manual_seed(5)
    model = FAMILIES[name]().double().train()
    if form and hasattr(model, "config"):
        model.config._experts_implementation = form
    return model


def inputs_for(batch: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    """Return the same tokens at every call."""
    tokens = torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": tokens, "labels": tokens}


@contextmanager
def only(*kinds: str) -> Iterator[None]:
    """Have routed experts be split in one way alone on each mesh axis, by the axis' size.

    kinds: for the axes of 2, 3, .. ranks: a kernel's name, "b" or "f" for the split of such loops
    without one, "" for any.
    """
    wanted = dict(enumerate(kinds, 2))

    def chosen(rule: ShardingRule, *more: Any) -> tuple[Strategy, ...]:
        made = strategies(rule, *more)
        kind = wanted.get(more[-1], "")
        if rule.inner is None or not kind:
            return made
        return tuple(
            each
            for each in made
            if (each.kernel.name if each.kernel else each.tile and each.tile.loop[0]) == kind
        )

    before = building.strategies
    building.strategies = chosen
    try:
        yield
    finally:
        building.strategies = before
