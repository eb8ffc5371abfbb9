"""The random ops of emitted programs. All others are spelled out by these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch

from autoparallel.placement import Layout
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import dropout, generator, uniform

__all__ = ["dropout", "rand", "randn"]

# Keys of an op's second, third, ... draw differ from its first one's by multiples of this.
_NEXT_DRAW = 0x632BE5AB
# Bits of one draw.
_BITS = 24


@dataclass(frozen=True, slots=True)
class _Part:
    """The rank's part of a whole tensor of random numbers. shape: of the whole. key: of the op."""

    shape: tuple[int, ...]
    key: int
    placements: Layout
    ranks: Ranks
    device: torch.device

    def uniform(self, key: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), float32."""
        return uniform(self.shape, key, self.placements, self.ranks, self.device, generator())

    def fine(self, key: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), float64, of 48 bits."""
        high, low = self.uniform(key).double(), self.uniform(key ^ _NEXT_DRAW).double()
        return high + low * 2.0**-_BITS


def _op(draw: Callable[[_Part, torch.dtype], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An op as emitted programs call it, with all that torch's own may be told."""

    @wraps(draw)
    def run(
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
        """like: a tensor of the type and device wanted, or a size, which is not read."""
        if isinstance(like, torch.Tensor):
            kind, place = dtype or like.dtype, like.device
        else:
            kind, place = dtype or torch.get_default_dtype(), device or torch.device("cpu")
        return draw(_Part(shape, key, placements, ranks, place), kind)

    return run


@_op
def rand(part: _Part, dtype: torch.dtype) -> torch.Tensor:
    """Uniform numbers in [0, 1)."""
    if dtype == torch.float64:
        return part.fine(part.key)
    drawn = part.uniform(part.key)
    # A type of fewer bits must not round up to 1.
    steps = 2 / torch.finfo(dtype).eps
    return drawn if dtype == torch.float32 else (drawn * steps).floor().div(steps).to(dtype)


@_op
def randn(part: _Part, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers (Box & Muller 1958).

    Computed in float64, so that the last bit of a logarithm, which may depend on where in memory
    an element lies, is gone in any smaller type.
    """
    length, turn = part.fine(part.key), part.fine(part.key ^ (_NEXT_DRAW << 1))
    return ((1 - length).log_().mul_(-2).sqrt_() * (turn * (2 * math.pi)).cos_()).to(dtype)
