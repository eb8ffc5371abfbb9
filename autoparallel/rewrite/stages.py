"""A planned graph is cut into the stages of a pipeline: a graph and a plan for each.

The calls of a graph stand in an order in which each reads what stands before it. A stage is a run
of them: it reads what stages before it have made, and hands on what stages behind it will read.
Values that follow from the inputs alone, such as masks, positions and the number of labels that
count, are not handed on: each stage that reads them computes them, once a step, of the whole batch.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.placement import Layout, Replicate, layout_gradient, whole_layout
from autoparallel.plan import Conversion, Pipeline, Plan
from autoparallel.rewrite.conversions import (
    Conversions,
    Deferred,
    find_deferred,
    layouts_made,
)
from autoparallel.rewrite.stage_rows import PlanRows

__all__ = [
    "Cut",
    "Stage",
    "cut_plan",
    "holders_of",
    "parameter_gradients",
    "reached_parameters",
    "stages_of_calls",
    "value_stages",
]


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    number: its place. before: the program of what it needs of the inputs alone, once a step; it
    returns whole values. graph: the program of one micro-batch. Its inputs are the model's, then
    what `before` returns, then what the stage before hands on. plan: of both. entering: the layouts
    of inputs that are no whole values. takes, gives: the values that come from the stage before and
    go to the one behind; the last stage gives what the model returns, and behind that the values of
    `written`, buffers that follow from more than the inputs. parameters: the paths of
    those that it reads. deferred: see rewrite/conversions.py; of the whole model, so that all
    stages that read a parameter leave its gradient alike.
    """

    number: int
    before: Graph
    graph: Graph
    before_plan: Plan
    plan: Plan
    entering: Mapping[str, Layout]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    parameters: tuple[str, ...]
    deferred: Deferred
    written: tuple[str, ...]


def stages_of_calls(graph: Graph, starts: Sequence[str]) -> dict[str, int]:
    """Return the stage of every call that is computed in one stage alone.

    starts: the name of the first call of each stage, in order. Calls that follow from the inputs
    alone are in no stage.
    """
    inert = inert_calls(graph)
    stage, order = -1, {name: number for number, name in enumerate(starts)}
    places: dict[str, int] = {}
    for node in graph.calls:
        stage = max(stage, order.get(node.name, 0))
        if node.name not in inert:
            places[node.name] = max(stage, 0)
    return places


def value_stages(
    graph: Graph, places: Mapping[str, int], stages: int
) -> dict[str, tuple[int, int]]:
    """Return, for each value that a stage makes, that stage and the last one that reads it.

    places: see stages_of_calls. What the model returns or writes to buffers, the last stage reads:
    all ranks have it from there.
    """
    returned = {*graph.outputs, *(name for _, name in graph.mutations)}
    spans: dict[str, tuple[int, int]] = {}
    for node in graph.calls:
        if node.name not in places:
            continue
        for value in node.results:
            readers = [places.get(reader.name, 0) for reader in graph.readers[value.name]]
            last = stages - 1 if value.name in returned else max(readers, default=0)
            spans[value.name] = (places[node.name], max(last, places[node.name]))
    return spans


class Cut:
    """A planned graph, cut at the starts of stages.

    graph, plan: of the whole model. starts: see stages_of_calls.
    """

    def __init__(self, graph: Graph, plan: Plan, starts: Sequence[str]) -> None:
        self.graph, self.plan, self.count = graph, plan, len(starts)
        self.places = stages_of_calls(graph, starts)
        self.spans = value_stages(graph, self.places, self.count)
        routes = Conversions(plan)
        self.deferred = find_deferred(graph, plan, routes)
        self.made = layouts_made(graph, plan, self.deferred)
        self.whole = whole_layout(len(plan.mesh.axes))
        self.choices = {op.name: op for op in plan.ops}
        # Nobody reads the results of checks, such as of the way that a branch on values goes. Those
        # of inputs are made by all stages, alike.
        self.checks = [
            value.name
            for node in graph.calls
            for value in node.results
            if node.target == BRANCH_TAKEN and node.name not in self.places
        ]
        # Buffers that follow from more than the inputs are written by all ranks, as they are
        # returned to all.
        self.written = tuple((p, name) for p, name in graph.mutations if name in self.spans)
        self.returned = (*graph.outputs, *(name for _, name in self.written))
        self.outputs = (*plan.outputs, *(self.whole for _ in self.written))

    @cached_property
    def travelling(self) -> Mapping[str, Layout]:
        """The layouts in which values go from stage to stage.

        Where all that read a value there read it in one layout, it is brought to that before it is
        sent: a part is less to send than a pending sum.
        """
        returned: dict[str, list[Layout]] = {}
        for name, layout in zip(self.returned, self.outputs, strict=True):
            returned.setdefault(name, []).append(layout)
        layouts: dict[str, Layout] = {}
        for name, (first, last) in self.spans.items():
            if first == last:
                continue
            wanted: dict[Layout, None] = {}
            for reader in self.graph.readers[name]:
                if self.places.get(reader.name, first) > first:
                    layouts_read = self.choices[reader.name].operands
                    pairs = zip(reader.operands(), layouts_read, strict=True)
                    wanted.update((layout, None) for operand, layout in pairs if operand == name)
            wanted.update(dict.fromkeys(returned.get(name, ())))
            layouts[name] = next(iter(wanted)) if len(wanted) == 1 else self.made[name]
        return layouts

    def crossing(self, boundary: int) -> tuple[str, ...]:
        """Return the values that go from stage `boundary` to the next one, in the graph's order."""
        return tuple(self._crossing[boundary])

    @cached_property
    def _crossing(self) -> list[list[str]]:
        """The values that cross each boundary."""
        crossing: list[list[str]] = [[] for _ in range(self.count)]
        for name, (first, last) in self.spans.items():
            for boundary in range(first, last):
                crossing[boundary].append(name)
        return crossing

    @cached_property
    def _bodies(self) -> list[list[Node]]:
        """The calls of each stage."""
        bodies: list[list[Node]] = [[] for _ in range(self.count)]
        for node in self.graph.calls:
            if node.name in self.places:
                bodies[self.places[node.name]].append(node)
        return bodies

    @cached_property
    def _inputs(self) -> list[Node]:
        """The inputs of the model."""
        return [node for node in self.graph.nodes if node.kind == "input"]

    @cached_property
    def _order(self) -> dict[str, int]:
        """The place of each node in the graph."""
        return {node.name: place for place, node in enumerate(self.graph.nodes)}

    @cached_property
    def _rows(self) -> PlanRows:
        """The rows of the plan, by what they are about."""
        return PlanRows(self.plan)

    def _in_order(self, names: Iterable[str]) -> tuple[Node, ...]:
        """Return the nodes of these names in the graph's order, each once."""
        places = sorted({self._order[name] for name in names})
        return tuple(self.graph.nodes[place] for place in places)

    def stage(self, number: int) -> Stage:
        """Return one stage."""
        last = number == self.count - 1
        takes = self.crossing(number - 1) if number else ()
        gives = self.returned if last else self.crossing(number)
        body, inputs = self._bodies[number], self._inputs
        mutations = tuple(
            (path, name) for path, name in self.graph.mutations if name not in self.spans
        )
        made = {value.name for node in body for value in node.results}
        wanted = dict.fromkeys(name for node in body for name in node.operands())
        wanted.update(dict.fromkeys(gives))
        outside = [name for name in wanted if name not in made and name not in takes]
        # Of the inputs alone: computed before the micro-batches, and given to each of them.
        makers = {name: self.graph.producers[name] for name in outside}
        inert = [name for name in outside if makers[name].kind == "call"]
        roots = [name for name in outside if makers[name].kind not in ("call", "input")]
        needed = _closure(self.graph, [*inert, *(name for _, name in mutations), *self.checks])
        before = self._in_order((*needed, *(node.name for node in inputs)))
        entering = dict.fromkeys(inert, self.whole)
        entering |= {name: self.travelling[name] for name in takes}
        given = [
            Node(name, "input", str(len(inputs) + place), (self.graph.values[name],))
            for place, name in enumerate((*inert, *takes))
        ]
        held = self._in_order(self.graph.producers[name].name for name in roots)
        graph = Graph((*inputs, *given, *held, *body), gives)
        # The first program also makes the values of buffers that are written after the step.
        before_graph = Graph(before, tuple(inert), mutations)
        outputs = self.outputs if last else tuple(self.travelling[name] for name in gives)
        return Stage(
            number,
            before_graph.verify(),
            graph.verify(),
            self._plan_of(before_graph, {}, (self.whole,) * len(inert)),
            self._plan_of(graph, entering, outputs),
            entering,
            takes,
            gives,
            tuple(node.target for node in held if node.kind == "parameter"),
            self.deferred,
            tuple(path for path, _ in self.written),
        )

    def _plan_of(
        self, graph: Graph, entering: Mapping[str, Layout], outputs: tuple[Layout, ...]
    ) -> Plan:
        """Return what the plan says of a part of its graph."""
        calls, rows = {node.name for node in graph.calls}, self._rows
        # What comes in as its readers want it is not converted once more.
        arrived = {
            name for name, layout in entering.items() if layout != self.made.get(name, layout)
        }
        return replace(
            self.plan,
            fingerprint=graph.fingerprint,
            parameters=rows.parameters(graph),
            ops=rows.ops(graph),
            conversions=tuple(
                _begun_here(row, calls, graph) for row in rows.conversions(graph, arrived)
            ),
            outputs=outputs,
            captured=None,
            # What follows from the inputs alone is computed before all micro-batches.
            recomputed=rows.recomputed(graph),
            remade=rows.remade(graph),
            pipeline=None,
        )


def _begun_here(row: Conversion, calls: Container[str], graph: Graph) -> Conversion:
    """Return a conversion as a stage has it: what would begin in an earlier stage begins with this
    one's first op. calls: names of the stage's ops.
    """
    if not row.begins or row.begins in calls:
        return row
    is_read = any(reader in calls for reader in row.readers)
    return replace(row, begins=graph.calls[0].name if is_read else "")


def cut_plan(graph: Graph, plan: Plan) -> tuple[Stage, ...]:
    """Return the stages of a pipeline's plan, in order.

    graph: of the plan. plan: one that says where its stages start.
    """
    assert plan.pipeline is not None
    cut = Cut(graph, plan, plan.pipeline.starts)
    return tuple(cut.stage(number) for number in range(cut.count))


def holders_of(stages: Iterable[Stage], pipeline: Pipeline) -> dict[str, tuple[int, ...]]:
    """Return the ranks whose stages read each parameter, by its path, in order.

    pipeline: says which ranks share out the stages.
    """
    holders: dict[str, set[int]] = {}
    for stage in stages:
        for path in stage.parameters:
            holders.setdefault(path, set()).add(pipeline.rank_of(stage.number))
    return {path: tuple(sorted(some)) for path, some in holders.items()}


def parameter_gradients(stage: Stage, plan: Plan) -> dict[str, Layout]:
    """Return the layouts in which programs leave the gradients of all parameters of a plan.

    stage: any one: all leave the gradient of a parameter alike.
    """
    return {
        row.path: layout_gradient(
            tuple(
                Replicate() if axis in stage.deferred.get(row.name, ()) else placement
                for axis, placement in enumerate(row.storage)
            )
        )
        for row in plan.parameters
    }


def reached_parameters(stages: Sequence[Stage], names: Iterable[str]) -> frozenset[str]:
    """Return the paths of the parameters that gradients of some values come to.

    stages: all, in order. names: of values that the last one gives.
    """
    waiting = set(names)
    paths: set[str] = set()
    for stage in reversed(stages):
        for node in reversed(stage.graph.nodes):
            if not any(value.name in waiting and value.requires_grad for value in node.results):
                continue
            if node.kind == "parameter":
                paths.add(node.target)
            waiting.update(node.operands())
    return frozenset(paths)


def _closure(graph: Graph, names: Iterable[str]) -> list[str]:
    """Return the names of all nodes that these values follow from, their own among them."""
    waiting = list(names)
    nodes: dict[str, None] = {}
    while waiting:
        node = graph.producers[waiting.pop()]
        if node.name not in nodes:
            nodes[node.name] = None
            waiting += node.operands()
    return list(nodes)
