"""The share of a pipeline's stage that one pass of one micro-batch bears."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WHOLE_MODEL", "StageShares"]


@dataclass(frozen=True, slots=True)
class StageShares:
    """A StageShares says what a network of one micro-batch on all stages counts unlike a step.

    ranks: that share out the stages, of the size of a mesh axis. passes: micro-batches that pass a
    stage in the time of a step, with those that would fit in the bubble: what is done once a step,
    reducing gradients and the update, counts by one of so many parts. in_flight: micro-batches of
    which a stage holds activations at a time, where it holds most; what stays between steps counts
    by one of so many parts beside them. in_parts: whether every op that can be computed for one
    micro-batch by itself is. A plan in which it is not repeats it for all of them, and mostly all
    that it reads, so that it is looked for only where there is no other.

    >>> StageShares(4, 8.0, 2.0).once
    0.125
    """

    ranks: int = 1
    passes: float = 1.0
    in_flight: float = 1.0
    in_parts: bool = False

    @property
    def once(self) -> float:
        """The share that a micro-batch bears of what is done once a step."""
        return 1.0 / self.passes


# A model without stages: a step bears all that is done in it.
WHOLE_MODEL = StageShares()
