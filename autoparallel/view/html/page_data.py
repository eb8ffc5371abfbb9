"""The data of a plan's page: what is drawn, and what is told of each thing that can be chosen."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.synchronization import Synchronization, ThreadSplits
from autoparallel.analysis.thread_splits import thread_splits
from autoparallel.analysis.timeline import timeline
from autoparallel.analysis.training_step import Timeline
from autoparallel.placement import Layout
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan
from autoparallel.support.module_paths import join_path
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.view.html.module_tree import Module, module_tree
from autoparallel.view.size_names import shape_text, size_names
from autoparallel.view.threads_svg import threads_svg
from autoparallel.view.words import Words, collective_text, op_text

__all__ = ["page_data"]

# Rows of the table of what takes memory.
_ITEMS = 60
# Ops that prepare masks, positions and labels from inputs alone are drawn in a box of their own,
# where there are more than so many in a module.
_FEW, _PREPARES = 3, "(masks and positions)"
# Rows of a timeline's text that the plan's own has not.
_OF_THE_STEP = ("passes", "communicating", "utilization")


def page_data(plan: Plan, explanations: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return what the page shows, as JSON can hold it.

    plan: it may have been read from a text; shapes, threads and the table of memory are then left
    out, and the page says so. explanations: more sentences about an op, by its name.
    """
    return _PageData(plan, explanations).rows()


@dataclass(frozen=True, slots=True)
class _Element:
    """Something that is drawn. where: path of its module. row: its data. content: what it is,
    without names.
    """

    where: str
    row: dict[str, Any]
    content: Hashable


class _PageData:
    """The data of one page in the making."""

    def __init__(self, plan: Plan, explanations: Mapping[str, Sequence[str]]) -> None:
        self.plan, self.explanations = plan, explanations
        self.words = Words(plan)
        self.elements: list[_Element] = []
        self.number: dict[str, int] = {}  # of the element that makes a value
        self.edges: list[tuple[int, int]] = []
        self.shapes: dict[str, tuple[str, str]] = {}  # per value: its shape, and in threads
        self.prepared: dict[str, str] = {}  # per op that only prepares: where it is drawn
        self.places = {parameter.name: at for at, parameter in enumerate(plan.parameters)}
        self.splits: dict[str, ThreadSplits] = {}  # by the prefix of the part's names
        self.by_value: dict[str, dict[str, list[Synchronization]]] = {}
        for prefix, part in _programs(plan):
            self.read_graph(prefix, part)

    def read_graph(self, prefix: str, part: Plan) -> None:
        """Read shapes and threads off the graph of the plan, or of one of its parts."""
        if part.captured is None:
            return
        splits = thread_splits(part)
        self.splits[prefix] = splits
        by_value = self.by_value.setdefault(prefix, {})
        for one in splits.synchronizations:
            by_value.setdefault(one.value, []).append(one)
        names = size_names(part.inputs)
        graph = part.captured.graph
        touched = {node.name for node in graph.nodes if node.kind == "parameter"}
        prepared: dict[str, list[str]] = {}
        for node in graph.calls:
            grad = any(value.requires_grad for value in node.results)
            if grad or any(name in touched for name in node.operands()):
                touched.update(value.name for value in node.results)
            elif not any(name.isdigit() for name in node.where.split(".")):
                prepared.setdefault(node.where, []).append(prefix + node.name)
        for where, ops in prepared.items():
            # A few are no clutter.
            if len(ops) > _FEW:
                path = join_path(prefix.rstrip("/"), where)
                self.prepared.update(dict.fromkeys(ops, join_path(path, _PREPARES)))
        for name, value in graph.values.items():
            kind = str(value.dtype).removeprefix("torch.")
            shape = shape_text(", ".join(map(str, value.shape)), names)
            self.shapes[prefix + name] = f"{kind}[{shape}]", splits.threads.shape(name)

    def rows(self) -> dict[str, Any]:
        """Return all data."""
        plan = self.plan
        of_value: dict[str, list[Conversion]] = {}
        for conversion in self.drawn():
            of_value.setdefault(conversion.value, []).append(conversion)
        for op in plan.ops:
            for value in op.reads:
                if value not in self.words.producers and value not in self.words.parameters:
                    self.input(value)
        for op in plan.ops:
            # What no op makes is converted where it is first read.
            for value in op.reads:
                if value not in self.words.producers:
                    for conversion in of_value.get(value, ()):
                        if op.name in conversion.readers:
                            self.pill(conversion, op.where)
            self.op(op)
            for value in op.makes:
                for conversion in of_value.get(value, ()):
                    self.pill(conversion, op.where)
        self.connect()
        tree = module_tree(
            [element.where for element in self.elements],
            [element.content for element in self.elements],
        )
        step = timeline(plan)
        return {
            "model": plan.model,
            "mesh": [list(axis) for axis in plan.mesh.axes],
            "about": self.about(step),
            "tree": _tree_rows(tree),
            "elements": [element.row for element in self.elements],
            "edges": self.edges,
            "parameters": [self.parameter(parameter) for parameter in plan.parameters],
            "memory": self.memory(),
            "timeline": _timeline_rows(step),
            "threads": threads_svg(plan) if plan.captured is not None else "",
            "table": str(plan.threads()) if plan.captured is not None else "",
            "stays": [str(stays) for stays in plan.breaks],
            "traced": plan.is_traced,
        }

    # -- elements

    def drawn(self) -> list[Conversion]:
        """Return the conversions that are drawn: those that communicate, but for gradients of
        parameters that are summed together at the end.
        """
        return [
            conversion
            for conversion in self.plan.conversions
            if self.words.sent(conversion)
            and not (conversion.value in self.words.parameters and conversion.together)
        ]

    def add(self, element: _Element) -> int:
        """Add an element, and return its number."""
        self.elements.append(element)
        return len(self.elements) - 1

    def input(self, value: str) -> None:
        """Add an input, a buffer or a constant that an op reads."""
        if value in self.number:
            return
        shape, threads = self.shapes.get(value, ("", ""))
        row = {"k": "input", "n": self.words.source(value), "out": [[value, shape, threads, ""]]}
        self.number[value] = self.add(_Element("", row, value))

    def op(self, op: OpChoice) -> None:
        """Add an op."""
        words = self.words
        prefix = self.prefix(op.name)
        row: dict[str, Any] = {
            "k": "op",
            "n": op.name,
            "t": op_text(op.target),
            "target": op.target,
            "line": op.line,
            "s": [op.seconds, op.forward_seconds],
            "p": ["".join(str(p)[0] for p in op.results[0]) if op.results else ""],
            "in": [
                self.tensor(value, layout, words.converted.get((value, op.name)))
                for value, layout in zip(op.reads, op.operands, strict=True)
            ],
            "out": [
                self.tensor(value, layout)
                for value, layout in zip(op.makes, op.results, strict=True)
            ],
        }
        optional = {
            "role": words.role(op),
            "kernels": [kernel for kernel in op.kernels if kernel],
            "reason": op.reason,
            "added": op.added,
            "rule": op.discovered,
            "flops": [op.flops, op.whole_flops] if op.whole_flops else [],
            "why": list(self.explanations.get(op.name, ())),
            "params": [
                self.places[origin]
                for origin in dict.fromkeys(map(words.origin, op.reads))
                if origin in self.places
            ],
        }
        row.update({key: value for key, value in optional.items() if value})
        splits = self.splits.get(prefix)
        if splits is not None:
            name = op.name.removeprefix(prefix)
            row["split"] = [
                thread.name if (thread := splits.split(name, axis)) is not None else ""
                for axis in range(len(self.plan.mesh.axes))
            ]
            row["loops"] = [
                [
                    " * ".join(splits.threads.threads[number].name for number in passage.threads),
                    passage.treatment.value,
                    passage.kernel or passage.reason,
                    len(passage.gradients),
                ]
                for passage in splits.threads.passages.get(name, ())
            ]
        content = (
            op.target,
            op.operands,
            op.results,
            op.kernels,
            tuple(
                (p.shape, p.storage, p.gradient, p.state)
                for value in op.reads
                if (p := words.parameters.get(value)) is not None
            ),
        )
        number = self.add(_Element(self.prepared.get(op.name, op.where), row, content))
        self.number.update(dict.fromkeys(op.makes, number))

    def pill(self, conversion: Conversion, where: str) -> None:
        """Add a conversion that communicates, in the module of who makes or first reads it."""
        if _pill(conversion) in self.number:
            return
        sent = self.words.sent(conversion)
        axes = self.words.axes
        row = {
            "k": "sync",
            "n": self.words.value(conversion.value),
            "t": " + ".join(dict.fromkeys(collective_text(one.collective) for one in sent)),
            "moves": [
                [one.phase, axes[one.step.axis], collective_text(one.collective), one.nbytes]
                for one in sent
            ],
            "change": self.words.change(conversion),
            "shape": self.words.shape(conversion),
            "threads": self.shapes.get(conversion.value, ("", ""))[1],
            "s": [conversion.seconds, 0.0],
            "readers": list(conversion.readers),
            "why": self.causes(conversion),
            "again": conversion.again,
            "nb": conversion.nbytes,
        }
        content = ("sync", conversion.source, conversion.target, row["t"])
        self.number[_pill(conversion)] = self.add(_Element(where, row, content))

    def causes(self, conversion: Conversion) -> list[str]:
        """Return why a conversion communicates, a sentence for each collective."""
        prefix = self.prefix(conversion.value)
        splits = self.splits.get(prefix)
        if splits is None:
            return []
        name = conversion.value.removeprefix(prefix)
        readers = {reader.removeprefix(prefix) for reader in conversion.readers}
        told = [
            f"{one.phase}: {splits.sentence(one)}"
            for one in self.by_value[prefix].get(name, ())
            if readers & {*one.readers}
        ]
        return list(dict.fromkeys(told))

    def tensor(self, value: str, layout: Layout, conversion: Conversion | None = None) -> list[str]:
        """Return [name, shape, shape in threads, layout, how it got it]."""
        shape, threads = self.shapes.get(value, ("", ""))
        parameter = self.words.parameters.get(value)
        name = parameter.path if parameter is not None else self.words.value(value)
        row = [name, shape, threads, self.words.layout(layout)]
        return [*row, self.words.change(conversion)] if conversion is not None else row

    def connect(self) -> None:
        """Draw the edges: from maker to reader, through a pill where there is one."""
        edges: dict[tuple[int, int], None] = {}
        for op in self.plan.ops:
            target = self.number[op.makes[0]] if op.makes else None
            for value in op.reads:
                if target is None:
                    continue
                conversion = self.words.converted.get((value, op.name))
                pill = self.number.get(_pill(conversion)) if conversion is not None else None
                source = self.number.get(value)
                if pill is not None:
                    edges[pill, target] = None
                    if source is not None:
                        edges[source, pill] = None
                elif source is not None:
                    edges[source, target] = None
        for conversion in self.plan.conversions:
            pill, source = self.number.get(_pill(conversion)), self.number.get(conversion.value)
            if pill is not None and source is not None:
                edges[source, pill] = None
        self.edges = list(edges)

    def prefix(self, name: str) -> str:
        """Return the part that a name belongs to, as the prefix of its names."""
        return next((prefix for prefix in self.splits if prefix and name.startswith(prefix)), "")

    # -- tables

    def about(self, step: Timeline) -> list[list[str]]:
        """Return the rows at the top of the page."""
        lines = str(self.plan).splitlines()
        lines += [line for line in str(step).splitlines() if line.startswith(_OF_THE_STEP)]
        rows = (line.partition(" ") for line in lines)
        return [[name, text.strip()] for name, _, text in rows]

    def parameter(self, parameter: ParameterChoice) -> list[Any]:
        """Return the row of a parameter."""
        words = self.words
        return [
            parameter.path,
            ", ".join(map(str, parameter.shape)),
            bytes_text(parameter.nbytes),
            words.split(parameter),
            words.layout(parameter.storage),
            words.layout(parameter.gradient),
            words.layout(parameter.state),
            parameter.reason,
            seconds_text(parameter.added) if parameter.added else "",
        ]

    def memory(self) -> dict[str, Any]:
        """Return the bytes by category, the limit, and what takes most where the graph is there."""
        plan = self.plan
        items = memory_of(plan).items[:_ITEMS] if plan.is_traced else ()
        return {
            "rows": [[name.replace("_", " "), nbytes] for name, nbytes in plan.memory],
            "limit": plan.memory_limit,
            "items": [
                [item.category.replace("_", " "), item.name, item.where, item.count, item.nbytes]
                for item in items
            ],
        }


def _programs(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield the plans of what is traced, each with the prefix of its names in the whole plan."""
    if not plan.parts:
        yield "", plan
    for part in plan.parts:
        for path in part.paths:
            yield f"{path}/", part.plan


def _pill(conversion: Conversion) -> str:
    """Return the key of a conversion's element, which no value's name is."""
    return f"{conversion.value} -> {conversion.target}"


def _tree_rows(module: Module) -> dict[str, Any]:
    """Return a module with all in it, as JSON can hold it."""
    rows: dict[str, Any] = {"p": module.path}
    if module.elements:
        rows["e"] = module.elements
    if module.children:
        rows["c"] = [_tree_rows(child) for child in module.children.values()]
    if module.runs:
        place = {name: at for at, name in enumerate(module.children)}
        rows["r"] = [[name, place[names[0]], len(names)] for name, names in module.runs]
    return rows


def _timeline_rows(step: Timeline) -> dict[str, Any]:
    """Return the events of a step in columns; times are whole nanoseconds, to be short."""
    phases = list(dict.fromkeys(event.phase for event in step.events))
    streams = list(dict.fromkeys(event.stream for event in step.events))
    names = list(dict.fromkeys(event.name for event in step.events))
    at = {name: number for number, name in enumerate(names)}
    return {
        "seconds": step.seconds,
        "phases": phases,
        "streams": streams,
        "names": names,
        "events": [
            [
                at[event.name],
                streams.index(event.stream),
                phases.index(event.phase),
                round(event.start * 1e9),
                round(event.seconds * 1e9),
            ]
            for event in step.events
        ],
    }
