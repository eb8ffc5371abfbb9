"""Families of timm, and a graph network in torch alone."""

from __future__ import annotations

from typing import Any

import torch
from family_inputs import numbers, picture, random
from family_makers import Family, image_model
from torch import nn
from torch.nn import functional as F
from zoo_inputs import IMAGE, Inputs
from zoo_layers import CLASSES, HIDDEN, Output, judged

__all__ = ["FAMILIES"]

SMALL = {"img_size": IMAGE, "patch_size": 8}


def timm(name: str, kind: str, model: str, module: str, **options: Any) -> Family:
    make = image_model(model, module, num_classes=CLASSES, **options)
    return Family(name, "timm", kind, make, picture, scored=True)


def _norm_free(_: float) -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    config = NfCfg(
        depths=(1, 1, 1, 1),
        channels=(16, 32, 32, 64),
        group_size=8,
        stem_type="3x3",
        stem_chs=16,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
    )
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


_TIMM = (
    timm(
        "convmixer", "mixer", "ConvMixer", "convmixer", dim=32, depth=2, kernel_size=3, patch_size=8
    ),
    timm(
        "gmlp",
        "gated mixer",
        "MlpMixer",
        "mlp_mixer",
        **SMALL,
        embed_dim=HIDDEN,
        num_blocks=2,
        mlp_ratio=4.0,
        block_layer=_gating_block,
        mlp_layer=_gated_mlp,
    ),
    timm(
        "xcit",
        "attention over channels",
        "Xcit",
        "xcit",
        **SMALL,
        embed_dim=HIDDEN,
        depth=2,
        num_heads=8,
        cls_attn_layers=1,
    ),
    timm("cait", "images", "Cait", "cait", **SMALL, embed_dim=HIDDEN, depth=2, num_heads=8),
    timm(
        "crossvit",
        "images",
        "CrossVit",
        "crossvit",
        img_size=32,
        img_scale=(1.0, 1.0),
        patch_size=(4, 8),
        embed_dim=(32, 64),
        depth=((1, 1, 0),),
        num_heads=(4, 8),
    ),
    timm(
        "volo",
        "outlook attention",
        "VOLO",
        "volo",
        img_size=32,
        patch_size=4,
        stem_hidden_dim=16,
        layers=(1, 1),
        embed_dims=(32, 64),
        num_heads=(2, 4),
        downsamples=(True, False),
        outlook_attention=(True, False),
        use_mix_token=False,
        pooling_scale=2,
    ),
    timm("densenet", "convolutions", "DenseNet", "densenet", growth_rate=8, block_config=(2, 2)),
    timm(
        "dpn",
        "convolutions",
        "DPN",
        "dpn",
        small=True,
        num_init_features=8,
        k_r=16,
        groups=4,
        k_sec=(1, 1, 1, 1),
        inc_sec=(4, 4, 4, 4),
    ),
    timm(
        "sequencer",
        "recurrent mixer",
        "Sequencer2d",
        "sequencer",
        img_size=32,
        layers=(1, 1),
        patch_sizes=(4, 2),
        embed_dims=(32, 64),
        hidden_sizes=(8, 16),
        mlp_ratios=(3.0, 3.0),
    ),
    Family("nfnet", "timm", "convolutions without norms", _norm_free, picture, scored=True),
    timm(
        "metaformer",
        "convolutions and attention",
        "MetaFormer",
        "metaformer",
        depths=(1, 1, 1, 1),
        dims=(16, 32, 32, 64),
    ),
    timm(
        "twins",
        "images",
        "Twins",
        "twins",
        img_size=32,
        patch_size=4,
        embed_dims=(16, 32),
        num_heads=(2, 4),
        mlp_ratios=(4, 4),
        depths=(2, 2),
        sr_ratios=(2, 1),
        wss=(4, 2),
    ),
    timm(
        "mambaout",
        "gated convolutions",
        "MambaOut",
        "mambaout",
        depths=(1, 1, 1, 1),
        dims=(16, 32, 32, 64),
    ),
    timm(
        "edgenext",
        "convolutions and attention",
        "EdgeNeXt",
        "edgenext",
        dims=(8, 16, 32, 32),
        depths=(1, 1, 2, 1),
    ),
    timm("starnet", "element-wise products", "StarNet", "starnet", base_dim=8, depths=(1, 1, 1, 1)),
)
_OWN = (Family("graph-attention", "torch", "graph", lambda _: GraphAttention(), graph),)
FAMILIES = (*_TIMM, *_OWN)
