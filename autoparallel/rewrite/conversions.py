"""The steps that redistribute a plan's values from their producer's layout to their readers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

__all__ = ["Conversions", "begun_ahead", "begun_steps", "find_deferred", "layouts_made"]

# By a parameter's node: the mesh axes on which its gradient is summed by who runs the program.
# One collective for all parameters of an axis then sums the gradients after the backward pass.
Deferred = Mapping[str, tuple[int, ...]]


class Conversions:
    """The plan's conversions, by value and target layout.

    known: conversions that the plan lists. made: the layout in which each value is produced.
    entering: the layouts of inputs that are no whole values.
    """

    def __init__(self, plan: Plan, entering: Mapping[str, Layout] | None = None) -> None:
        self.known: dict[tuple[str, Layout], Conversion] = {
            (conversion.value, conversion.target): conversion for conversion in plan.conversions
        }
        self.made = {**_made(plan), **(entering or {})}

    def steps(
        self, name: str, target: Layout, deferred: Deferred | None = None
    ) -> tuple[Step, ...]:
        """Return the steps by which a value gets from its producer's layout to `target`;
        none where it needs none.

        name: of the value. deferred: axes whose step the value does not take, because it starts on
        the other side of it. A single step need not be in the plan; of several, the plan must say
        the order, and where it does not there are no steps.
        """
        conversion = self.known.get((name, target))
        if conversion is None:
            source = self.made.get(name, whole_layout(len(target)))
            ends = enumerate(zip(source, target, strict=True))
            steps = tuple(
                Step(axis, held, wanted) for axis, (held, wanted) in ends if held != wanted
            )
            if len(steps) > 1 or not all(is_possible_step(source, step) for step in steps):
                return ()
        else:
            steps = conversion.steps
        axes = (deferred or {}).get(name, ())
        return tuple(step for step in steps if step.axis not in axes)

    def is_again(self, name: str, target: Layout) -> bool:
        """Return whether the copy is dropped after the forward pass and
        redistributed again in the backward pass.
        """
        conversion = self.known.get((name, target))
        return conversion is not None and conversion.again


def begun_ahead(plan: Plan) -> dict[str, list[Conversion]]:
    """Return the conversions whose last collective begins ahead of its use, by the op before which
    it does, in the order in which they begin.

    Example: `begun_ahead(plan)["layer_norm"]`
    """
    begun: dict[str, list[Conversion]] = {}
    for conversion in plan.conversions:
        if conversion.begins:
            begun.setdefault(conversion.begins, []).append(conversion)
    return begun


def begun_steps(steps: Sequence[Step]) -> int:
    """Return the number of steps up to the last one that communicates: where a conversion begins
    ahead of its use, this one is started there, and those before it are done.

    >>> from autoparallel.placement import Replicate, Shard
    >>> begun_steps((Step(0, Shard(0), Replicate()), Step(1, Invariant(), Replicate())))
    1
    """
    return max((at for at, step in enumerate(steps, 1) if step.forward.collective), default=0)


def _made(plan: Plan) -> dict[str, Layout]:
    """Return the layouts in which parameters are stored and ops produce their results, by value."""
    layouts = {parameter.name: parameter.storage for parameter in plan.parameters}
    for op in plan.ops:
        layouts.update(zip(op.makes, op.results, strict=True))
    return layouts


def layouts_made(
    graph: Graph,
    plan: Plan,
    deferred: Deferred,
    entering: Mapping[str, Layout] | None = None,
) -> dict[str, Layout]:
    """Return the layout that each value has in the program before it is converted, by name.

    graph: of the plan. deferred: as `find_deferred` gives it; a parameter is already Replicate on
    the axes on which its gradient is summed by who runs the program. entering: see Conversions.
    """
    whole, storage = whole_layout(len(plan.mesh.axes)), plan.storage
    layouts: dict[str, Layout] = {}
    for node in graph.nodes:
        if node.kind == "parameter":
            stored = storage.get(node.target, whole)
            axes = deferred.get(node.name, ())
            layouts[node.result.name] = tuple(
                Replicate() if axis in axes else placement for axis, placement in enumerate(stored)
            )
        elif node.kind != "call":
            layouts[node.result.name] = (entering or {}).get(node.result.name, whole)
    for op in plan.ops:
        layouts.update(zip(op.makes, op.results, strict=True))
    return layouts


def find_deferred(graph: Graph, plan: Plan, routes: Conversions) -> Deferred:
    """Return the parameters that every reader wants as Replicate on
    an axis on which they are stored whole.

    Their gradients need no collective inside of the program: all of an axis are summed in one when
    the backward pass ends. By node name, the axes. routes: the plan's conversions.
    """
    whole, storage = whole_layout(len(plan.mesh.axes)), plan.storage
    wanted: dict[str, list[tuple[Step, ...]]] = {}
    for op in plan.ops:
        for name, layout in zip(op.reads, op.operands, strict=True):
            wanted.setdefault(name, []).append(routes.steps(name, layout))
    deferred: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        # The caller of the module reads a parameter that is returned, and expects it as I.
        if node.kind != "parameter" or node.name in graph.outputs or node.name not in wanted:
            continue
        axes = tuple(
            axis
            for axis, placement in enumerate(storage.get(node.target, whole))
            if placement == Invariant()
            # Every reader must make exactly the step I -> R on this axis, whose gradient is summed.
            and all(
                [step for step in steps if step.axis == axis]
                == [Step(axis, Invariant(), Replicate())]
                for steps in wanted[node.name]
            )
        )
        if axes:
            deferred[node.name] = axes
    return deferred
