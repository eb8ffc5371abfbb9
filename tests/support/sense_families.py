"""Families of models for images, video, sound, several senses at once, time series and control."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from family_makers import Family, hugging_face
from text_families import BOTH, DECODER, ENCODER, GPT, STACK
from zoo_inputs import BATCH, IMAGE, POSITIONS, Inputs, images, masked_images, tokens
from zoo_layers import CLASSES, HEADS, HIDDEN, VOCABULARY

__all__ = ["FAMILIES"]

LAYERS = 2
PICTURE = {"image_size": IMAGE, "num_labels": CLASSES, "problem_type": "single_label_classification"}
PATCHES = {**STACK, "image_size": IMAGE, "patch_size": 8}
TEXT = {**ENCODER}


def random(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


def pixels() -> Inputs:
    """Return small pictures without labels."""
    return {"pixel_values": images()["pixel_values"]}


def classifier(name: str, prefix: str, kind: str = "images", **options: Any) -> Family:
    make = hugging_face(f"{prefix}ForImageClassification", f"{prefix}Config", **options, **PICTURE)
    return Family(name, "transformers", kind, make, images)


def scored(
    name: str, kind: str, model: str, config: str, inputs: Callable[[], Inputs], **options: Any
) -> Family:
    make = hugging_face(model, config, **options)
    return Family(name, "transformers", kind, make, inputs, scored=True)


def waves() -> Inputs:
    """Return sound waves and the characters that were said."""
    labels = torch.randint(3, 30, (BATCH, 5), generator=random())
    return {"input_values": numbers(BATCH, 400), "labels": labels}


def spectra() -> Inputs:
    return {"input_features": numbers(BATCH, 40, 16), "labels": tokens()["labels"]}


def seen_text() -> Inputs:
    """Return texts, each with its image."""
    words = tokens()
    return {
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
        **pixels(),
    }


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


def series(channels: int = 3, length: int = 32, ahead: int = 8) -> Inputs:
    """Return the past and the future of series of several channels."""
    return {
        "past_values": numbers(BATCH, length, channels),
        "future_values": numbers(BATCH, ahead, channels, seed=4),
    }


def lagged() -> Inputs:
    """Return the past and future of single series, with features of their times."""
    return {
        "past_values": numbers(BATCH, 15),
        "past_time_features": numbers(BATCH, 15, 2),
        "past_observed_mask": torch.ones(BATCH, 15, dtype=torch.float64),
        "future_values": numbers(BATCH, 6, seed=4),
        "future_time_features": numbers(BATCH, 6, 2, seed=5),
    }


def trajectories() -> Inputs:
    """Return states, actions and rewards."""
    return {
        "states": numbers(BATCH, 6, 5),
        "actions": numbers(BATCH, 6, 4, seed=4),
        "rewards": numbers(BATCH, 6, 1, seed=5),
        "returns_to_go": numbers(BATCH, 6, 1, seed=6),
        "timesteps": torch.arange(6).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, 6, dtype=torch.long),
    }


def film() -> Inputs:
    """Return films of four frames, each of one class."""
    labels = torch.randint(CLASSES, (BATCH,), generator=random())
    return {"pixel_values": numbers(BATCH, 4, 3, IMAGE, IMAGE), "labels": labels}


def points() -> Inputs:
    """Return pictures with a point on each that asks for a mask."""
    return {
        **pixels(),
        "input_points": torch.full((BATCH, 1, 1, 2), 9.0, dtype=torch.float64),
        "input_labels": torch.ones(BATCH, 1, 1, dtype=torch.long),
        "multimask_output": True,
    }


def small_resnet() -> Any:
    import transformers

    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def last_of_resnet() -> Any:
    config = small_resnet()
    config.out_features = ["stage4"]
    return config


def small_swin() -> Any:
    import transformers

    return transformers.SwinConfig(
        image_size=IMAGE, patch_size=2, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4],
        window_size=4, drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def sam_vision() -> Any:
    import transformers

    return transformers.SamVisionConfig(
        hidden_size=HIDDEN, output_channels=32, num_hidden_layers=2, num_attention_heads=HEADS,
        image_size=IMAGE, patch_size=8, window_size=3, global_attn_indexes=[1], num_pos_feats=16,
        mlp_dim=2 * HIDDEN,
    )


def sam_prompt() -> Any:
    import transformers

    return transformers.SamPromptEncoderConfig(
        hidden_size=32, image_size=IMAGE, patch_size=8, mask_input_channels=4
    )


def sam_decoder() -> Any:
    import transformers

    return transformers.SamMaskDecoderConfig(
        hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32
    )


def clip_vision() -> Any:
    import transformers

    return transformers.CLIPVisionConfig(**PATCHES)


def small_llama() -> Any:
    import transformers

    return transformers.LlamaConfig(**DECODER, num_key_value_heads=4)


TWO = {
    "vision_config": dict(PATCHES),
    "text_config": dict(TEXT),
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
SERIES = {"prediction_length": 6, "context_length": 12, "num_time_features": 2, "d_model": HIDDEN}
SERIES |= {"lags_sequence": [1, 2, 3]}

_IMAGES = (
    classifier("beit", "Beit", **STACK, patch_size=8, use_relative_position_bias=True),
    classifier("dinov2", "Dinov2", **{k: STACK[k] for k in STACK if k != "intermediate_size"},
               patch_size=8, use_swiglu_ffn=True),
    classifier("convnextv2", "ConvNextV2", patch_size=2, hidden_sizes=[16, 32, 32, 64],
               depths=[1, 2, 1, 1], kind="convolutions"),
    classifier("swinv2", "Swinv2", patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[4, 8],
               window_size=4),
    classifier("mobilenet-v2", "MobileNetV2", "convolutions", depth_multiplier=0.5,
               output_stride=8),
    classifier("efficientnet", "EfficientNet", "convolutions", width_coefficient=1.0,
               depth_coefficient=1.0, in_channels=[32, 16], out_channels=[16, 24],
               kernel_sizes=[3, 5], strides=[1, 2], num_block_repeats=[1, 2],
               expand_ratios=[1, 4], hidden_dim=1280, depthwise_padding=[]),
    classifier("regnet", "RegNet", "convolutions", embedding_size=16, hidden_sizes=[32, 64],
               depths=[1, 2], groups_width=8),
    classifier("levit", "Levit", "convolutions and attention", hidden_sizes=[32, 64, 64],
               num_attention_heads=[2, 4, 4], depths=[1, 1, 1], key_dim=[8, 8, 8], patch_size=16,
               down_ops=[["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 8, 4, 2, 2]])
    ,
    classifier("poolformer", "PoolFormer", "pooling", depths=[1, 2], hidden_sizes=[32, 64],
               patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1], num_encoder_blocks=2),
    classifier("focalnet", "FocalNet", "focal modulation", patch_size=4, embed_dim=32,
               hidden_sizes=[32, 64], depths=[1, 2], focal_levels=[2, 2], focal_windows=[3, 3]),
    classifier("pvt", "Pvt", depths=[1, 1, 1, 1], sequence_reduction_ratios=[4, 2, 1, 1],
               hidden_sizes=[16, 32, 32, 64], patch_sizes=[4, 2, 2, 2], strides=[4, 2, 2, 2],
               num_attention_heads=[1, 2, 4, 8], mlp_ratios=[4, 4, 4, 4]),
    classifier("cvt", "Cvt", "convolutions and attention", patch_sizes=[7, 3],
               patch_stride=[4, 2], patch_padding=[2, 1], embed_dim=[32, 64], num_heads=[2, 8],
               depth=[1, 2], mlp_ratio=[4.0, 4.0], attention_drop_rate=[0.0, 0.0],
               drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0], qkv_bias=[True, True],
               cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"],
               kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1],
               stride_q=[1, 1]),
    classifier("mobilevit", "MobileViT", "convolutions and attention", hidden_sizes=[32, 48, 64],
               neck_hidden_sizes=[8, 16, 16, 24, 32, 32, 64], output_stride=32),
    Family("hiera", "transformers", "images",
           hugging_face("HieraForImageClassification", "HieraConfig", embed_dim=32,
                        image_size=[IMAGE, IMAGE], patch_size=[3, 3], patch_stride=[2, 2],
                        patch_padding=[1, 1], depths=[1, 1], num_heads=[2, 4], num_query_pool=1,
                        masked_unit_size=[4, 4], masked_unit_attention=[True, False],
                        num_labels=CLASSES, problem_type="single_label_classification"), images),
    scored("vit-mae", "masked images", "ViTMAEForPreTraining", "ViTMAEConfig",
           lambda: {**pixels(), "noise": numbers(BATCH, 16)}, **PATCHES,
           decoder_num_attention_heads=4, decoder_hidden_size=32, decoder_num_hidden_layers=1,
           decoder_intermediate_size=64),
    Family("segformer", "transformers", "segmentation",
           hugging_face("SegformerForSemanticSegmentation", "SegformerConfig",
                        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 2],
                        hidden_sizes=[32, 64], patch_sizes=[7, 3], strides=[4, 2],
                        num_attention_heads=[2, 8], mlp_ratios=[4, 4], decoder_hidden_size=32,
                        num_labels=CLASSES), masked_images),
    Family("upernet", "transformers", "segmentation",
           hugging_face("UperNetForSemanticSegmentation", "UperNetConfig",
                        backbone_config=small_swin, hidden_size=32, auxiliary_in_channels=64,
                        auxiliary_channels=16, num_labels=CLASSES), masked_images),
    scored("mask2former", "segmentation", "Mask2FormerModel",
           "Mask2FormerConfig", pixels, backbone_config=small_swin, feature_size=32,
           mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64, encoder_layers=1,
           decoder_layers=2, num_attention_heads=4, dim_feedforward=64, num_queries=5),
    scored("sam", "segmentation by prompt", "SamModel", "SamConfig", points,
           vision_config=sam_vision, prompt_encoder_config=sam_prompt,
           mask_decoder_config=sam_decoder),
    scored("dpt", "depth", "DPTForDepthEstimation", "DPTConfig", pixels,
           **{**PATCHES, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 32, 32],
           fusion_hidden_size=16, use_auxiliary_head=False),
    scored("detr", "detection", "DetrForObjectDetection", "DetrConfig", pixels,
           backbone_config=last_of_resnet, num_queries=6, encoder_layers=1, decoder_layers=2,
           encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
           decoder_attention_heads=4, d_model=32),
    scored("deformable-detr", "detection", "DeformableDetrForObjectDetection",
           "DeformableDetrConfig", pixels, backbone_config=small_resnet, num_queries=6,
           encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
           encoder_attention_heads=4, decoder_attention_heads=4, d_model=32,
           num_feature_levels=3, disable_custom_kernels=True),
    scored("rt-detr", "detection", "RTDetrForObjectDetection", "RTDetrConfig", pixels,
           backbone_config=small_resnet, encoder_hidden_dim=32, encoder_in_channels=[16, 32, 32],
           encoder_ffn_dim=64, encoder_attention_heads=4, d_model=32, num_queries=6,
           decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_layers=2,
           decoder_attention_heads=4, num_denoising=0),
    scored("yolos", "detection", "YolosForObjectDetection", "YolosConfig", pixels,
           **{**PATCHES, "image_size": [IMAGE, IMAGE]}, num_detection_tokens=5),
    Family("videomae", "transformers", "video",
           hugging_face("VideoMAEForVideoClassification", "VideoMAEConfig", **PATCHES,
                        num_frames=4, num_labels=CLASSES,
                        problem_type="single_label_classification"), film),
    Family("timesformer", "transformers", "video",
           hugging_face("TimesformerForVideoClassification", "TimesformerConfig", **PATCHES,
                        num_frames=4, num_labels=CLASSES,
                        problem_type="single_label_classification"), film),
)
_SOUNDS = (
    Family("wav2vec2", "transformers", "speech",
           hugging_face("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES), waves, drops=True),
    Family("wavlm", "transformers", "speech",
           hugging_face("WavLMForCTC", "WavLMConfig", **WAVES), waves),
    Family("sew-d", "transformers", "speech",
           hugging_face("SEWDForCTC", "SEWDConfig", **WAVES, position_buckets=8), waves),
    Family("wav2vec2-conformer", "transformers", "speech, conformer",
           hugging_face("Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", **WAVES,
                        conv_depthwise_kernel_size=7), waves),
    Family("ast", "transformers", "sound",
           hugging_face("ASTForAudioClassification", "ASTConfig", **STACK, patch_size=8,
                        frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16,
                        num_labels=CLASSES, problem_type="single_label_classification"),
           lambda: {"input_values": numbers(BATCH, 32, 16), "labels": images()["labels"]}),
    Family("speech-to-text", "transformers", "speech",
           hugging_face("Speech2TextForConditionalGeneration", "Speech2TextConfig", **BOTH,
                        input_feat_per_channel=16, conv_channels=32, num_conv_layers=2,
                        max_source_positions=POSITIONS, max_target_positions=POSITIONS), spectra),
    Family("moonshine", "transformers", "speech",
           hugging_face("MoonshineForConditionalGeneration", "MoonshineConfig",
                        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=128,
                        encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
                        encoder_num_attention_heads=8, decoder_num_attention_heads=8,
                        max_position_embeddings=64, use_cache=False, pad_token_id=2,
                        decoder_start_token_id=1),
           lambda: {"input_values": numbers(BATCH, 2000), "labels": tokens()["labels"]}),
    scored("encodec", "sound codec", "EncodecModel", "EncodecConfig",
           lambda: {"input_values": numbers(BATCH, 1, 64)}, num_filters=8, hidden_size=32,
           upsampling_ratios=[4, 2], num_lstm_layers=1, codebook_size=16, codebook_dim=32,
           sampling_rate=64, target_bandwidths=[0.032]),
    scored("univnet", "vocoder", "UnivNetModel", "UnivNetConfig",
           lambda: {"input_features": numbers(BATCH, 8, 6), "noise_sequence":
                    numbers(BATCH, 8, 8, seed=4)},
           model_in_channels=8, model_hidden_channels=8, num_mel_bins=6,
           resblock_kernel_sizes=[3], resblock_stride_sizes=[2],
           resblock_dilation_sizes=[[1, 3]], kernel_predictor_num_blocks=1,
           kernel_predictor_hidden_channels=8),
    scored("clap-audio", "sound", "ClapAudioModel", "ClapAudioConfig",
           lambda: {"input_features": numbers(BATCH, 1, 64, 16), "is_longer":
                    torch.zeros(BATCH, 1, dtype=torch.bool)},
           window_size=4, num_mel_bins=16, spec_size=32, patch_size=4, patch_stride=[4, 4],
           patch_embeds_hidden_size=32, depths=[1, 1], num_attention_heads=[2, 4],
           hidden_size=64, enable_fusion=False),
)
_SENSES = (
    Family("siglip", "transformers", "images and text",
           hugging_face("SiglipModel", "SiglipConfig", **TWO),
           lambda: {**seen_text(), "return_loss": True}),
    Family("blip", "transformers", "images and text",
           hugging_face("BlipForConditionalGeneration", "BlipConfig",
                        vision_config=dict(PATCHES),
                        text_config={**TEXT, "encoder_hidden_size": HIDDEN, "sep_token_id": 1,
                                     "is_decoder": True}, projection_dim=32),
           lambda: {**tokens(), **pixels()}),
    scored("vilt", "images and text", "ViltModel", "ViltConfig",
           lambda: {**seen_text(), "token_type_ids": torch.zeros(BATCH, 11, dtype=torch.long)},
           **TEXT, image_size=IMAGE, patch_size=8, max_image_length=-1),
    Family("git", "transformers", "images and text",
           hugging_face("GitForCausalLM", "GitConfig", **DECODER, vision_config=dict(PATCHES)),
           lambda: {**tokens(), **pixels()}),
    Family("llava", "transformers", "images and text",
           hugging_face("LlavaForConditionalGeneration", "LlavaConfig", vision_config=clip_vision,
                        text_config=small_llama, image_token_index=VOCABULARY - 1,
                        image_seq_length=16), image_in_text),
    Family("layoutlmv3", "transformers", "documents",
           hugging_face("LayoutLMv3ForTokenClassification", "LayoutLMv3Config", **TEXT,
                        coordinate_size=12, shape_size=8, rel_pos_bins=8, rel_2d_pos_bins=8,
                        input_size=IMAGE, patch_size=8, num_labels=CLASSES), pages),
    scored("lxmert", "images and text", "LxmertModel", "LxmertConfig", regions,
           vocab_size=VOCABULARY, hidden_size=HIDDEN, num_attention_heads=HEADS,
           intermediate_size=128, max_position_embeddings=POSITIONS, l_layers=1, x_layers=1,
           r_layers=1, visual_feat_dim=24),
)
_SERIES = (
    Family("time-series-transformer", "transformers", "time series",
           hugging_face("TimeSeriesTransformerForPrediction", "TimeSeriesTransformerConfig",
                        **SERIES), lagged),
    Family("informer", "transformers", "time series",
           hugging_face("InformerForPrediction", "InformerConfig", **SERIES), lagged),
    Family("autoformer", "transformers", "time series",
           hugging_face("AutoformerForPrediction", "AutoformerConfig", **SERIES, label_length=4,
                        moving_average=5), lagged),
    Family("patchtst", "transformers", "time series",
           hugging_face("PatchTSTForPrediction", "PatchTSTConfig", num_input_channels=3,
                        context_length=32, patch_length=4, patch_stride=4, num_hidden_layers=2,
                        d_model=HIDDEN, num_attention_heads=HEADS, ffn_dim=128,
                        prediction_length=8), series),
    Family("patchtsmixer", "transformers", "time series, mixer",
           hugging_face("PatchTSMixerForPrediction", "PatchTSMixerConfig", context_length=32,
                        patch_length=8, patch_stride=8, num_input_channels=3, d_model=32,
                        num_layers=2, prediction_length=8, mode="mix_channel"), series),
    scored("decision-transformer", "control", "DecisionTransformerModel",
           "DecisionTransformerConfig", trajectories, **{**GPT, "n_embd": 24}, hidden_size=HIDDEN,
           state_dim=5, act_dim=4, max_ep_len=8),
)
FAMILIES = (*_IMAGES, *_SOUNDS, *_SENSES, *_SERIES)
