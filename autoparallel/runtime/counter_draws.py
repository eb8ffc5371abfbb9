"""Random numbers of a rank's part of a tensor, made of the words of its elements.

A compiler is shown each draw as one op: the words of an element take dozens of ops of torch, which
would be traced and compiled for each dropout of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from autoparallel.placement import local_size
from autoparallel.runtime.counter_words import Side, cuts_from, drawn_words, sides_of, signed_word

__all__ = ["compiled_mask", "compiled_uniform", "mask_of", "uniform_of"]


def uniform_of(rows: Side, columns: Side, device: torch.device) -> torch.Tensor:
    """Return uniform numbers in [0, 1), float32, of 24 bits. rows, columns: of the tensor."""
    drawn = torch.empty((prod(rows.local_sizes), prod(columns.local_sizes)), device=device)
    for down, across, bits in drawn_words(rows, columns, device):
        # The upper 24 bits, moved from signed to [0, 2^24): float32 holds these exactly.
        drawn[down, across] = bits.bitwise_right_shift_(8).add_(1 << 23)
    return drawn.mul_(1.0 / (1 << 24)).view(rows.local_sizes + columns.local_sizes)


def mask_of(rows: Side, columns: Side, probability: float, device: torch.device) -> torch.Tensor:
    """Return 0 for elements with `probability`, else 1: uint8. rows, columns: of the tensor.

    One byte for each is all that waits for the backward pass. (Products with bool are slow on a
    CPU.)
    """
    mask = torch.empty(
        (prod(rows.local_sizes), prod(columns.local_sizes)), dtype=torch.bool, device=device
    )
    # So many of all words are dropped, from the least: words are uniform in [-2^31, 2^31).
    dropped = round(probability * (1 << 32))
    if dropped == 1 << 32:  # behind the last word begins the first again
        mask.zero_()
    else:
        least = signed_word(0x80000000 + dropped)
        for down, across, bits in drawn_words(rows, columns, device):
            mask[down, across] = bits.ge(least)
    return mask.view(torch.uint8).view(rows.local_sizes + columns.local_sizes)


@torch.library.custom_op("autoparallel::uniform", mutates_args=())
def compiled_uniform(
    words: torch.Tensor, shape: Sequence[int], cuts: Sequence[int]
) -> torch.Tensor:
    """Return `uniform_of` a tensor as one op.

    words: the two of the draw, int32. shape: of the whole tensor. cuts: see `cuts_of`.

    >>> words = torch.tensor([1, 2], dtype=torch.int32)
    >>> whole = compiled_uniform(words, [4], [])
    >>> torch.equal(whole[2:], compiled_uniform(words, [4], [0, 1, 1, 2, 1]))
    True
    """
    first, second = words.unbind()
    return uniform_of(*sides_of(shape, cuts, (first, second)), words.device)


@compiled_uniform.register_fake
def _uniform_shape(words: torch.Tensor, shape: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    """Return numbers of this rank's size, for a trace."""
    return words.new_empty(_local_sizes(shape, cuts), dtype=torch.float32)


@torch.library.custom_op("autoparallel::mask", mutates_args=())
def compiled_mask(
    words: torch.Tensor, probability: float, shape: Sequence[int], cuts: Sequence[int]
) -> torch.Tensor:
    """Return `mask_of` a tensor as one op; its other arguments are those of `compiled_uniform`.

    >>> words = torch.tensor([1, 2], dtype=torch.int32)
    >>> 400 < int(compiled_mask(words, 0.5, [1000], []).sum()) < 600
    True
    """
    first, second = words.unbind()
    return mask_of(*sides_of(shape, cuts, (first, second)), probability, words.device)


@compiled_mask.register_fake
def _mask_shape(
    words: torch.Tensor, probability: float, shape: Sequence[int], cuts: Sequence[int]
) -> torch.Tensor:
    """Return a mask of this rank's size, for a trace."""
    return words.new_empty(_local_sizes(shape, cuts), dtype=torch.uint8)


def _local_sizes(shape: Sequence[int], cuts: Sequence[int]) -> list[int]:
    """Return the sizes of this rank's part."""
    sizes = list(shape)
    for shard, world_size, rank in cuts_from(cuts):
        sizes[shard.dim] = local_size(sizes[shard.dim], shard, world_size, rank)
    return sizes
