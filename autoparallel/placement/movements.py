"""Moves between placements: the collectives that redistribute a tensor, and their backward.

The type of a tensor fixes the type of its gradient (`gradient`), so a transition fixes its
backward: moving a value from A to B moves its gradient from gradient(B) to gradient(A). The whole
table of differentiable collectives is therefore the table of forward moves (`movement`). Megatron's
f (arXiv:1909.08053) is I -> R, its g is P -> I; with sequence parallelism (arXiv:2205.05198) they
are S -> R and P -> S.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from autoparallel.placement.placements import (
    Invariant,
    Layout,
    Partial,
    Placement,
    Replicate,
    Shard,
    gradient,
)

__all__ = ["Collective", "Movement", "Step", "backward_steps", "is_possible_step", "movement"]


class Collective(Enum):
    """The collectives that cross the links.

    Their bytes are counted on the full (unsharded) tensor. RING_PASS sends every part on to the
    next rank until all ranks have seen it. EDGE_EXCHANGE sends as many bytes as are stated from
    each rank to its neighbours.
    """

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    RING_PASS = "ring_pass"
    EDGE_EXCHANGE = "edge_exchange"


class Movement(Enum):
    """One move of a tensor on a mesh axis, named by what it does
    in the direction in which it is made.

    NONE and SLICE send nothing. PAD puts a part amid zeros (S -> P), and KEEP_ON_FIRST keeps the
    value on the first rank and zeros elsewhere (I or R -> P), so that the sum over the ranks stays
    the value; so it does among the ranks that share a part.
    """

    NONE = "none"
    SLICE = "slice"
    PAD = "pad"
    KEEP_ON_FIRST = "keep_on_first"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"

    def __init__(self, value: str) -> None:
        # The collective that the move makes; None where nothing crosses the links.
        self.collective = next((one for one in Collective if one.value == value), None)


# Nothing leads from P to P, I to I or R to R but staying; S to S of another dim or of other blocks
# is a real move. `movement` handles equality before it looks here.
_MOVEMENTS: dict[tuple[type, type], Movement] = {
    (Invariant, Replicate): Movement.NONE,
    (Invariant, Shard): Movement.SLICE,
    (Invariant, Partial): Movement.KEEP_ON_FIRST,
    (Replicate, Invariant): Movement.NONE,
    (Replicate, Shard): Movement.SLICE,
    (Replicate, Partial): Movement.KEEP_ON_FIRST,
    (Shard, Invariant): Movement.ALL_GATHER,
    (Shard, Replicate): Movement.ALL_GATHER,
    (Shard, Shard): Movement.ALL_TO_ALL,
    (Shard, Partial): Movement.PAD,
    (Partial, Invariant): Movement.ALL_REDUCE,
    (Partial, Replicate): Movement.ALL_REDUCE,
    (Partial, Shard): Movement.REDUCE_SCATTER,
}


def movement(source: Placement, target: Placement) -> Movement:
    """Return the move that brings a tensor that lies as `source` to lie as `target`, forward only.

    The backward of the differentiable move is movement(gradient(target), gradient(source)). Every
    pair of placements has a move.

    >>> movement(Partial(), Shard(0)).value
    'reduce_scatter'
    """
    if source == target:
        return Movement.NONE
    pending = isinstance(source, Shard) and source.pending
    if isinstance(target, Shard) and target.repeat != 1:
        if isinstance(source, Partial):
            return Movement.ALL_REDUCE  # each rank then keeps its part of the sum
        if target.pending and not pending and source == gradient(target):
            return Movement.KEEP_ON_FIRST
    if pending and isinstance(target, (Invariant, Replicate)):
        return Movement.ALL_REDUCE
    return _MOVEMENTS[type(source), type(target)]


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """One redistribution of a tensor on one mesh axis; its placements on the other axes stay."""

    axis: int
    source: Placement
    target: Placement

    def __str__(self) -> str:
        return f"{self.axis}: {self.source} -> {self.target}"

    @property
    def forward(self) -> Movement:
        """The move that the step makes of the value."""
        return movement(self.source, self.target)

    @property
    def backward(self) -> Movement:
        """The move that the step makes of the gradient, in the backward pass."""
        return movement(gradient(self.target), gradient(self.source))

    def applied(self, layout: Layout) -> Layout:
        """Return the layout after the step. The layout must have the step's source on its axis."""
        assert layout[self.axis] == self.source, (layout, self)
        return (*layout[: self.axis], self.target, *layout[self.axis + 1 :])


def is_possible_step(layout: Layout, step: Step) -> bool:
    """Return whether the part that a step moves is one piece of its dim, which it is if no inner
    axis cuts that dim too.

    layout: before the step. Where an inner axis has cut the dim, a rank holds a part of a part, and
    a collective on the outer axis would put pieces together in the wrong order.

    >>> is_possible_step((Shard(0), Shard(0)), Step(0, Shard(0), Replicate()))
    False
    """
    dims = {end.dim for end in (step.source, step.target) if isinstance(end, Shard)}
    return not any(
        isinstance(inner, Shard) and inner.dim in dims for inner in layout[step.axis + 1 :]
    )


def backward_steps(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Return the steps by which the gradient travels when the value travels by `steps`: the same
    ones in reverse, each from gradient(target) to gradient(source).

    >>> [str(step) for step in backward_steps((Step(0, Invariant(), Replicate()),))]
    ['0: P -> I']
    """
    return tuple(
        Step(step.axis, gradient(step.target), gradient(step.source)) for step in reversed(steps)
    )
