"""Tiny models of many families, with random weights and a loss inside, as their users have them.

Eight heads and features that divide by eight, but a vocabulary of 211, a sequence of 11 and a batch
of 3: what divides in real models divides here, and what need not does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import zoo_layers as own
from torch import nn
from zoo_inputs import (
    IMAGE,
    POSITIONS,
    Inputs,
    captioned_images,
    images,
    masked_images,
    nodes,
    pairs,
    sounds,
    tokens,
)
from zoo_layers import CLASSES, HEADS, HIDDEN, VOCABULARY

__all__ = ["FAMILIES", "HEADS", "HIDDEN", "LAYERS", "TRANSFORMERS", "VOCABULARY", "Family"]
__all__ += ["build", "build_reference", "inputs_for"]

# From three equal layers on, some are not traced but copied.
LAYERS, INNER = 4, 4 * HIDDEN


@dataclass(frozen=True, slots=True)
class Family:
    """A Family makes a model by make(layers, dropout), and inputs() with labels for it.

    drops: whether the family has dropout. transformer: of the kind that tensor parallelism splits
    nearly whole.
    """

    name: str
    make: Callable[[int, float], nn.Module]
    inputs: Callable[[], Inputs]
    drops: bool = True
    transformer: bool = True


def build(name: str, layers: int = LAYERS, dropout: float = 0.0) -> nn.Module:
    """Return the model in float64 and train mode, with the same weights at every call."""
    torch.manual_seed(7)
    return FAMILIES[name].make(layers, dropout).double().train()


def build_reference(name: str, layers: int = LAYERS) -> nn.Module:
    """Return the same model for plain torch, with experts one by one, in products of any type.

    Torch's grouped matrix products, which are Hugging Face's choice, take no float64.
    """
    model = build(name, layers)
    config = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) == "grouped_mm":
        config._experts_implementation = "eager"
    return model


def inputs_for(name: str) -> Inputs:
    """Return the same inputs at every call, with padding and ignored labels where there are any."""
    return FAMILIES[name].inputs()


def _hugging_face(model: str, config: str, **options: Any) -> Callable[[int, float], nn.Module]:
    """Return the maker of a Hugging Face model. An option may be called with (layers, dropout)."""

    def make(layers: int, dropout: float) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        chosen = {key: v(layers, dropout) if callable(v) else v for key, v in options.items()}
        kind = getattr(transformers, model)
        made: nn.Module = kind(getattr(transformers, config)(**chosen))
        return made

    return make


def _layers(layers: int, _: float) -> int:
    return layers


def _rate(_: int, dropout: float) -> float:
    return dropout


def _clip(layers: int, dropout: float) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    both = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "attention_dropout": dropout,
    }
    text = {**both, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, **_SPECIAL}
    vision = {**both, "image_size": IMAGE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=HIDDEN)
    model: nn.Module = transformers.CLIPModel(config)
    return model


_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_WORDS = {"vocab_size": VOCABULARY, **_SPECIAL}
_DECODER = {
    **_WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": _layers,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "use_cache": False,
}
_GROUPED = {**_DECODER, "num_key_value_heads": HEADS // 2, "attention_dropout": _rate}
_GPT = {**_WORDS, "n_embd": HIDDEN, "n_head": HEADS, "n_layer": _layers, "n_positions": POSITIONS}
_GPT |= {"resid_pdrop": _rate, "embd_pdrop": _rate, "attn_pdrop": _rate, "use_cache": False}
_ENCODER = {key: value for key, value in _DECODER.items() if key != "use_cache"}
_ENCODER |= {"hidden_dropout_prob": _rate, "attention_probs_dropout_prob": _rate}
_FALCON = {**_DECODER, "hidden_dropout": _rate, "attention_dropout": _rate}
_FALCON |= {"ffn_hidden_size": INNER}
del _FALCON["intermediate_size"]
_EXPERTS = {**_GROUPED, "intermediate_size": 2 * HIDDEN}
_IMAGES = {"image_size": IMAGE, "num_labels": CLASSES}
# Hugging Face's classifiers set it in their first forward, which takes two more traces. ViT, which
# is not told, shows that they may.
_TOLD = {"problem_type": "single_label_classification"}
_BOTH = {
    **_WORDS,
    "d_model": HIDDEN,
    "encoder_layers": _layers,
    "decoder_layers": _layers,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "decoder_start_token_id": 1,
    "dropout": _rate,
    "attention_dropout": _rate,
    "activation_dropout": _rate,
    "use_cache": False,
}
_V3 = {
    **_EXPERTS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": HIDDEN,
}
_hf = _hugging_face

_ALL = (
    Family("gpt2", _hf("GPT2LMHeadModel", "GPT2Config", **_GPT), tokens),
    Family("gptj", _hf("GPTJForCausalLM", "GPTJConfig", **_GPT, rotary_dim=4), tokens),
    Family(
        "gpt-neox",
        _hf(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            **_DECODER,
            hidden_dropout=_rate,
            attention_dropout=_rate,
        ),
        tokens,
    ),
    Family(
        "opt",
        _hf(
            "OPTForCausalLM",
            "OPTConfig",
            **{key: value for key, value in _DECODER.items() if key != "intermediate_size"},
            ffn_dim=INNER,
            word_embed_proj_dim=HIDDEN,
            dropout=_rate,
            attention_dropout=_rate,
        ),
        tokens,
    ),
    Family(
        "bloom",
        _hf(
            "BloomForCausalLM",
            "BloomConfig",
            **_WORDS,
            hidden_size=HIDDEN,
            n_layer=_layers,
            n_head=HEADS,
            hidden_dropout=_rate,
            attention_dropout=_rate,
            use_cache=False,
        ),
        tokens,
    ),
    Family(
        "falcon-multi-query",
        _hf("FalconForCausalLM", "FalconConfig", **_FALCON, multi_query=True, parallel_attn=True),
        tokens,
    ),
    Family(
        "falcon-grouped",
        _hf(
            "FalconForCausalLM",
            "FalconConfig",
            **_FALCON,
            new_decoder_architecture=True,
            num_kv_heads=HEADS // 2,
        ),
        tokens,
    ),
    Family(
        "falcon-alibi",
        _hf(
            "FalconForCausalLM",
            "FalconConfig",
            **_FALCON,
            multi_query=False,
            parallel_attn=False,
            alibi=True,
            bias=True,
        ),
        tokens,
    ),
    Family("llama", _hf("LlamaForCausalLM", "LlamaConfig", **_GROUPED), tokens),
    Family(
        "mistral", _hf("MistralForCausalLM", "MistralConfig", **_GROUPED, sliding_window=4), tokens
    ),
    Family("qwen3", _hf("Qwen3ForCausalLM", "Qwen3Config", **_GROUPED, head_dim=16), tokens),
    Family(
        "gemma3",
        _hf(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **_GROUPED,
            head_dim=16,
            sliding_window=4,
            layer_types=lambda n, _: (
                ["sliding_attention", "full_attention"] * (n // 2) + ["sliding_attention"] * (n % 2)
            ),
        ),
        tokens,
    ),
    Family(
        "phi",
        _hf(
            "PhiForCausalLM",
            "PhiConfig",
            **{**_GROUPED, "num_key_value_heads": HEADS},
            resid_pdrop=_rate,
            embd_pdrop=_rate,
        ),
        tokens,
    ),
    Family(
        "mixtral",
        _hf(
            "MixtralForCausalLM",
            "MixtralConfig",
            **_EXPERTS,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        tokens,
    ),
    Family("deepseek-v3", _hf("DeepseekV3ForCausalLM", "DeepseekV3Config", **_V3), tokens),
    Family("bert", _hf("BertForMaskedLM", "BertConfig", **_ENCODER), tokens),
    Family(
        "albert", _hf("AlbertForMaskedLM", "AlbertConfig", **_ENCODER, embedding_size=24), tokens
    ),
    Family(
        "deberta-v2",
        _hf(
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            **_ENCODER,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
        ),
        tokens,
    ),
    Family(
        "xlnet",
        _hf(
            "XLNetLMHeadModel",
            "XLNetConfig",
            **_WORDS,
            d_model=HIDDEN,
            n_layer=_layers,
            n_head=HEADS,
            d_inner=INNER,
            dropout=_rate,
        ),
        tokens,
    ),
    Family(
        "t5",
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            **_WORDS,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=INNER,
            num_layers=_layers,
            num_decoder_layers=_layers,
            num_heads=HEADS,
            dropout_rate=_rate,
            decoder_start_token_id=2,
            use_cache=False,
        ),
        pairs,
    ),
    Family(
        "bart",
        _hf(
            "BartForConditionalGeneration", "BartConfig", **_BOTH, max_position_embeddings=POSITIONS
        ),
        pairs,
    ),
    Family(
        "vit",
        _hf(
            "ViTForImageClassification",
            "ViTConfig",
            **{key: _ENCODER[key] for key in _ENCODER if key not in _WORDS}
            | {"patch_size": 8}
            | _IMAGES,
        ),
        images,
    ),
    Family(
        "swin",
        _hf(
            "SwinForImageClassification",
            "SwinConfig",
            **_IMAGES,
            **_TOLD,
            patch_size=2,
            embed_dim=32,
            depths=lambda n, _: [n, n],
            num_heads=[4, 8],
            window_size=4,
            drop_path_rate=0.0,
            hidden_dropout_prob=_rate,
            attention_probs_dropout_prob=_rate,
        ),
        images,
    ),
    Family("clip", _clip, captioned_images),
    Family(
        "whisper",
        _hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_BOTH,
            num_mel_bins=16,
            max_source_positions=POSITIONS,
            max_target_positions=POSITIONS,
            begin_suppress_tokens=None,
        ),
        sounds,
    ),
    Family(
        "resnet",
        _hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            num_labels=CLASSES,
            **_TOLD,
            embedding_size=16,
            hidden_sizes=[32, 64],
            depths=lambda n, _: [n, n],
            layer_type="bottleneck",
        ),
        images,
        drops=False,
        transformer=False,
    ),
    Family(
        "mamba",
        _hf(
            "MambaForCausalLM",
            "MambaConfig",
            **_WORDS,
            hidden_size=HIDDEN,
            state_size=4,
            num_hidden_layers=_layers,
            use_cache=False,
        ),
        lambda: tokens(pad=False),
        drops=False,
        transformer=False,
    ),
    Family(
        "rwkv",
        _hf(
            "RwkvForCausalLM",
            "RwkvConfig",
            **_WORDS,
            hidden_size=HIDDEN,
            attention_hidden_size=HIDDEN,
            intermediate_size=INNER,
            context_length=POSITIONS,
            num_hidden_layers=_layers,
            use_cache=False,
        ),
        lambda: tokens(pad=False, length=5),
        drops=False,
        transformer=False,
    ),
    Family("torch-transformer", own.Translator, pairs),
    Family("lstm", partial(own.Recurrent, nn.LSTM), partial(tokens, False), transformer=False),
    Family("gru", partial(own.Recurrent, nn.GRU), partial(tokens, False), transformer=False),
    Family("mlp-mixer", own.Mixer, images, transformer=False),
    Family("u-net", own.UNet, masked_images, transformer=False),
    Family("graph-convolution", own.GraphConvolution, nodes, transformer=False),
)
FAMILIES = {family.name: family for family in _ALL}
TRANSFORMERS = tuple(family.name for family in _ALL if family.transformer)
