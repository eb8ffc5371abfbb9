"""Models that the command line knows by name: their sizes, as published, and where.

Sizes alone: a model is built from them on the meta device when a command needs it. GPT and Bert are
the project's own plain models; the others are classes of transformers, with its names of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BUNDLED", "BundledModel"]


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A BundledModel is a class and its sizes.

    kind: "GPT" or "Bert" of autoparallel.train.models, else the name of a class of transformers.
    sizes: arguments of the class's configuration. sequence: the positions of one example in the
    training that the source describes. source: where the sizes are published.

    >>> BUNDLED["gpt3-175b"].sizes["hidden"]
    12288
    """

    kind: str
    sizes: Mapping[str, int | float | bool | str]
    sequence: int
    source: str


def _gpt(layers: int, hidden: int, heads: int, sequence: int, source: str) -> BundledModel:
    """Return a GPT. Megatron pads GPT-2's 50257 tokens to 51200, and GPT-2 itself does not."""
    vocabulary = 50257 if sequence == 1024 and "1909" not in source else 51200
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "vocabulary": vocabulary}
    return BundledModel("GPT", {**sizes, "positions": sequence, "dropout": 0.1}, sequence, source)


def _bert(layers: int, hidden: int, heads: int) -> BundledModel:
    """Return a BERT of 512 positions."""
    source = "Devlin et al. 2018, section 3"
    return BundledModel("Bert", {"layers": layers, "hidden": hidden, "heads": heads}, 512, source)


def _decoder(
    kind: str,
    shape: tuple[int, int, int, int, int, int],
    sequence: int,
    source: str,
    **others: int | float | bool | str,
) -> BundledModel:
    """Return a decoder of transformers whose configuration has the names of Llama's.

    shape: layers, hidden size, size between the products of a block, heads, heads of keys and
    values, vocabulary.
    """
    names = (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "vocab_size",
    )  # fmt: skip
    sizes = {**dict(zip(names, shape, strict=True)), "max_position_embeddings": sequence}
    return BundledModel(kind, {**sizes, **others}, sequence, source)


_GPT2 = "Radford et al. 2019, table 2"
_GPT3 = "Brown et al. 2020, table 2.1; vocabulary padded to 51200"
_MEGATRON = "arXiv:1909.08053, table 1; vocabulary padded to 51200"
_MEGATRON_2 = "arXiv:2104.04473, table 1; vocabulary padded to 51200"
_LLAMA_2 = "arXiv:2307.09288, table 1, and the config.json of the weights"
_LLAMA_3 = "arXiv:2407.21783, table 3, and the config.json of the weights"
_MIXTRAL = "arXiv:2401.04088, table 1"
_GPT_OSS = "arXiv:2508.10925, table 1, and the config.json of the weights"
_QWEN_3 = "arXiv:2505.09388, table 2, and the config.json of the weights"
_QWEN = "arXiv:2412.15115, table 1, and the config.json of the weights"

# In the order in which they are listed.
BUNDLED: Mapping[str, BundledModel] = {
    "gpt2": _gpt(12, 768, 12, 1024, _GPT2),
    "gpt2-medium": _gpt(24, 1024, 16, 1024, _GPT2),
    "gpt2-large": _gpt(36, 1280, 20, 1024, _GPT2),
    "gpt2-xl": _gpt(48, 1600, 25, 1024, _GPT2),
    "megatron-1.2b": _gpt(40, 1536, 16, 1024, _MEGATRON),
    "megatron-2.5b": _gpt(54, 1920, 20, 1024, _MEGATRON),
    "megatron-4.2b": _gpt(64, 2304, 24, 1024, _MEGATRON),
    "megatron-8.3b": _gpt(72, 3072, 32, 1024, _MEGATRON),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048, _GPT3),
    "gpt3-175b": _gpt(96, 12288, 96, 2048, _GPT3),
    "megatron-1t": _gpt(128, 25600, 160, 2048, _MEGATRON_2),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "llama-2-7b": _decoder(
        "LlamaForCausalLM", (32, 4096, 11008, 32, 32, 32000), 4096, _LLAMA_2
    ),
    "llama-2-70b": _decoder(
        "LlamaForCausalLM", (80, 8192, 28672, 64, 8, 32000), 4096, _LLAMA_2
    ),
    "llama-3-8b": _decoder(
        "LlamaForCausalLM", (32, 4096, 14336, 32, 8, 128256), 8192, _LLAMA_3
    ),
    "llama-3-70b": _decoder(
        "LlamaForCausalLM", (80, 8192, 28672, 64, 8, 128256), 8192, _LLAMA_3
    ),
    "llama-3-405b": _decoder(
        "LlamaForCausalLM", (126, 16384, 53248, 128, 8, 128256), 8192, _LLAMA_3
    ),
    "mistral-7b": _decoder(
        "MistralForCausalLM", (32, 4096, 14336, 32, 8, 32000), 8192, "arXiv:2310.06825, table 1"
    ),
    "qwen2.5-7b": _decoder("Qwen2ForCausalLM", (28, 3584, 18944, 28, 4, 152064), 4096, _QWEN),
    "qwen2.5-72b": _decoder("Qwen2ForCausalLM", (80, 8192, 29568, 64, 8, 152064), 4096, _QWEN),
    "mixtral-8x7b": _decoder(
        "MixtralForCausalLM",
        (32, 4096, 14336, 32, 8, 32000),
        4096,
        _MIXTRAL,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3-30b-a3b": _decoder(
        "Qwen3MoeForCausalLM",
        (48, 2048, 6144, 32, 4, 151936),
        4096,
        _QWEN_3,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "gpt-oss-20b": _decoder(
        "GptOssForCausalLM",
        (24, 2880, 2880, 64, 8, 201088),
        4096,
        _GPT_OSS,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
    "gpt-oss-120b": _decoder(
        "GptOssForCausalLM",
        (36, 2880, 2880, 64, 8, 201088),
        4096,
        _GPT_OSS,
        head_dim=64,
        num_local_experts=128,
        num_experts_per_tok=4,
    ),
    "deepseek-v3": _decoder(
        "DeepseekV3ForCausalLM",
        (61, 7168, 18432, 128, 128, 129280),
        4096,
        "arXiv:2412.19437, section 4.2, and the config.json of the weights",
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
    ),
    "opt-175b": BundledModel(
        "OPTForCausalLM",
        {
            "num_hidden_layers": 96, "hidden_size": 12288, "ffn_dim": 49152,
            "num_attention_heads": 96, "word_embed_proj_dim": 12288, "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
        2048,
        "arXiv:2205.01068, table 1",
    ),
    "bloom-176b": BundledModel(
        "BloomForCausalLM",
        {"n_layer": 70, "hidden_size": 14336, "n_head": 112, "vocab_size": 250880},
        2048,
        "arXiv:2211.05100, table 3",
    ),
}  # fmt: skip
