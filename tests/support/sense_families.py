"""Families of models for sound, and for several senses at once."""

from __future__ import annotations

from typing import Any

import torch
from family_inputs import numbers, pixels, random, seen_text
from family_makers import Family, hugging_face, scored
from family_options import BOTH, DECODER, ENCODER, PATCHES, STACK
from zoo_inputs import BATCH, IMAGE, POSITIONS, Inputs, images, tokens
from zoo_layers import CLASSES, HEADS, HIDDEN, VOCABULARY

__all__ = ["FAMILIES"]

TWO = {
    "vision_config": dict(PATCHES),
    "text_config": dict(ENCODER),
}
WAVES = {
    **STACK,
    "vocab_size": 32,
    "conv_dim": [16, 32],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "pad_token_id": 0,
}


def waves() -> Inputs:
    """Return sound waves and the characters that were said."""
    labels = torch.randint(3, 30, (BATCH, 5), generator=random())
    return {"input_values": numbers(BATCH, 400), "labels": labels}


def spectra() -> Inputs:
    return {"input_features": numbers(BATCH, 40, 16), "labels": tokens()["labels"]}


def image_in_text() -> Inputs:
    """Return texts in which sixteen tokens stand for the patches of an image."""
    words = tokens(False, 24)
    words["input_ids"][:, 2:18] = VOCABULARY - 1
    return {**words, **pixels()}


def pages() -> Inputs:
    """Return words with their boxes on a page, and the page."""
    words = tokens()
    corners = torch.randint(0, 500, (BATCH, 11, 2), generator=random())
    labels = words["labels"].remainder(CLASSES)
    return {
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
        "bbox": torch.cat([corners, corners + 100], -1),
        "labels": labels,
        **pixels(),
    }


def regions() -> Inputs:
    """Return questions and regions of images."""
    words = tokens()
    boxes = torch.rand(BATCH, 6, 4, generator=random(), dtype=torch.float64)
    return {
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
        "visual_feats": numbers(BATCH, 6, 24),
        "visual_pos": boxes,
    }


def clip_vision() -> Any:
    import transformers

    return transformers.CLIPVisionConfig(**PATCHES)


def small_llama() -> Any:
    import transformers

    return transformers.LlamaConfig(**DECODER, num_key_value_heads=4)


_SOUNDS = (
    Family(
        "wav2vec2",
        "transformers",
        "speech",
        hugging_face("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES),
        waves,
    ),
    Family(
        "wavlm",
        "transformers",
        "speech",
        hugging_face("WavLMForCTC", "WavLMConfig", **WAVES),
        waves,
    ),
    Family(
        "sew-d",
        "transformers",
        "speech",
        hugging_face("SEWDForCTC", "SEWDConfig", **WAVES, position_buckets=8),
        waves,
    ),
    Family(
        "wav2vec2-conformer",
        "transformers",
        "speech, conformer",
        hugging_face(
            "Wav2Vec2ConformerForCTC",
            "Wav2Vec2ConformerConfig",
            **WAVES,
            conv_depthwise_kernel_size=7,
        ),
        waves,
    ),
    Family(
        "ast",
        "transformers",
        "sound",
        hugging_face(
            "ASTForAudioClassification",
            "ASTConfig",
            **STACK,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=32,
            num_mel_bins=16,
            num_labels=CLASSES,
            problem_type="single_label_classification",
        ),
        lambda: {"input_values": numbers(BATCH, 32, 16), "labels": images()["labels"]},
    ),
    Family(
        "speech-to-text",
        "transformers",
        "speech",
        hugging_face(
            "Speech2TextForConditionalGeneration",
            "Speech2TextConfig",
            **BOTH,
            input_feat_per_channel=16,
            conv_channels=32,
            num_conv_layers=2,
            max_source_positions=POSITIONS,
            max_target_positions=POSITIONS,
        ),
        spectra,
    ),
    Family(
        "moonshine",
        "transformers",
        "speech",
        hugging_face(
            "MoonshineForConditionalGeneration",
            "MoonshineConfig",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=128,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=8,
            decoder_num_attention_heads=8,
            max_position_embeddings=64,
            use_cache=False,
            pad_token_id=2,
            decoder_start_token_id=1,
        ),
        lambda: {"input_values": numbers(BATCH, 2000), "labels": tokens()["labels"]},
    ),
    scored(
        "encodec",
        "sound codec",
        "EncodecModel",
        "EncodecConfig",
        lambda: {"input_values": numbers(BATCH, 1, 64)},
        num_filters=8,
        hidden_size=32,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        codebook_size=16,
        codebook_dim=32,
        sampling_rate=64,
        target_bandwidths=[0.032],
    ),
    scored(
        "univnet",
        "vocoder",
        "UnivNetModel",
        "UnivNetConfig",
        lambda: {
            "input_features": numbers(BATCH, 8, 6),
            "noise_sequence": numbers(BATCH, 8, 8, seed=4),
        },
        model_in_channels=8,
        model_hidden_channels=8,
        num_mel_bins=6,
        resblock_kernel_sizes=[3],
        resblock_stride_sizes=[2],
        resblock_dilation_sizes=[[1, 3]],
        kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=8,
    ),
    scored(
        "clap-audio",
        "sound",
        "ClapAudioModel",
        "ClapAudioConfig",
        lambda: {
            "input_features": numbers(BATCH, 1, 64, 16),
            "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
        },
        window_size=4,
        num_mel_bins=16,
        spec_size=32,
        patch_size=4,
        patch_stride=[4, 4],
        patch_embeds_hidden_size=32,
        depths=[1, 1],
        num_attention_heads=[2, 4],
        hidden_size=64,
        enable_fusion=False,
    ),
)
_SENSES = (
    Family(
        "siglip",
        "transformers",
        "images and text",
        hugging_face("SiglipModel", "SiglipConfig", **TWO),
        lambda: {**seen_text(), "return_loss": True},
    ),
    Family(
        "blip",
        "transformers",
        "images and text",
        hugging_face(
            "BlipForConditionalGeneration",
            "BlipConfig",
            vision_config=dict(PATCHES),
            text_config={
                **ENCODER,
                "encoder_hidden_size": HIDDEN,
                "sep_token_id": 1,
                "is_decoder": True,
            },
            projection_dim=32,
        ),
        lambda: {**tokens(), **pixels()},
    ),
    Family(
        "vilt",
        "transformers",
        "images and text",
        hugging_face(
            "ViltModel",
            "ViltConfig",
            **ENCODER,
            image_size=IMAGE,
            patch_size=8,
            max_image_length=-1,
        ),
        lambda: {**seen_text(), "token_type_ids": torch.zeros(BATCH, 11, dtype=torch.long)},
        scored=True,
        random=True,  # it shuffles the patches
    ),
    Family(
        "git",
        "transformers",
        "images and text",
        hugging_face("GitForCausalLM", "GitConfig", **DECODER, vision_config=dict(PATCHES)),
        lambda: {**tokens(), **pixels()},
    ),
    Family(
        "llava",
        "transformers",
        "images and text",
        hugging_face(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            vision_config=clip_vision,
            text_config=small_llama,
            image_token_index=VOCABULARY - 1,
            image_seq_length=16,
        ),
        image_in_text,
    ),
    Family(
        "layoutlmv3",
        "transformers",
        "documents",
        hugging_face(
            "LayoutLMv3ForTokenClassification",
            "LayoutLMv3Config",
            **ENCODER,
            coordinate_size=12,
            shape_size=8,
            rel_pos_bins=8,
            rel_2d_pos_bins=8,
            input_size=IMAGE,
            patch_size=8,
            num_labels=CLASSES,
        ),
        pages,
    ),
    scored(
        "lxmert",
        "images and text",
        "LxmertModel",
        "LxmertConfig",
        regions,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        intermediate_size=128,
        max_position_embeddings=POSITIONS,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=24,
    ),
)
FAMILIES = (*_SOUNDS, *_SENSES)
