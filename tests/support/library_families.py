"""Families of timm and of diffusers, and a graph network in torch alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from family_makers import Family, diffusion, image_model
from sense_families import numbers, random
from torch import nn
from torch.nn import functional as F
from zoo_inputs import BATCH, IMAGE, Inputs
from zoo_layers import CLASSES, HIDDEN, Output, judged

__all__ = ["FAMILIES"]


def picture() -> Inputs:
    return {"x": numbers(BATCH, 3, IMAGE, IMAGE)}


def timm(name: str, kind: str, model: str, module: str, **options: Any) -> Family:
    make = image_model(model, module, num_classes=CLASSES, **options)
    return Family(name, "timm", kind, make, picture, scored=True)


def diffusers(
    name: str, kind: str, model: str, inputs: Callable[[], Inputs], **options: Any
) -> Family:
    return Family(name, "diffusers", kind, diffusion(model, **options), inputs, scored=True)


def noisy(*shape: int) -> Inputs:
    """Return noisy samples and the steps that they are at."""
    return {"sample": numbers(BATCH, *shape), "timestep": torch.tensor([3, 50, 700])}


def steps() -> torch.Tensor:
    return torch.tensor([3, 50, 700])


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


def _norm_free(_: float) -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    config = NfCfg(depths=(1, 1, 1, 1), channels=(16, 32, 32, 64), group_size=8, stem_type="3x3",
                   stem_chs=16, attn_layer="se", attn_kwargs={"rd_ratio": 0.5})
    model: nn.Module = NormFreeNet(config, num_classes=CLASSES)
    return model


def _gating_block(*args: Any, **kwargs: Any) -> nn.Module:
    from timm.models.mlp_mixer import SpatialGatingBlock

    block: nn.Module = SpatialGatingBlock(*args, **kwargs)
    return block


def _gated_mlp(*args: Any, **kwargs: Any) -> nn.Module:
    from timm.layers import GatedMlp

    layer: nn.Module = GatedMlp(*args, **kwargs)
    return layer


class GraphAttention(nn.Module):
    """A GraphAttention (arXiv:1710.10903) passes messages along a list of edges.

    Each edge's weight is a softmax over the edges into the same node, by scatters.
    """

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        sizes = [(24, HIDDEN), (HIDDEN, HIDDEN)]
        self.products = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in sizes)
        self.sources = nn.ParameterList(
            nn.Parameter(torch.randn(heads, b // heads)) for _, b in sizes
        )
        self.targets = nn.ParameterList(
            nn.Parameter(torch.randn(heads, b // heads)) for _, b in sizes
        )
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor, edges: torch.Tensor, labels: torch.Tensor) -> Output:
        """x: (n, 24). edges: (2, e), from and to. labels: (n,)."""
        source, target = edges[0], edges[1]
        count = x.size(0)
        for product, a, b in zip(self.products, self.sources, self.targets, strict=True):
            h = product(x).unflatten(-1, (self.heads, -1))
            scores = F.leaky_relu((h * a).sum(-1)[source] + (h * b).sum(-1)[target], 0.2)
            index = target[:, None].expand_as(scores)
            most = scores.new_full((count, self.heads), -1e9)
            most = most.scatter_reduce(0, index, scores.detach(), "amax")
            weights = (scores - most[target]).exp()
            total = weights.new_zeros(count, self.heads).index_add(0, target, weights)
            messages = h[source] * (weights / total[target])[..., None]
            x = torch.zeros_like(h).index_add(0, target, messages).flatten(1).relu()
        return judged(self.head(x), labels)


def graph() -> Inputs:
    """Return 13 nodes, 40 edges between them, and an edge from each node to itself."""
    loops = torch.arange(13).repeat(2, 1)
    return {
        "x": numbers(13, 24),
        "edges": torch.cat([torch.randint(13, (2, 40), generator=random()), loops], 1),
        "labels": torch.randint(CLASSES, (13,), generator=random()),
    }


SMALL = {"img_size": IMAGE, "patch_size": 8}
CHANNELS = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
DIT = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
DIT |= {"patch_size": 2, "in_channels": 4}

_TIMM = (
    timm("convmixer", "mixer", "ConvMixer", "convmixer", dim=32, depth=2, kernel_size=3, patch_size=8),
    timm("gmlp", "gated mixer", "MlpMixer", "mlp_mixer", **SMALL, embed_dim=HIDDEN, num_blocks=2,
         mlp_ratio=4.0, block_layer=_gating_block, mlp_layer=_gated_mlp),
    timm("xcit", "attention over channels", "Xcit", "xcit", **SMALL, embed_dim=HIDDEN, depth=2,
         num_heads=8, cls_attn_layers=1),
    timm("cait", "images", "Cait", "cait", **SMALL, embed_dim=HIDDEN, depth=2, num_heads=8),
    timm("crossvit", "images", "CrossVit", "crossvit", img_size=32, img_scale=(1.0, 1.0),
         patch_size=(4, 8), embed_dim=(32, 64), depth=((1, 1, 0),), num_heads=(4, 8)),
    timm("volo", "outlook attention", "VOLO", "volo", img_size=32, patch_size=4, stem_hidden_dim=16,
         layers=(1, 1), embed_dims=(32, 64), num_heads=(2, 4), downsamples=(True, False),
         outlook_attention=(True, False), use_mix_token=False, pooling_scale=2),
    timm("densenet", "convolutions", "DenseNet", "densenet", growth_rate=8, block_config=(2, 2)),
    timm("dpn", "convolutions", "DPN", "dpn", small=True, num_init_features=8, k_r=16, groups=4,
         k_sec=(1, 1, 1, 1), inc_sec=(4, 4, 4, 4)),
    timm("sequencer", "recurrent mixer", "Sequencer2d", "sequencer", img_size=32,
         layers=(1, 1), patch_sizes=(4, 2), embed_dims=(32, 64), hidden_sizes=(8, 16),
         mlp_ratios=(3.0, 3.0)),
    Family("nfnet", "timm", "convolutions without norms", _norm_free, picture, scored=True),
    timm("metaformer", "convolutions and attention", "MetaFormer", "metaformer", depths=(1, 1, 1, 1),
         dims=(16, 32, 32, 64)),
    timm("twins", "images", "Twins", "twins", img_size=32, patch_size=4, embed_dims=(16, 32),
         num_heads=(2, 4), mlp_ratios=(4, 4), depths=(2, 2), sr_ratios=(2, 1), wss=(4, 2)),
    timm("mambaout", "gated convolutions", "MambaOut", "mambaout", depths=(1, 1, 1, 1),
         dims=(16, 32, 32, 64)),
    timm("edgenext", "convolutions and attention", "EdgeNeXt", "edgenext", dims=(8, 16, 32, 32),
         depths=(1, 1, 2, 1)),
    timm("starnet", "element-wise products", "StarNet", "starnet", base_dim=8, depths=(1, 1, 1, 1)),
)
_DIFFUSERS = (
    diffusers("unet-2d", "diffusion", "UNet2DModel", partial(noisy, 3, 16, 16), sample_size=16,
              down_block_types=("DownBlock2D", "AttnDownBlock2D"),
              up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **CHANNELS),
    diffusers("unet-2d-condition", "diffusion", "UNet2DConditionModel", partial(told, 4, 16, 16),
              sample_size=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
              up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
              cross_attention_dim=32, **CHANNELS),
    diffusers("unet-3d-condition", "video diffusion", "UNet3DConditionModel",
              partial(told, 4, 2, 16, 16), sample_size=16,
              down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
              up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=4,
              cross_attention_dim=32, **CHANNELS),
    diffusers("unet-1d", "diffusion of trajectories", "UNet1DModel", partial(noisy, 6, 16),
              in_channels=6, out_channels=6, block_out_channels=(16, 32), layers_per_block=1,
              time_embedding_type="positional", use_timestep_embedding=True, act_fn="mish",
              down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
              up_block_types=("UpResnetBlock1D",), mid_block_type="MidResTemporalBlock1D",
              out_block_type="OutConv1DBlock", norm_num_groups=8, extra_in_channels=0,
              flip_sin_to_cos=False, freq_shift=1),
    diffusers("autoencoder-kl", "autoencoder", "AutoencoderKL",
              lambda: {"sample": numbers(BATCH, 3, 16, 16)},
              down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
              latent_channels=4, sample_size=16, **CHANNELS),
    diffusers("vq-vae", "autoencoder", "VQModel", lambda: {"sample": numbers(BATCH, 3, 16, 16)},
              down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
              latent_channels=4, num_vq_embeddings=16, **CHANNELS),
    diffusers("dit", "diffusion transformer", "DiTTransformer2DModel", classes, **DIT,
              num_embeds_ada_norm=1000, norm_num_groups=4),
    diffusers("pixart", "diffusion transformer", "PixArtTransformer2DModel", pixart, **DIT,
              cross_attention_dim=32, caption_channels=24, norm_num_groups=4, out_channels=4),
    diffusers("sd3", "diffusion transformer", "SD3Transformer2DModel", sd3, **DIT,
              caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=24,
              out_channels=4, pos_embed_max_size=8),
    diffusers("flux", "diffusion transformer", "FluxTransformer2DModel", flux, in_channels=4,
              num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
              joint_attention_dim=32, pooled_projection_dim=24, axes_dims_rope=(4, 6, 6)),
    diffusers("wan", "video diffusion transformer", "WanTransformer3DModel", wan,
              num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4,
              text_dim=24, freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=32),
    diffusers("prior", "diffusion of embeddings", "PriorTransformer",
              lambda: {"hidden_states": numbers(BATCH, 24), "timestep": steps(),
                       "proj_embedding": numbers(BATCH, 24, seed=4),
                       "encoder_hidden_states": numbers(BATCH, 7, 24, seed=5)},
              num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=24,
              num_embeddings=7, additional_embeddings=4),
)
_OWN = (Family("graph-attention", "torch", "graph", lambda _: GraphAttention(), graph),)
FAMILIES = (*_TIMM, *_DIFFUSERS, *_OWN)
