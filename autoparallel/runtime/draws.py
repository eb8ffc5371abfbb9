"""The random ops of emitted programs. All others are spelled out by these."""

from __future__ import annotations

import math

import torch

from autoparallel.placement import Layout
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import dropout, generator, uniform

__all__ = ["dropout", "rand", "randn"]

# Keys of an op's second, third, ... draw differ from its first one's by multiples of this.
_NEXT_DRAW = 0x632BE5AB
# Bits of one draw.
_BITS = 24


def _fine(
    shape: tuple[int, ...], key: int, placements: Layout, ranks: Ranks, device: torch.device
) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64, of 48 bits."""
    source = generator()
    high, low = (
        uniform(shape, other, placements, ranks, device, source).double()
        for other in (key, key ^ _NEXT_DRAW)
    )
    return high + low * 2.0**-_BITS


def _kind(
    like: torch.Tensor | list[int], dtype: torch.dtype | None, device: torch.device | None
) -> tuple[torch.dtype, torch.device]:
    if isinstance(like, torch.Tensor):
        return dtype or like.dtype, like.device
    return dtype or torch.get_default_dtype(), device or torch.device("cpu")


def rand(
    like: torch.Tensor | list[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
    key: int,
    shape: tuple[int, ...],
    placements: Layout,
    ranks: Ranks,
) -> torch.Tensor:
    """Uniform numbers in [0, 1): the local part of a tensor of `shape`.

    like: a tensor of the type and device wanted, or a size, which is not read.
    """
    kind, place = _kind(like, dtype, device)
    if kind == torch.float64:
        return _fine(shape, key, placements, ranks, place)
    drawn = uniform(shape, key, placements, ranks, place, generator())
    # A type of fewer bits must not round up to 1.
    steps = 2 / torch.finfo(kind).eps
    return drawn if kind == torch.float32 else (drawn * steps).floor().div(steps).to(kind)


def randn(
    like: torch.Tensor | list[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
    key: int,
    shape: tuple[int, ...],
    placements: Layout,
    ranks: Ranks,
) -> torch.Tensor:
    """Normal numbers (Box & Muller 1958): the local part of a tensor of `shape`.

    Computed in float64, so that the last bit of a logarithm, which may depend on where in memory
    an element lies, is gone in any smaller type. like: see rand.
    """
    kind, place = _kind(like, dtype, device)
    length = _fine(shape, key, placements, ranks, place)
    turn = _fine(shape, key ^ (_NEXT_DRAW << 1), placements, ranks, place)
    return ((1 - length).log_().mul_(-2).sqrt_() * (turn * (2 * math.pi)).cos_()).to(kind)
