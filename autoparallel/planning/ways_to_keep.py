"""Ways to keep what the backward pass of a block needs, from all of it to its inputs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["WAYS", "mode_of", "regathered", "regathers", "worthwhile"]

_AGAIN = ", gathered again"


def regathered(mode: str) -> str:
    """Return the way of a mode of recomputation in which copies that are gathered are not kept.

    Each rank then keeps its part alone, and the copy is gathered again in the backward pass
    (arXiv:2205.05198, section 4.2.2).

    >>> regathered("selective")
    'selective, gathered again'
    """
    return mode + _AGAIN


def mode_of(way: str) -> str:
    """Return the mode of recomputation of a way.

    >>> mode_of(regathered("none")), mode_of("full")
    ('none', 'full')
    """
    return way.removesuffix(_AGAIN)


def regathers(way: str) -> bool:
    """Return whether a way keeps no copies that are gathered.

    >>> regathers("none"), regathers(regathered("none"))
    (False, True)
    """
    return way.endswith(_AGAIN)


# Roughly from the quickest way to the one that keeps least: blocks differ (see `worthwhile`).
WAYS: tuple[str, ...] = ("none", regathered("none"), "selective", regathered("selective"), "full")


def worthwhile(taken: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Return the ways that are worth a try, from the quickest to the one that keeps least.

    taken: the seconds and the bytes of each way. One is not worth a try if another is as quick and
    keeps as little: where attention is fused, norms that are run again may keep more than all of a
    block but what is gathered for it.

    >>> worthwhile({"none": (1.0, 9.0), "selective": (2.0, 9.0), "full": (3.0, 1.0)})
    ('none', 'full')
    """
    found: list[str] = []
    least = math.inf
    for way in sorted(taken, key=taken.__getitem__):
        if taken[way][1] < least:
            found.append(way)
            least = taken[way][1]
    return tuple(found)
