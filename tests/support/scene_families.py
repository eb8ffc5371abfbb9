"""Families of models for segmentation, depth and detection."""

from __future__ import annotations

from typing import Any

import torch
from family_inputs import pixels
from family_makers import Family, hugging_face, scored
from family_options import PATCHES
from zoo_inputs import BATCH, IMAGE, Inputs, masked_images
from zoo_layers import CLASSES, HEADS, HIDDEN

__all__ = ["FAMILIES"]


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
        image_size=IMAGE,
        patch_size=2,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 4, 4],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def sam_vision() -> Any:
    import transformers

    return transformers.SamVisionConfig(
        hidden_size=HIDDEN,
        output_channels=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=IMAGE,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        num_pos_feats=16,
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


FAMILIES = (
    Family(
        "segformer",
        "transformers",
        "segmentation",
        hugging_face(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[4, 2],
            hidden_sizes=[32, 64],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 8],
            mlp_ratios=[4, 4],
            decoder_hidden_size=32,
            num_labels=CLASSES,
        ),
        masked_images,
    ),
    Family(
        "upernet",
        "transformers",
        "segmentation",
        hugging_face(
            "UperNetForSemanticSegmentation",
            "UperNetConfig",
            backbone_config=small_swin,
            hidden_size=32,
            auxiliary_in_channels=64,
            auxiliary_channels=16,
            num_labels=CLASSES,
        ),
        masked_images,
    ),
    scored(
        "mask2former",
        "segmentation",
        "Mask2FormerModel",
        "Mask2FormerConfig",
        pixels,
        backbone_config=small_swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=64,
        num_queries=5,
    ),
    scored(
        "sam",
        "segmentation by prompt",
        "SamModel",
        "SamConfig",
        points,
        vision_config=sam_vision,
        prompt_encoder_config=sam_prompt,
        mask_decoder_config=sam_decoder,
    ),
    scored(
        "dpt",
        "depth",
        "DPTForDepthEstimation",
        "DPTConfig",
        pixels,
        **{**PATCHES, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        use_auxiliary_head=False,
    ),
    scored(
        "detr",
        "detection",
        "DetrForObjectDetection",
        "DetrConfig",
        pixels,
        backbone_config=last_of_resnet,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        d_model=32,
    ),
    scored(
        "deformable-detr",
        "detection",
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        pixels,
        backbone_config=small_resnet,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        d_model=32,
        num_feature_levels=3,
        disable_custom_kernels=True,
    ),
    scored(
        "rt-detr",
        "detection",
        "RTDetrForObjectDetection",
        "RTDetrConfig",
        pixels,
        backbone_config=small_resnet,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 32, 32],
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        d_model=32,
        num_queries=6,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_denoising=0,
    ),
    scored(
        "yolos",
        "detection",
        "YolosForObjectDetection",
        "YolosConfig",
        pixels,
        **{**PATCHES, "image_size": [IMAGE, IMAGE]},
        num_detection_tokens=5,
    ),
)
