"""Inputs that families of several kinds take."""

from __future__ import annotations

import torch
from zoo_inputs import BATCH, IMAGE, Inputs, images, tokens

__all__ = ["numbers", "picture", "pixels", "random", "seen_text", "steps"]


def random(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


def pixels() -> Inputs:
    """Return small pictures without labels."""
    return {"pixel_values": images()["pixel_values"]}


def seen_text() -> Inputs:
    """Return texts, each with its image."""
    words = tokens()
    return {
        "input_ids": words["input_ids"],
        "attention_mask": words["attention_mask"],
        **pixels(),
    }


def picture() -> Inputs:
    return {"x": numbers(BATCH, 3, IMAGE, IMAGE)}


def steps() -> torch.Tensor:
    return torch.tensor([3, 50, 700])
