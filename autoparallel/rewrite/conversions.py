"""How the values of a plan come from the layout in which they are made to those that are read."""

from __future__ import annotations

from collections.abc import Mapping

from autoparallel.graph.graph import Graph
from autoparallel.placement import (
    Invariant,
    Layout,
    Replicate,
    Step,
    is_possible_step,
    whole_layout,
)
from autoparallel.plan import Conversion, Plan

__all__ = ["Conversions", "find_deferred", "layouts_made"]

# Of parameters, by node name: the axes on which their gradient is summed by who runs the program.
Deferred = Mapping[str, tuple[int, ...]]


class Conversions:
    """The plan's conversions, by value and target."""

    def __init__(self, plan: Plan) -> None:
        self.known: dict[tuple[str, Layout], Conversion] = {
            (conversion.value, conversion.target): conversion for conversion in plan.conversions
        }
        self.made = _made(plan)

    def steps(
        self, name: str, target: Layout, deferred: Deferred | None = None
    ) -> tuple[Step, ...]:
        """How a value gets there. A single step need not be in the plan."""
        conversion = self.known.get((name, target))
        if conversion is None:
            source = self.made.get(name, whole_layout(len(target)))
            ends = enumerate(zip(source, target, strict=True))
            steps = tuple(Step(axis, one, two) for axis, (one, two) in ends if one != two)
            if len(steps) > 1 or not all(is_possible_step(source, step) for step in steps):
                return ()
        else:
            steps = conversion.steps
        axes = (deferred or {}).get(name, ())
        return tuple(step for step in steps if step.axis not in axes)

    def is_again(self, name: str, target: Layout) -> bool:
        """Whether the copy is dropped after the forward pass and made again in the backward."""
        conversion = self.known.get((name, target))
        return conversion is not None and conversion.again


def _made(plan: Plan) -> dict[str, Layout]:
    found = {parameter.name: parameter.storage for parameter in plan.parameters}
    for op in plan.ops:
        found.update(zip(op.makes, op.results, strict=True))
    return found


def layouts_made(graph: Graph, plan: Plan, deferred: Deferred) -> dict[str, Layout]:
    """How the program has every value before it is converted.

    A parameter is already Replicate on the axes on which its gradient is summed by others.
    """
    whole, storage = whole_layout(len(plan.mesh.axes)), plan.storage
    found: dict[str, Layout] = {}
    for node in graph.nodes:
        if node.kind == "parameter":
            own = storage.get(node.target, whole)
            axes = deferred.get(node.name, ())
            found[node.result.name] = tuple(
                Replicate() if axis in axes else placement for axis, placement in enumerate(own)
            )
        elif node.kind != "call":
            found[node.result.name] = whole
    for op in plan.ops:
        found.update(zip(op.makes, op.results, strict=True))
    return found


def find_deferred(graph: Graph, plan: Plan, routes: Conversions) -> Deferred:
    """Parameters that every reader wants as Replicate on an axis on which they are whole."""
    whole, storage = whole_layout(len(plan.mesh.axes)), plan.storage
    wanted: dict[str, list[tuple[Step, ...]]] = {}
    for op in plan.ops:
        for name, layout in zip(op.reads, op.operands, strict=True):
            wanted.setdefault(name, []).append(routes.steps(name, layout))
    found: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        if node.kind != "parameter" or node.name in graph.outputs or node.name not in wanted:
            continue
        axes = tuple(
            axis
            for axis, placement in enumerate(storage.get(node.target, whole))
            if placement == Invariant()
            and all(
                [step for step in steps if step.axis == axis]
                == [Step(axis, Invariant(), Replicate())]
                for steps in wanted[node.name]
            )
        )
        if axes:
            found[node.name] = axes
    return found
