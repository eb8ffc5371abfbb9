"""The threads that the split of a dim cuts: of heads merged with their inner dim, the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from autoparallel.placement import Counts

__all__ = ["threads_cut"]


class _Split(Protocol):
    """A split of a dim into blocks, in runs, that several ranks may have, as of `Shard`."""

    @property
    def blocks(self) -> Counts: ...
    @property
    def unit(self) -> Counts: ...
    @property
    def repeat(self) -> Counts: ...


def threads_cut(
    threads: Sequence[int], sizes: Sequence[int], split: _Split, ranks: int
) -> frozenset[int] | None:
    """Return the threads of a dim that a split of it cuts.

    threads: of the dim, outermost first, by number. sizes: of them. ranks: that share the dim.
    None where blocks of several sizes are cut, or shared in several ways: such a dim is put
    together of several. Empty where the cut falls inside of a thread's elements.

    >>> from autoparallel.placement import Shard
    >>> heads, width = 5, 6
    >>> threads_cut([heads, width], [12, 64], Shard(0), ranks=4)
    frozenset({5})
    >>> threads_cut([heads, width], [2, 64], Shard(0), ranks=4)
    frozenset()
    """
    blocks, unit = split.blocks, split.unit
    if len(threads) < 2:
        return frozenset(threads)
    if not isinstance(blocks, int) or not isinstance(unit, int):
        return None
    if split.repeat != 1:
        return frozenset(threads[:1]) if isinstance(split.repeat, int) else None
    before = 1
    for place, (thread, size) in enumerate(zip(threads, sizes, strict=True)):
        last = place == len(threads) - 1
        if blocks % before == 0 and (blocks < before * size or last):
            inside = max(blocks // before, 1)
            whole = unit % math.prod(sizes[place + 1 :]) == 0
            return frozenset({thread} if whole or (size // inside) % ranks == 0 else ())
        before *= size
    return frozenset(threads[-1:])
