"""Families of models that say what is in an image or a film."""

from __future__ import annotations

from typing import Any

import torch
from family_inputs import numbers, pixels, random
from family_makers import Family, hugging_face, scored
from family_options import PATCHES, PICTURE, STACK
from zoo_inputs import BATCH, IMAGE, Inputs, images
from zoo_layers import CLASSES

__all__ = ["FAMILIES"]


def film() -> Inputs:
    """Return films of four frames, each of one class."""
    labels = torch.randint(CLASSES, (BATCH,), generator=random())
    return {"pixel_values": numbers(BATCH, 4, 3, IMAGE, IMAGE), "labels": labels}


def classifier(name: str, prefix: str, kind: str = "images", **options: Any) -> Family:
    make = hugging_face(f"{prefix}ForImageClassification", f"{prefix}Config", **options, **PICTURE)
    return Family(name, "transformers", kind, make, images)


FAMILIES = (
    classifier("beit", "Beit", **STACK, patch_size=8, use_relative_position_bias=True),
    classifier(
        "dinov2",
        "Dinov2",
        **{k: STACK[k] for k in STACK if k != "intermediate_size"},
        patch_size=8,
        use_swiglu_ffn=True,
    ),
    classifier(
        "convnextv2",
        "ConvNextV2",
        patch_size=2,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 2, 1, 1],
        kind="convolutions",
    ),
    classifier(
        "swinv2",
        "Swinv2",
        patch_size=2,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[4, 8],
        window_size=4,
    ),
    classifier(
        "mobilenet-v2", "MobileNetV2", "convolutions", depth_multiplier=0.5, output_stride=8
    ),
    classifier(
        "efficientnet",
        "EfficientNet",
        "convolutions",
        width_coefficient=1.0,
        depth_coefficient=1.0,
        in_channels=[32, 16],
        out_channels=[16, 24],
        kernel_sizes=[3, 5],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 4],
        hidden_dim=1280,
        depthwise_padding=[],
    ),
    classifier(
        "regnet",
        "RegNet",
        "convolutions",
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 2],
        groups_width=8,
    ),
    classifier(
        "levit",
        "Levit",
        "convolutions and attention",
        hidden_sizes=[32, 64, 64],
        num_attention_heads=[2, 4, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        patch_size=16,
        down_ops=[["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 8, 4, 2, 2]],
    ),
    classifier(
        "poolformer",
        "PoolFormer",
        "pooling",
        depths=[1, 2],
        hidden_sizes=[32, 64],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        num_encoder_blocks=2,
    ),
    classifier(
        "focalnet",
        "FocalNet",
        "focal modulation",
        patch_size=4,
        embed_dim=32,
        hidden_sizes=[32, 64],
        depths=[1, 2],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    classifier(
        "pvt",
        "Pvt",
        depths=[1, 1, 1, 1],
        sequence_reduction_ratios=[4, 2, 1, 1],
        hidden_sizes=[16, 32, 32, 64],
        patch_sizes=[4, 2, 2, 2],
        strides=[4, 2, 2, 2],
        num_attention_heads=[1, 2, 4, 8],
        mlp_ratios=[4, 4, 4, 4],
    ),
    classifier(
        "cvt",
        "Cvt",
        "convolutions and attention",
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[32, 64],
        num_heads=[2, 8],
        depth=[1, 2],
        mlp_ratio=[4.0, 4.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    ),
    classifier(
        "mobilevit",
        "MobileViT",
        "convolutions and attention",
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[8, 16, 16, 24, 32, 32, 64],
        output_stride=8,
    ),
    Family(
        "hiera",
        "transformers",
        "images",
        hugging_face(
            "HieraForImageClassification",
            "HieraConfig",
            embed_dim=32,
            image_size=[IMAGE, IMAGE],
            patch_size=[3, 3],
            patch_stride=[2, 2],
            patch_padding=[1, 1],
            depths=[1, 1],
            num_heads=[2, 4],
            num_query_pool=1,
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, False],
            num_labels=CLASSES,
            problem_type="single_label_classification",
        ),
        images,
    ),
    scored(
        "vit-mae",
        "masked images",
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        lambda: {**pixels(), "noise": numbers(BATCH, 16)},
        **PATCHES,
        decoder_num_attention_heads=4,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=64,
    ),
    Family(
        "videomae",
        "transformers",
        "video",
        hugging_face(
            "VideoMAEForVideoClassification",
            "VideoMAEConfig",
            **PATCHES,
            num_frames=4,
            num_labels=CLASSES,
            problem_type="single_label_classification",
        ),
        film,
    ),
    Family(
        "timesformer",
        "transformers",
        "video",
        hugging_face(
            "TimesformerForVideoClassification",
            "TimesformerConfig",
            **PATCHES,
            num_frames=4,
            num_labels=CLASSES,
            problem_type="single_label_classification",
        ),
        film,
    ),
)
