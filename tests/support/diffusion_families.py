"""Families of diffusers: U-nets, autoencoders, diffusion transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from family_inputs import numbers, random, steps
from family_makers import Family, diffusion
from zoo_inputs import BATCH, Inputs
from zoo_layers import CLASSES

__all__ = ["FAMILIES"]

CHANNELS = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
DIT = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
DIT |= {"patch_size": 2, "in_channels": 4}


def diffusers(
    name: str, kind: str, model: str, inputs: Callable[[], Inputs], **options: Any
) -> Family:
    return Family(name, "diffusers", kind, diffusion(model, **options), inputs, scored=True)


def noisy(*shape: int) -> Inputs:
    """Return noisy samples and the steps that they are at."""
    return {"sample": numbers(BATCH, *shape), "timestep": torch.tensor([3, 50, 700])}


def told(*shape: int) -> Inputs:
    """Return noisy samples and what is to be seen on them."""
    return {**noisy(*shape), "encoder_hidden_states": numbers(BATCH, 5, 32, seed=4)}


def classes() -> Inputs:
    return {
        "hidden_states": numbers(BATCH, 4, 8, 8),
        "timestep": steps(),
        "class_labels": torch.randint(CLASSES, (BATCH,), generator=random()),
    }


def sd3() -> Inputs:
    return {
        "hidden_states": numbers(BATCH, 4, 8, 8),
        "encoder_hidden_states": numbers(BATCH, 5, 32, seed=4),
        "pooled_projections": numbers(BATCH, 24, seed=5),
        "timestep": steps(),
    }


def flux() -> Inputs:
    places = torch.stack(torch.meshgrid(*map(torch.arange, (1, 4, 4)), indexing="ij"), -1)
    return {
        "hidden_states": numbers(BATCH, 16, 4),
        "encoder_hidden_states": numbers(BATCH, 5, 32, seed=4),
        "pooled_projections": numbers(BATCH, 24, seed=5),
        "timestep": torch.tensor([0.1, 0.5, 0.7], dtype=torch.float64),
        "img_ids": places.flatten(0, 2).double(),
        "txt_ids": torch.zeros(5, 3, dtype=torch.float64),
    }


def wan() -> Inputs:
    return {
        "hidden_states": numbers(BATCH, 4, 2, 8, 8),
        "timestep": steps(),
        "encoder_hidden_states": numbers(BATCH, 5, 24, seed=4),
    }


def pixart() -> Inputs:
    return {
        "hidden_states": numbers(BATCH, 4, 8, 8),
        "encoder_hidden_states": numbers(BATCH, 5, 24, seed=4),
        "timestep": steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


_DIFFUSERS = (
    diffusers(
        "unet-2d",
        "diffusion",
        "UNet2DModel",
        partial(noisy, 3, 16, 16),
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **CHANNELS,
    ),
    diffusers(
        "unet-2d-condition",
        "diffusion",
        "UNet2DConditionModel",
        partial(told, 4, 16, 16),
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        **CHANNELS,
    ),
    diffusers(
        "unet-3d-condition",
        "video diffusion",
        "UNet3DConditionModel",
        partial(told, 4, 2, 16, 16),
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        **CHANNELS,
    ),
    diffusers(
        "unet-1d",
        "diffusion of trajectories",
        "UNet1DModel",
        partial(noisy, 6, 16),
        in_channels=6,
        out_channels=6,
        block_out_channels=(16, 32),
        layers_per_block=1,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        act_fn="mish",
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
        norm_num_groups=8,
        extra_in_channels=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ),
    diffusers(
        "autoencoder-kl",
        "autoencoder",
        "AutoencoderKL",
        lambda: {"sample": numbers(BATCH, 3, 16, 16)},
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        **CHANNELS,
    ),
    diffusers(
        "vq-vae",
        "autoencoder",
        "VQModel",
        lambda: {"sample": numbers(BATCH, 3, 16, 16)},
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        **CHANNELS,
    ),
    diffusers(
        "dit",
        "diffusion transformer",
        "DiTTransformer2DModel",
        classes,
        **DIT,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    ),
    diffusers(
        "pixart",
        "diffusion transformer",
        "PixArtTransformer2DModel",
        pixart,
        **DIT,
        cross_attention_dim=32,
        caption_channels=24,
        norm_num_groups=4,
        out_channels=4,
    ),
    diffusers(
        "sd3",
        "diffusion transformer",
        "SD3Transformer2DModel",
        sd3,
        **DIT,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
    ),
    diffusers(
        "flux",
        "diffusion transformer",
        "FluxTransformer2DModel",
        flux,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    ),
    diffusers(
        "wan",
        "video diffusion transformer",
        "WanTransformer3DModel",
        wan,
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    ),
    diffusers(
        "prior",
        "diffusion of embeddings",
        "PriorTransformer",
        lambda: {
            "hidden_states": numbers(BATCH, 24),
            "timestep": steps(),
            "proj_embedding": numbers(BATCH, 24, seed=4),
            "encoder_hidden_states": numbers(BATCH, 7, 24, seed=5),
        },
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=24,
        num_embeddings=7,
        additional_embeddings=4,
    ),
)
FAMILIES = _DIFFUSERS
