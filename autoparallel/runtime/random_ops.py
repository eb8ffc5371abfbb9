"""The random ops of emitted programs; all others are decomposed into these.

Each returns this rank's part of a whole tensor of random numbers, the same numbers under every
plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch

from autoparallel.placement import Layout
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import NEXT_DRAW, dropout, generator, uniform

__all__ = ["dropout", "rand", "randn"]

# Bits of one draw.
_BITS = 24


@dataclass(frozen=True, slots=True)
class _Part:
    """This rank's part of a whole tensor of random numbers.

    shape: of the whole. key: of the op. placements: how the whole is split on each mesh axis.
    ranks: this rank's place. device: where the numbers are made.
    """

    shape: tuple[int, ...]
    key: int
    placements: Layout
    ranks: Ranks
    device: torch.device

    def uniform(self, key: int) -> torch.Tensor:
        """Return uniform numbers in [0, 1), float32, of 24 bits."""
        return uniform(self.shape, key, self.placements, self.ranks, self.device, generator())

    def fine(self, key: int) -> torch.Tensor:
        """Return uniform numbers in [0, 1), float64, of 48 bits."""
        # Two draws with different keys: the second one's bits follow the first one's.
        high, low = self.uniform(key).double(), self.uniform(key ^ NEXT_DRAW).double()
        return high + low * 2.0**-_BITS


def _op(draw: Callable[[_Part, torch.dtype], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the op as emitted programs call it, with all that torch's own may be told.

    draw: makes the numbers of a part in an element type.
    """

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
        """Draw numbers for this rank's part; torch's options that do not concern values are not
        read.

        like: a tensor of the type and device wanted, or a size, which is not read either.
        """
        if isinstance(like, torch.Tensor):
            number_type, on = dtype or like.dtype, like.device
        else:
            number_type, on = dtype or torch.get_default_dtype(), device or torch.device("cpu")
        return draw(_Part(shape, key, placements, ranks, on), number_type)

    return run


@_op
def rand(part: _Part, dtype: torch.dtype) -> torch.Tensor:
    """Return uniform numbers in [0, 1), of this rank's part, in an element type.

    The options are those of torch.rand and torch.rand_like. key: a number that sets this op's draws
    apart, from `op_key`. shape: of the whole tensor. placements: how the result lies. ranks: this
    rank's place.

    >>> from autoparallel.placement import Invariant
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> from autoparallel.runtime.ranks import one_axis
    >>> ranks = one_axis(SingleGroup())
    >>> drawn = rand([3], key=7, shape=(3,), placements=(Invariant(),), ranks=ranks)
    >>> drawn.shape, bool(((0 <= drawn) & (drawn < 1)).all())
    (torch.Size([3]), True)
    """
    if dtype == torch.float64:
        return part.fine(part.key)
    drawn = part.uniform(part.key)
    # A type of fewer bits must not round up to 1, so numbers are rounded down to its last place.
    steps = 2 / torch.finfo(dtype).eps
    return drawn if dtype == torch.float32 else (drawn * steps).floor().div(steps).to(dtype)


@_op
def randn(part: _Part, dtype: torch.dtype) -> torch.Tensor:
    """Return normal numbers of mean 0 and deviation 1, of this rank's part (Box & Muller 1958).

    The arguments are those of `rand`. They are computed in float64, so that the last bit of a
    logarithm, which may depend on where in memory an element lies, is gone in any smaller type.
    """
    length, turn = part.fine(part.key), part.fine(part.key ^ (NEXT_DRAW << 1))
    # 1 - length is in (0, 1]: its logarithm is finite.
    return ((1 - length).log_().mul_(-2).sqrt_() * (turn * (2 * math.pi)).cos_()).to(dtype)
