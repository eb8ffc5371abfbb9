"""Placements: how a tensor lies on each mesh axis, and the collectives that redistribute it.

placements.py has the four of them, shard_sizes.py what a rank holds of a split dim, movements.py
every move from one to another. All of it is importable from here. How a plan chooses among them is
in strategy/, and what makes the moves in runtime/.
"""

from autoparallel.placement.movements import (
    Collective,
    Movement,
    Step,
    backward_steps,
    is_possible_step,
    movement,
)
from autoparallel.placement.placements import (
    Counts,
    Invariant,
    Layout,
    Partial,
    Placement,
    Replicate,
    Shard,
    blocks_and_units,
    gradient,
    layout_gradient,
    layout_text,
    parse_layout,
    parse_placement,
    whole_layout,
)
from autoparallel.placement.shard_sizes import (
    Block,
    block_runs,
    block_sizes,
    can_be_shared,
    divides_in_runs,
    fewest_runs,
    is_even,
    local_layout_size,
    local_size,
    part_bounds,
)

__all__ = [
    "Block",
    "Collective",
    "Counts",
    "Invariant",
    "Layout",
    "Movement",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "Step",
    "backward_steps",
    "block_runs",
    "block_sizes",
    "blocks_and_units",
    "can_be_shared",
    "divides_in_runs",
    "fewest_runs",
    "gradient",
    "is_even",
    "is_possible_step",
    "layout_gradient",
    "layout_text",
    "local_layout_size",
    "local_size",
    "movement",
    "parse_layout",
    "parse_placement",
    "part_bounds",
    "whole_layout",
]
