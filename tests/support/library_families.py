"""Families of x-transformers, vit-pytorch and torch_geometric, by the calls that make them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from family_inputs import numbers, random
from family_makers import Family, Make, with_rate
from torch import nn
from zoo_inputs import BATCH, IMAGE, Inputs, tokens
from zoo_layers import CLASSES, HIDDEN, VOCABULARY

__all__ = ["FAMILIES"]

LAYERS, HEADS, NODES = 4, 4, 13
VIT = {"image_size": IMAGE, "patch_size": 8, "num_classes": CLASSES, "dim": HIDDEN}
VIT |= {"depth": LAYERS, "heads": HEADS, "mlp_dim": 2 * HIDDEN}
STACK = {"dim": HIDDEN, "depth": LAYERS, "heads": HEADS, "attn_dim_head": 16}


def made(library: str, path: str, **options: Any) -> Make:
    """Return the maker of a model by the path of its class in a library.

    An option that is a callable makes a module, which the model holds.
    """

    def make(dropout: float) -> nn.Module:
        module, _, name = f"{library}.{path}".rpartition(".")
        kind: Callable[..., nn.Module] = getattr(importlib.import_module(module), name)
        # Both libraries draw their first weights with Python's numbers, too.
        chosen = {key: v(dropout) if callable(v) else v for key, v in options.items()}
        return with_rate(kind(**chosen), dropout)

    return make


def words() -> Inputs:
    return {"x": tokens()["input_ids"]}


def picture(name: str) -> Inputs:
    return {name: numbers(BATCH, 3, IMAGE, IMAGE)}


def graph() -> Inputs:
    """Return features of nodes, and edges from node to node, each node's own among them."""
    edges = torch.randint(NODES, (2, 40), generator=random())
    own = torch.arange(NODES).expand(2, NODES)
    return {"x": numbers(NODES, 24), "edge_index": torch.cat([edges, own], 1)}


def _words(name: str, kind: str, causal: bool = True, **layers: Any) -> Family:
    """Return a model of texts of x-transformers with these options of its layers."""
    inner = made("x_transformers", "Decoder" if causal else "Encoder", **STACK, **layers)
    whole = made(
        "x_transformers",
        "TransformerWrapper",
        num_tokens=VOCABULARY,
        max_seq_len=32,
        attn_layers=inner,
    )
    return Family(f"x-{name}", "x_transformers", kind, whole, words, scored=True)


def _view(name: str, path: str, takes: str = "img", **options: Any) -> Family:
    """Return a model of pictures of vit-pytorch. An option that is None is left out.

    takes: the name of its argument.
    """
    chosen = {key: v for key, v in {**VIT, **options}.items() if v is not None}
    whole, inputs = made("vit_pytorch", path, **chosen), partial(picture, takes)
    return Family(f"vit-{name}", "vit_pytorch", "images", whole, inputs, scored=True)


def _graph(name: str, kind: str, **options: Any) -> Family:
    """Return a graph network of torch_geometric."""
    sizes = {
        "in_channels": 24,
        "hidden_channels": 32,
        "num_layers": LAYERS,
        "out_channels": CLASSES,
    }
    whole = made("torch_geometric.nn", kind, **sizes, **options)
    return Family(f"graph-{name}", "torch_geometric", "graph", whole, graph, scored=True)


_NONE: dict[str, Any] = dict.fromkeys(("mlp_dim", "depth", "heads"))
FAMILIES = (
    _words("decoder", "decoder", rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True),
    _words("encoder", "encoder", causal=False),
    _words("alibi", "decoder", alibi_pos_bias=True, alibi_num_heads=2),
    _words("t5-bias", "decoder", rel_pos_bias=True, attn_one_kv_head=True),
    _words("sandwich", "decoder", sandwich_norm=True, attn_qk_norm=True, ff_swish=True),
    _words("macaron", "encoder", causal=False, macaron=True, attn_pre_talking_heads=True),
    _words("gated", "decoder", attn_gate_values=True, gate_residual=True, attn_kv_heads=2),
    _words("memory", "encoder", causal=False, attn_num_mem_kv=3, ff_relu_squared=True),
    _view("plain", "vit.ViT"),
    _view("simple", "simple_vit.SimpleViT"),
    _view("qk-norm", "simple_vit_with_qk_norm.SimpleViT"),
    _view("registers", "simple_vit_with_register_tokens.SimpleViT"),
    _view("fourier", "simple_vit_with_fft.SimpleViT", freq_patch_size=8),
    _view("parallel", "parallel_vit.ViT"),
    _view("deep", "deepvit.DeepViT"),
    _view("talking", "cait.CaiT", cls_depth=2),
    _view("small-data", "vit_for_small_dataset.ViT"),
    _view("merger", "vit_with_patch_merger.ViT", patch_merge_layer=2, patch_merge_num_tokens=5),
    _view("value-residual", "simple_vit_with_value_residual.SimpleViT"),
    _view("rotary", "rvt.RvT"),
    _view(
        "tokens-to-token",
        "t2t.T2TViT",
        patch_size=None,
        t2t_layers=((3, 2), (3, 2)),
    ),
    _view(
        "compact",
        "cct.CCT",
        "x",
        **_NONE,
        img_size=IMAGE,
        image_size=None,
        patch_size=None,
        dim=None,
        embedding_dim=HIDDEN,
        n_conv_layers=1,
        stochastic_depth_rate=0.0,
        kernel_size=3,
        num_layers=LAYERS,
        num_heads=HEADS,
        mlp_ratio=2,
    ),
    _view(
        "nested",
        "nest.NesT",
        mlp_dim=None,
        patch_size=4,
        dim=32,
        heads=2,
        num_hierarchies=2,
        block_repeats=(2, 2),
        depth=None,
    ),
    _graph("convolution", "GCN"),
    _graph("sage", "GraphSAGE"),
    _graph("isomorphism", "GIN"),
    _graph("attention-v1", "GAT", heads=2),
    _graph("attention-v2", "GAT", heads=2, v2=True),
    _graph(
        "aggregations",
        "PNA",
        aggregators=["mean", "max"],
        scalers=["identity"],
        deg=lambda _: torch.ones(8, dtype=torch.long),
    ),
    _graph("edges", "EdgeCNN"),
)
