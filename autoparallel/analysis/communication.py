"""The collectives of a step of training, read off a plan's redistributions one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autoparallel.graph.part_sizes import exact_fraction
from autoparallel.placement import (
    Collective,
    Invariant,
    Layout,
    Movement,
    Step,
    backward_steps,
    layout_gradient,
)
from autoparallel.plan import Conversion, ParameterChoice, Plan

__all__ = [
    "PHASES",
    "Transfer",
    "collective_totals",
    "late_axes",
    "moves",
    "route",
    "transfers",
]

PHASES = ("forward", "backward", "update")


@dataclass(frozen=True, slots=True)
class Transfer:
    """One move on one mesh axis.

    conversion: the redistribution that it is a step of. layout: of the tensor before the move, for
    a gradient that of the gradient. phase: one of PHASES. nbytes: of the tensor as it would be on a
    rank if this axis did not split it. together: made in one call with others like it, as a
    gradient bucket. again: it repeats in the backward pass a move of the forward pass.
    """

    conversion: Conversion
    step: Step
    layout: Layout
    phase: str
    movement: Movement
    nbytes: float
    together: bool = False
    again: bool = False

    @property
    def collective(self) -> Collective:
        """The collective of a move that crosses the links; others have none."""
        collective = self.movement.collective
        assert collective is not None, self
        return collective


def route(layout: Layout, steps: tuple[Step, ...]) -> Iterator[tuple[Layout, Step]]:
    """Yield each step with the layout before it.

    >>> from autoparallel.placement import Replicate, Shard
    >>> step = Step(0, Shard(0), Replicate())
    >>> list(route((Shard(0),), (step,))) == [((Shard(0),), step)]
    True
    """
    for step in steps:
        yield layout, step
        layout = step.applied(layout)


def late_axes(parameter: ParameterChoice | None) -> tuple[int, ...]:
    """Return the axes on which the optimizer works on parts of what is stored whole (ZeRO-1 and
    ZeRO-2).

    On these, gradients are reduced to parts in place of the all-reduce, and updated parts are
    gathered.

    >>> late_axes(None)
    ()
    """
    if parameter is None:
        return ()
    pairs = zip(parameter.storage, parameter.state, strict=True)
    return tuple(axis for axis, (storage, state) in enumerate(pairs) if storage != state)


def transfers(plan: Plan) -> tuple[Transfer, ...]:
    """Return every collective of one step of training, without those inside of kernels.

    Dims of which an input has the size are as long as planned for; others whose size is no number
    are taken to divide by the ranks that split them.

    Example: `sum(transfer.nbytes for transfer in transfers(plan))`
    """
    return tuple(transfer for transfer in moves(plan) if transfer.movement.collective is not None)


def collective_totals(plan: Plan) -> dict[tuple[str, str, Collective], tuple[int, float]]:
    """Return the number and the bytes of a step's redistributions by (phase, mesh axis,
    collective).

    phase: one of PHASES. Bytes are those of the full tensors, as the axis finds them. All that is
    done together counts as one collective.

    Example: `collective_totals(plan)["forward", "tp", Collective.ALL_REDUCE]`
    """
    groups: dict[tuple[str, str, Collective], list[Transfer]] = {}
    for transfer in transfers(plan):
        axis = plan.mesh.axes[transfer.step.axis][0]
        groups.setdefault((transfer.phase, axis, transfer.collective), []).append(transfer)
    totals = {}
    for phase in PHASES:
        for axis, _ in plan.mesh.axes:
            for collective in Collective:
                if group := groups.get((phase, axis, collective)):
                    alone = [transfer for transfer in group if not transfer.together]
                    number = len(alone) + (len(alone) < len(group))
                    nbytes = sum(transfer.nbytes for transfer in group)
                    totals[phase, axis, collective] = number, nbytes
    return totals


def moves(plan: Plan, conversions: Sequence[Conversion] | None = None) -> tuple[Transfer, ...]:
    """Return every move of one step that takes time, on the links or in memory.

    Local moves, such as slices, are among them. The order is that of the plan's conversions, each
    forward, backward and update. conversions: those of the plan whose moves are told; all by
    default.

    Example: `[move for move in moves(plan) if move.phase == "update"]`
    """
    parameters = {parameter.name: parameter for parameter in plan.parameters}
    sizes = tuple(size for _, size in plan.mesh.axes)
    known = {
        dim: size for each in plan.inputs for dim, size in zip(each.dims, each.planned, strict=True)
    }
    repeated = _repeated(plan)
    # The moves of conversions that are alike, as those of equal blocks are, are found once.
    alike: dict[_Kind, tuple[_Move, ...]] = {}
    transfers: list[Transfer] = []
    updated: set[str] = set()
    for conversion in plan.conversions if conversions is None else conversions:
        parameter = parameters.get(conversion.value)
        held = parameter if late_axes(parameter) else None
        kind = _Kind(
            (conversion.source, conversion.target, conversion.steps),
            (conversion.shape, conversion.nbytes),
            conversion.requires_grad,
            conversion.together,
            conversion.again or conversion.value in repeated,
            None if held is None else (held.storage, held.state, held.gradient),
            held is not None and conversion.value not in updated,
        )
        if kind.updates:
            updated.add(conversion.value)
        found = alike.get(kind)
        if found is None:
            found = alike[kind] = tuple(_moves_of(conversion, held, kind, known, sizes))
        transfers += [Transfer(conversion, *move) for move in found]
    return tuple(transfers)


# The fields of a Transfer after the first.
_Move = tuple[Step, Layout, str, Movement, float, bool, bool]


class _Kind(NamedTuple):
    """All of a conversion that its moves follow from.

    ends: its source and target, and the steps. size: its shape and bytes. requires_grad, together:
    as of a Conversion. twice: it is made again in the backward pass. held: how a parameter is
    stored, updated and reduced that the optimizer updates in parts. updates: what is updated of it
    is gathered.
    """

    ends: tuple[Layout, Layout, tuple[Step, ...]]
    size: tuple[str, int]
    requires_grad: bool
    together: bool
    twice: bool
    held: tuple[Layout, Layout, Layout] | None
    updates: bool


def _moves_of(
    conversion: Conversion,
    parameter: ParameterChoice | None,
    kind: _Kind,
    known: Mapping[str, int],
    sizes: tuple[int, ...],
) -> Iterator[_Move]:
    """Yield the moves of a conversion that take time.

    parameter: the one that it converts, if the optimizer updates it in parts. known: sizes that are
    planned for, by dim. sizes: of the mesh.
    """
    dims = conversion.shape.split(", ") if conversion.shape else []
    shape = tuple(int(dim) if dim.isdigit() else known.get(dim) for dim in dims)

    def move(
        step: Step, layout: Layout, phase: str, movement: Movement, *flags: bool
    ) -> Iterator[_Move]:
        if movement is not Movement.NONE and sizes[step.axis] > 1:
            others = (*layout[: step.axis], Invariant(), *layout[step.axis + 1 :])
            nbytes = conversion.nbytes * exact_fraction(shape, others, sizes)
            whole = int(nbytes) if nbytes.denominator == 1 else float(nbytes)
            together, again = flags
            yield step, layout, phase, movement, whole, together, again

    late = late_axes(parameter)
    for phase in ("forward", "backward")[: 2 if kind.twice else 1]:
        for layout, step in route(conversion.source, conversion.steps):
            yield from move(step, layout, phase, step.forward, False, phase == "backward")
    if conversion.requires_grad:
        # The gradient takes the same steps in reverse, each from the target's gradient to the
        # source's.
        back = backward_steps(conversion.steps)
        for layout, step in route(layout_gradient(conversion.target), back):
            movement, together = step.forward, conversion.together
            # ZeRO-1 and -2: only the part that the optimizer updates is wanted, so reducing to
            # parts does.
            if step.axis in late and movement is Movement.ALL_REDUCE:
                assert parameter is not None
                movement = Movement.REDUCE_SCATTER
                # Where also the gradient is held in parts (ZeRO-2), it is reduced as soon as it
                # is there.
                together &= parameter.gradient == parameter.storage
                layout = (*parameter.state[: step.axis], *layout[step.axis :])
            # Only steps that move nothing forward (I -> R) are put off into the bucket.
            together &= step.backward is Movement.NONE
            yield from move(step, layout, "backward", movement, together, False)
    for axis in late if kind.updates else ():
        assert parameter is not None
        step = Step(axis, parameter.state[axis], parameter.storage[axis])
        layout = (*parameter.state[: axis + 1], *parameter.storage[axis + 1 :])
        yield from move(step, layout, "update", step.forward, False, False)


def _repeated(plan: Plan) -> frozenset[str]:
    """Return the values whose redistributions are run again with a recomputed region: nothing else
    reads them.
    """
    group = {name: index for index, names in enumerate(plan.recomputed) for name in names}
    groups: dict[str, set[int]] = {}
    for op in plan.ops if group else ():
        for value in op.reads:
            groups.setdefault(value, set()).add(group.get(op.name, -1))
    outside = {
        conversion.value
        for conversion in plan.conversions
        if any(reader not in group for reader in conversion.readers)
    }
    return frozenset(
        value
        for value, readers in groups.items()
        if len(readers) == 1 and -1 not in readers and value not in outside
    )
