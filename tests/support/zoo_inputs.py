"""Inputs of the zoo's models, as their users have them, and the same ones at every call."""

from __future__ import annotations

from typing import Any

import torch
from zoo_layers import CLASSES, VOCABULARY

__all__ = ["BATCH", "IMAGE", "POSITIONS", "SEQUENCE", "Inputs"]
__all__ += ["captioned_images", "images", "masked_images", "nodes", "pairs", "sounds", "tokens"]

BATCH, SEQUENCE, POSITIONS, IMAGE = 3, 11, 32, 32

Inputs = dict[str, Any]


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def tokens(pad: bool = True, length: int = SEQUENCE) -> Inputs:
    """Return texts and labels, some of them ignored. pad: one of the texts is shorter."""
    generator = _random()
    shape = (BATCH, length)
    inputs = {
        "input_ids": torch.randint(3, VOCABULARY, shape, generator=generator),
        "labels": torch.randint(3, VOCABULARY, shape, generator=generator),
    }
    inputs["labels"][0, :3] = -100
    if pad:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
        inputs["attention_mask"][1, -2:] = 0
    return inputs


def images() -> Inputs:
    """Return small pictures, each of one class."""
    generator = _random()
    pixels = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (BATCH,), generator=generator)}


def masked_images() -> Inputs:
    """Return small pictures with a class for every point."""
    labels = torch.randint(CLASSES, (BATCH, IMAGE, IMAGE), generator=_random())
    return {**images(), "labels": labels}


def pairs() -> Inputs:
    """Return source and target of an encoder and a decoder, of unlike lengths."""
    inputs = tokens()
    inputs["labels"] = inputs["labels"][:, :7].contiguous()
    return inputs


def captioned_images() -> Inputs:
    """Return as many texts as images; the loss tells which belongs to which."""
    text = tokens()
    return {
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
        "pixel_values": images()["pixel_values"],
        "return_loss": True,
    }


def sounds() -> Inputs:
    """Return spectra, and the words that were said."""
    features = torch.randn(BATCH, 16, 2 * POSITIONS, generator=_random(), dtype=torch.float64)
    return {"input_features": features, "labels": tokens()["labels"]}


def nodes() -> Inputs:
    """Return a dense adjacency of 13 nodes, with rows that sum to one, and their features."""
    generator = _random()
    edges = torch.rand(13, 13, generator=generator, dtype=torch.float64) < 0.4
    adjacency = (edges | torch.eye(13, dtype=torch.bool)).double()
    return {
        "x": torch.randn(13, 24, generator=generator, dtype=torch.float64),
        "adjacency": adjacency / adjacency.sum(1, keepdim=True),
        "labels": torch.randint(CLASSES, (13,), generator=generator),
    }
