"""Layouts that a plan gives to tensors, checked: whether a tensor of that shape can lie so."""

from __future__ import annotations

from collections.abc import Sequence

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Dim, Sym
from autoparallel.placement import (
    Invariant,
    Layout,
    Shard,
    can_be_shared,
    divides_in_runs,
    fewest_runs,
    layout_text,
)
from autoparallel.plan import ParameterChoice, Plan
from autoparallel.runtime.tensor_parts import require_refined
from autoparallel.strategy.mesh_strategies import is_nested

__all__ = ["require_storage", "why_no_layout", "wrong_plan"]


def require_storage(
    choice: ParameterChoice, shape: tuple[Dim, ...], plan: Plan, where: str
) -> None:
    """Raise PlanError unless a parameter is stored, updated and its gradient held in parts that
    there are, of which one is cut from the other.
    """
    sizes = tuple(size for _, size in plan.mesh.axes)
    for layout in (choice.storage, choice.gradient, choice.state):
        # What is updated is no part of a computation, so that ranks may have more or less of it.
        why = why_no_layout(layout, shape, sizes, even=layout is choice.storage)
        if why:
            raise wrong_plan(
                choice.path, where, f"{layout_text(layout)} of a tensor {shape}: {why}"
            )
        if not all(isinstance(placement, (Invariant, Shard)) for placement in layout):
            raise wrong_plan(
                choice.path, where, f"parameters are not stored as {layout_text(layout)}"
            )
    require_refined(choice.storage, choice.state, choice.path)
    triples = zip(choice.storage, choice.gradient, choice.state, strict=True)
    if any(gradient not in (storage, state) for storage, gradient, state in triples):
        held = layout_text(choice.gradient)
        raise wrong_plan(choice.path, where, f"its gradient is {held}, as neither it nor its state")


def why_no_layout(
    layout: Layout, shape: Sequence[Dim], sizes: tuple[int, ...], even: bool = True
) -> str:
    """Return why no tensor of this shape lies so on a mesh of axes of these sizes; "" if one can.

    even: whether axes that cut the same dim must give all ranks as much. A size that the inputs
    decide may be cut anywhere: its parts are computed when it is known.
    """
    if len(layout) != len(sizes):
        return f"the mesh has {len(sizes)} axes"
    for placement, ranks in zip(layout, sizes, strict=True):
        if ranks == 1 and placement != Invariant():
            return "one rank alone has all of it"
        if not isinstance(placement, Shard):
            continue
        if placement.dim >= len(shape):
            return f"it has {len(shape)} dims"
        size, blocks, unit = shape[placement.dim], placement.blocks, placement.unit
        if isinstance(size, Sym) and (blocks, unit) != (1, 1):
            return "the inputs decide on that size"
        if isinstance(size, int) and not (
            divides_in_runs(size, blocks, unit) and fewest_runs(size, blocks, unit) >= 2
        ):
            return f"{size} elements are not divided into such runs"
        if isinstance(size, int) and not can_be_shared(placement, size, ranks):
            return f"{ranks} ranks do not share {size} elements so"
        if placement.repeat != 1 and isinstance(size, Sym):
            return "the inputs decide on that size"
    # Sizes that the inputs decide divide by anything: 0 does.
    known = tuple(0 if isinstance(size, Sym) or not even else size for size in shape)
    return "" if is_nested(known, layout, sizes) else "the axes cut it at different places"


def wrong_plan(what: str, where: str, why: str) -> PlanError:
    """Return the error for a part of a plan that is not as the planner makes it."""
    return PlanError(
        f"the plan cannot be followed: {what}",
        where=where,
        why=why,
        fix="plan again, or give the whole text that plan.to_json() wrote",
    )
