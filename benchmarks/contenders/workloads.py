"""The models that every contender trains, from the same weights and on the same batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["SMALLEST", "WORKLOADS", "Workload"]

SEED = 1234
LEARNING_RATE, LARGEST_NORM = 1e-4, 1.0


@dataclass(frozen=True)
class Workload:
    """A model and a batch. kind: "gpt", "bert" or "llama". Sizes are of the whole model and batch.

    The weights are those of one seed, in float32 and without dropout, so that all contenders
    compute the same.
    """

    kind: str
    hidden: int
    batch: int
    sequence: int
    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048

    @property
    def name(self) -> str:
        """The name by which the command line and the tables know it."""
        return f"{self.kind}-{self.hidden}"

    def model(self) -> nn.Module:
        """Return the plain model, with the same weights in every process."""
        torch.manual_seed(SEED)
        return _MODELS[self.kind](self)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the batch, which is the same in every process and step."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.batch, self.sequence + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=generator)
        inputs = {"input_ids": tokens[:, :-1].contiguous()}
        if self.kind == "gpt":
            return {**inputs, "labels": tokens[:, 1:].contiguous()}
        if self.kind == "bert":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return {**inputs, "labels": inputs["input_ids"]}


def _bundled(workload: Workload) -> nn.Module:
    """Return one of this project's plain models."""
    from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig

    sizes = {
        "layers": workload.layers,
        "hidden": workload.hidden,
        "heads": workload.heads,
        "vocabulary": workload.vocabulary,
        "positions": workload.sequence,
        "dropout": 0.0,
    }
    return GPT(GPTConfig(**sizes)) if workload.kind == "gpt" else Bert(BertConfig(**sizes))


def _llama(workload: Workload) -> nn.Module:
    """Return Hugging Face's Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=workload.vocabulary,
            hidden_size=workload.hidden,
            intermediate_size=workload.hidden * 11 // 4,
            num_hidden_layers=workload.layers,
            num_attention_heads=workload.heads,
            num_key_value_heads=max(2, workload.heads // 2),
            max_position_embeddings=workload.sequence,
            use_cache=False,
        )
    )


_MODELS: dict[str, Callable[[Workload], Any]] = {"gpt": _bundled, "bert": _bundled, "llama": _llama}
# Only to see that the benchmark runs.
SMALLEST = "gpt-16"
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("gpt", 64, batch=4, sequence=64),
        Workload("gpt", 256, batch=4, sequence=128),
        Workload("gpt", 768, batch=2, sequence=128, heads=12),
        Workload("bert", 64, batch=4, sequence=64),
        Workload("bert", 256, batch=4, sequence=128),
        Workload("bert", 768, batch=2, sequence=128, heads=12),
        Workload("llama", 64, batch=4, sequence=64),
        Workload("llama", 256, batch=4, sequence=128),
        Workload("llama", 768, batch=2, sequence=128, heads=12),
        Workload("gpt", 16, batch=2, sequence=8, layers=1, heads=2, vocabulary=32),
    )
}
