"""Families of transformers that are made of a few words each: a name, a class, and options.

They have four layers: from three equal layers on, some are not traced but copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from family_makers import Family, hugging_face
from family_options import BOTH, ENCODER, EXPERTS, GROUPED, PATCHES, T5
from sense_families import WAVES, image_in_text, waves
from zoo_inputs import BATCH, IMAGE, Inputs, images, pairs, tokens
from zoo_layers import CLASSES, HEADS, HIDDEN, VOCABULARY

__all__ = ["FAMILIES"]

LAYERS = 4
DEEP = {"num_hidden_layers": LAYERS}
DEEP_BOTH = {**BOTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
DEEP_T5 = {**T5, "num_layers": LAYERS, "num_decoder_layers": LAYERS}
SHAPES = {**PATCHES, **DEEP, "num_labels": CLASSES, "problem_type": "single_label_classification"}
STAGES = {"num_labels": CLASSES, "problem_type": "single_label_classification"}
PYRAMID = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 2, 1], **STAGES}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
ROUTED |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
# They draw which experts a token has.
DRAWING = {"phimoe"}

Options = dict[str, Any]


def listed(
    kind: str,
    suffix: str,
    options: Options,
    inputs: Callable[[], Inputs],
    names: str,
    **more: Options,
) -> Iterator[Family]:
    """Yield the families of {Prefix}{suffix} with {Prefix}Config.

    names: "name:Prefix", one after the other. more: further options of some of them, by the name
    with underscores; one that is None is left out.
    """
    for name, prefix in (item.split(":") for item in names.split()):
        own = {**options, **more.get(name.replace("-", "_").replace(".", "_"), {})}
        own = {key: value for key, value in own.items() if value is not None}
        made = hugging_face(prefix + suffix, f"{prefix}Config", **own)
        yield Family(name, "transformers", kind, made, inputs, random=name in DRAWING)


def patches() -> Inputs:
    """Return texts with the patches of their images one below the other."""
    made = image_in_text()
    rows = made.pop("pixel_values").reshape(BATCH * 64, -1)
    kinds = (made["input_ids"] == VOCABULARY - 1).int()
    grid = torch.tensor([[1, 8, 8]] * BATCH)
    grown = torch.cat([rows, rows], 1)
    return {**made, "pixel_values": grown, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def codes() -> Inputs:
    """Return four codebooks of a sound."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (BATCH * 4, 9), generator=generator)
    return {"input_ids": ids, "labels": ids.reshape(BATCH, 4, 9).transpose(1, 2)}


_DECODERS = listed(
    "decoder",
    "ForCausalLM",
    {**GROUPED, **DEEP},
    tokens,
    "gemma:Gemma olmo:Olmo granite:Granite starcoder2:Starcoder2 cohere2:Cohere2 qwen2:Qwen2 "
    "persimmon:Persimmon smollm3:SmolLM3 arcee:Arcee apertus:Apertus seed-oss:SeedOss glm:Glm "
    "helium:Helium exaone4:Exaone4 ernie4.5:Ernie4_5 olmo3:Olmo3 ministral:Ministral "
    "bitnet:BitNet nanochat:NanoChat vaultgemma:VaultGemma hunyuan:HunYuanDenseV1 "
    "bart-decoder:Bart",
    gemma={"head_dim": 8},
    glm={"head_dim": 8},
    helium={"head_dim": 8},
    seed_oss={"head_dim": 8},
    hunyuan={"head_dim": 8},
    vaultgemma={"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    cohere2={"sliding_window": 4, "head_dim": 8},
    exaone4={"sliding_window": 4},
    olmo3={"sliding_window": 4},
    ministral={"sliding_window": 4, "head_dim": 8},
    bart_decoder={
        **{key: value for key, value in DEEP_BOTH.items() if "start" not in key},
        **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads")),
        **dict.fromkeys(("intermediate_size", "num_key_value_heads")),
    },
)
_EXPERTS = listed(
    "experts",
    "ForCausalLM",
    {**EXPERTS, **DEEP, "intermediate_size": HIDDEN},
    tokens,
    "qwen3-moe:Qwen3Moe olmoe:Olmoe phimoe:Phimoe dots1:Dots1 flex-olmo:FlexOlmo "
    "minimax-m2:MiniMaxM2 glm4-moe:Glm4Moe ernie4.5-moe:Ernie4_5_Moe",
    qwen3_moe=MOE,
    olmoe={"num_experts": 8},
    flex_olmo={"num_experts": 8},
    dots1=ROUTED,
    glm4_moe=ROUTED,
    minimax_m2={"head_dim": 8, "rotary_dim": 4},
    ernie4_5_moe={"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": HIDDEN},
)
_ENCODERS = listed(
    "encoder",
    "ForMaskedLM",
    {**ENCODER, **DEEP},
    tokens,
    "roberta:Roberta camembert:Camembert xlm-roberta:XLMRoberta rembert:RemBert ernie:Ernie "
    "megatron-bert:MegatronBert data2vec-text:Data2VecText xlm-roberta-xl:XLMRobertaXL "
    "roberta-prelayernorm:RobertaPreLayerNorm yoso:Yoso mra:Mra eurobert:EuroBert "
    "nomic-bert:NomicBert big-bird:BigBird",
    rembert={"input_embedding_size": 32, "output_embedding_size": 32},
    big_bird={"attention_type": "original_full"},
)
_SPARSE = listed(
    "encoder",
    "ForMaskedLM",
    {**ENCODER, **DEEP, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
    partial(tokens, True, 24),
    "big-bird-sparse:BigBird",
)
_BOTH = listed(
    "encoder and decoder",
    "ForConditionalGeneration",
    DEEP_BOTH,
    pairs,
    "mbart:MBart plbart:PLBart mvp:Mvp pegasus:Pegasus blenderbot:Blenderbot "
    "blenderbot-small:BlenderbotSmall nllb-moe:NllbMoe",
    nllb_moe={"num_experts": 4, "expert_capacity": 8, "encoder_sparse_step": 2},
)
_T5 = listed("encoder and decoder", "ForConditionalGeneration", DEEP_T5, pairs, "mt5:MT5 umt5:UMT5")
_IMAGES = listed(
    "images",
    "ForImageClassification",
    SHAPES,
    images,
    "deit:DeiT vit-msn:ViTMSN ijepa:IJepa dinov2-registers:Dinov2WithRegisters",
)
_CONVOLUTIONS = listed(
    "convolutions",
    "ForImageClassification",
    PYRAMID,
    images,
    "resnet-basic:ResNet bit:Bit convnext:ConvNext mobilenet-v1:MobileNetV1",
    resnet_basic={"layer_type": "basic"},
    bit={"num_groups": 2},
    convnext={"num_stages": 4, "embedding_size": None},
    mobilenet_v1={"image_size": IMAGE, "depth_multiplier": 0.25, "min_depth": 8, **STAGES},
)
_SPEECH = listed(
    "speech",
    "ForCTC",
    {**WAVES, **DEEP},
    waves,
    "hubert:Hubert unispeech:UniSpeech unispeech-sat:UniSpeechSat sew:SEW "
    "data2vec-audio:Data2VecAudio",
    sew={"squeeze_factor": 2},
)


def vision(prefix: str, **options: Any) -> Callable[[], Any]:
    """Return a maker of {prefix}Config, which others hold."""

    def make() -> Any:
        import transformers

        return getattr(transformers, f"{prefix}Config")(**options)

    return make


_TEXT = {**GROUPED, **DEEP}
_SEEN: tuple[tuple[str, str, str, Callable[[], Inputs], Options], ...] = (
    (
        "vipllava",
        "VipLlavaForConditionalGeneration",
        "VipLlavaConfig",
        image_in_text,
        {
            "vision_config": vision("CLIPVision", **PATCHES),
            "text_config": vision("Llama", **_TEXT),
            "image_token_index": VOCABULARY - 1,
            "vision_feature_layers": [-2, -1],
        },
    ),
    (
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        lambda: {**image_in_text(), "token_type_ids": torch.ones(BATCH, 24, dtype=torch.long)},
        {
            "vision_config": vision("SiglipVision", **PATCHES),
            "text_config": vision("Gemma", **_TEXT, head_dim=8),
            "image_token_index": VOCABULARY - 1,
            "projection_dim": HIDDEN,
        },
    ),
    (
        "internvl",
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        image_in_text,
        {
            "vision_config": vision(
                "InternVLVision", **{**PATCHES, "image_size": [IMAGE, IMAGE], "patch_size": [4, 4]}
            ),
            "text_config": vision("Qwen2", **_TEXT),
            "image_token_id": VOCABULARY - 1,
        },
    ),
    (
        "qwen2-vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        patches,
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": HIDDEN,
                "hidden_size": HIDDEN,
                "num_heads": HEADS,
                "patch_size": 4,
                "spatial_merge_size": 2,
            },
            "text_config": {
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            "image_token_id": VOCABULARY - 1,
        },
    ),
    (
        "gemma3n",
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        tokens,
        {
            **_TEXT,
            "intermediate_size": 128,
            "head_dim": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "num_kv_shared_layers": 0,
            "sliding_window": 4,
            "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    (
        "musicgen",
        "MusicgenForCausalLM",
        "MusicgenDecoderConfig",
        codes,
        {
            "vocab_size": 64,
            "num_codebooks": 4,
            "hidden_size": HIDDEN,
            "ffn_dim": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "layerdrop": 0.3,
            "pad_token_id": 63,
            "bos_token_id": 63,
            "use_cache": False,
        },
    ),
)
_VIEWS = (
    Family(name, "transformers", "images and text", hugging_face(model, config, **options), inputs)
    for name, model, config, inputs, options in _SEEN
)
FAMILIES = (
    *_DECODERS,
    *_EXPERTS,
    *_ENCODERS,
    *_SPARSE,
    *_BOTH,
    *_T5,
    *_IMAGES,
    *_CONVOLUTIONS,
    *_SPEECH,
    *_VIEWS,
)
