"""What crosses the links in a step of training: a plan's conversions, collective by collective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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

    layout: of the tensor before it, for a gradient that of the gradient. phase: one of PHASES.
    nbytes: of the tensor as it would be on a rank if this axis did not split it. together: made
    in one call with others like it. again: repeats in the backward pass what the forward did.
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
        """The collective that it is. Only for one that crosses the links."""
        collective = self.movement.collective
        assert collective is not None, self
        return collective


def route(layout: Layout, steps: tuple[Step, ...]) -> Iterator[tuple[Layout, Step]]:
    """Each step with the layout before it."""
    for step in steps:
        yield layout, step
        layout = step.applied(layout)


def late_axes(parameter: ParameterChoice | None) -> tuple[int, ...]:
    """Axes on which the optimizer works on parts of what is stored whole (ZeRO-1 and ZeRO-2)."""
    if parameter is None:
        return ()
    pairs = zip(parameter.storage, parameter.state, strict=True)
    return tuple(axis for axis, (own, state) in enumerate(pairs) if own != state)


def transfers(plan: Plan) -> tuple[Transfer, ...]:
    """Every collective of one step, without those inside of kernels.

    Dims whose size is not a number are taken to divide by the ranks that split them.
    """
    return tuple(move for move in moves(plan) if move.movement.collective is not None)


def collective_totals(plan: Plan) -> dict[tuple[str, str, Collective], tuple[int, float]]:
    """(phase, mesh axis, collective) to number and bytes in one step, of the plan's conversions.

    phase: "forward", "backward" or "update". Bytes are those of the full tensors, as the axis
    finds them. What is done together counts as one.
    """
    made: dict[tuple[str, str, Collective], list[Transfer]] = {}
    for transfer in transfers(plan):
        axis = plan.mesh.axes[transfer.step.axis][0]
        made.setdefault((transfer.phase, axis, transfer.collective), []).append(transfer)
    found = {}
    for phase in PHASES:
        for axis, _ in plan.mesh.axes:
            for collective in Collective:
                if group := made.get((phase, axis, collective)):
                    alone = [transfer for transfer in group if not transfer.together]
                    number = len(alone) + (len(alone) < len(group))
                    nbytes = sum(transfer.nbytes for transfer in group)
                    found[phase, axis, collective] = number, nbytes
    return found


def moves(plan: Plan) -> tuple[Transfer, ...]:
    """Every move of one step that takes time, on the links or in memory."""
    parameters = {parameter.name: parameter for parameter in plan.parameters}
    sizes = tuple(size for _, size in plan.mesh.axes)
    repeated = _repeated(plan)
    found: list[Transfer] = []
    updated: set[tuple[str, int]] = set()
    for conversion in plan.conversions:
        parameter = parameters.get(conversion.value)
        late = late_axes(parameter)
        twice = conversion.again or conversion.value in repeated
        for phase in ("forward", "backward")[: 2 if twice else 1]:
            for layout, step in route(conversion.source, conversion.steps):
                again = phase == "backward"
                found += _made(conversion, step, layout, step.forward, phase, sizes, again=again)
        if conversion.requires_grad:
            back = backward_steps(conversion.steps)
            for layout, step in route(layout_gradient(conversion.target), back):
                move, together = step.forward, conversion.together
                if step.axis in late and move is Movement.ALL_REDUCE:
                    assert parameter is not None
                    move = Movement.REDUCE_SCATTER
                    together &= parameter.gradient == parameter.storage
                    layout = (*parameter.state[: step.axis], *layout[step.axis :])
                together &= step.backward is Movement.NONE
                found += _made(conversion, step, layout, move, "backward", sizes, together=together)
        for axis in late:
            if (conversion.value, axis) not in updated:
                assert parameter is not None
                updated.add((conversion.value, axis))
                step = Step(axis, parameter.state[axis], parameter.storage[axis])
                layout = (*parameter.state[: axis + 1], *parameter.storage[axis + 1 :])
                found += _made(conversion, step, layout, step.forward, "update", sizes)
    return tuple(found)


def _repeated(plan: Plan) -> frozenset[str]:
    """Values whose conversions are run again with a group of ops: nothing else reads them."""
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
        for value, found in groups.items()
        if len(found) == 1 and -1 not in found and value not in outside
    )


def _made(
    conversion: Conversion,
    step: Step,
    layout: Layout,
    move: Movement,
    phase: str,
    sizes: tuple[int, ...],
    *,
    together: bool = False,
    again: bool = False,
) -> list[Transfer]:
    if move is Movement.NONE or sizes[step.axis] == 1:
        return []
    others = (*layout[: step.axis], Invariant(), *layout[step.axis + 1 :])
    dims = conversion.shape.split(", ") if conversion.shape else []
    shape = tuple(int(size) if size.isdigit() else None for size in dims)
    nbytes = conversion.nbytes * exact_fraction(shape, others, sizes)
    whole = int(nbytes) if nbytes.denominator == 1 else float(nbytes)
    return [Transfer(conversion, step, layout, phase, move, whole, together, again)]
