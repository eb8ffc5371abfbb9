"""Elements that the page of a plan draws: ops, collectives and inputs, with all told of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoparallel.analysis.synchronization import Synchronization, ThreadSplits
from autoparallel.analysis.thread_splits import thread_splits
from autoparallel.placement import Layout, Partial, Replicate, Shard
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan
from autoparallel.planning.alternatives import Alternatives, find_alternatives
from autoparallel.support.module_paths import join_path
from autoparallel.support.units import seconds_text
from autoparallel.view.size_names import shape_text, size_names
from autoparallel.view.words import Words, collective_text, op_text

__all__ = ["Element", "Elements"]

# Alternatives that are told of an op, the cheapest ones.
_ALTERNATIVES = 6
# Ops that prepare masks, positions and labels from inputs alone are drawn in a box of their own,
# where there are more than so many in a module.
_FEW, _PREPARES = 3, "(masks and positions)"
_NOTHING = Alternatives()


@dataclass(frozen=True, slots=True)
class Element:
    """Something that is drawn. where: path of its module. row: its data. content: what it is,
    without names.
    """

    where: str
    row: dict[str, Any]
    content: Hashable


class Elements:
    """All that is drawn of a plan.

    elements: the boxes, in the order of the program. edges: pairs of their numbers, from what makes
    a value to what reads it.
    """

    def __init__(
        self, plan: Plan, explanations: Mapping[str, Sequence[str]], alternatives: bool
    ) -> None:
        self.plan, self.explanations = plan, explanations
        self.words = Words(plan)
        self.elements: list[Element] = []
        self.number: dict[str, int] = {}  # of the element that makes a value
        self.edges: list[tuple[int, int]] = []
        self.shapes: dict[str, tuple[str, str]] = {}  # per value: its shape, and in threads
        self.homes: dict[str, tuple[str, str]] = {}  # per value: its part, and its name there
        self.prepared: dict[str, str] = {}  # per op that only prepares: where it is drawn
        self.places = {parameter.name: at for at, parameter in enumerate(plan.parameters)}
        self.splits: dict[str, ThreadSplits] = {}  # by the prefix of the part's names
        self.by_value: dict[str, dict[str, list[Synchronization]]] = {}
        self.alternatives: dict[str, Alternatives] = {}  # by the prefix of the part's names
        for prefix, part in _programs(plan):
            self.read_graph(prefix, part)
            if alternatives:
                self.alternatives[prefix] = find_alternatives(part)
        self.build()

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
        # A parameter has the name of its path in the model, where the plan is in parts.
        paths = {one.name: join_path(prefix.rstrip("/"), one.path) for one in part.parameters}
        for name, value in graph.values.items():
            full = paths[name] if prefix and name in paths else prefix + name
            self.homes.setdefault(full, (prefix, name))
            kind = str(value.dtype).removeprefix("torch.")
            shape = shape_text(", ".join(map(str, value.shape)), names)
            self.shapes[full] = f"{kind}[{shape}]", splits.threads.shape(name)

    def build(self) -> None:
        """Make all elements, and the edges between them."""
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

    def add(self, element: Element) -> int:
        """Add an element, and return its number."""
        self.elements.append(element)
        return len(self.elements) - 1

    def input(self, value: str) -> None:
        """Add an input, a buffer or a constant that an op reads."""
        if value in self.number:
            return
        shape, threads = self.shapes.get(value, ("", ""))
        row = {"k": "input", "n": self.words.source(value), "out": [[value, shape, threads, ""]]}
        self.number[value] = self.add(Element("", row, value))

    def op(self, op: OpChoice) -> None:
        """Add an op."""
        words = self.words
        prefix, name = self.local(op.name)
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
            "alt": self.instead(op),
            "params": [
                self.places[origin]
                for origin in dict.fromkeys(map(words.origin, op.reads))
                if origin in self.places
            ],
        }
        row.update({key: value for key, value in optional.items() if value})
        splits = self.splits.get(prefix)
        if splits is not None:
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
        number = self.add(Element(self.prepared.get(op.name, op.where), row, content))
        self.number.update(dict.fromkeys(op.makes, number))

    def instead(self, op: OpChoice) -> list[list[Any]]:
        """Return what an op could have done instead: in words, extra seconds with all else as
        planned and with all else planned anew (None where that is unknown), and why it lost.
        """
        rows: dict[str, list[Any]] = {}
        prefix, name = self.local(op.name)
        for one in self.alternatives.get(prefix, _NOTHING).ops.get(name, ()):
            tensors = (*one.strategy.operands, *one.strategy.results)
            told = self.doing(op, tensors)
            anew = one.anew if math.isfinite(one.anew) else None
            if told == self.doing(op, (*op.operands, *op.results)):
                continue
            if told in rows:
                # Of what reads alike, the cheapest is told.
                least = [each for each in (rows[told][2], anew) if each is not None]
                rows[told][2] = min(least, default=None)
                continue
            moved = one.seconds - one.own
            parts = [("computing", one.own), ("moving", moved)]
            # Of sums in another order, roundings are left.
            least_seconds = 1e-6 * max(abs(one.own), abs(moved))
            why = ", ".join(f"{what} {_signed(s)}" for what, s in parts if abs(s) > least_seconds)
            if one.seconds < 0:
                why += "; what speaks against it is memory, the step that overlaps, or the split"
            rows[told] = [told, one.seconds, anew, why]
        return list(rows.values())[:_ALTERNATIVES]

    def stored_instead(self, parameter: ParameterChoice) -> list[list[Any]]:
        """Return how a parameter could be stored instead, and the extra seconds with all else
        planned anew.
        """
        prefix, name = self.local(parameter.name)
        rows: dict[str, float] = {}
        for way, seconds in self.alternatives.get(prefix, _NOTHING).parameters.get(name, ()):
            # Of what reads alike, the cheapest is told, which comes first.
            rows.setdefault(self.words.stored(way), seconds)
        rows.pop(self.words.stored(parameter), None)
        return [[told, seconds] for told, seconds in rows.items()][:_ALTERNATIVES]

    def done_without(self, conversion: Conversion) -> list[list[Any]]:
        """Return the ways to do without a conversion, the cheaper first, and the extra seconds with
        all else planned anew; None where no plan does that.
        """
        prefix, name = self.local(conversion.value)
        known = self.alternatives.get(prefix, _NOTHING).redistributions
        without = known.get((name, conversion.target))
        if without is None or math.isnan(without.unread):
            return []
        seconds = (without.made, without.unread)
        rows = sorted(zip(seconds, self.words.without(conversion), strict=True))
        return [[told, extra if math.isfinite(extra) else None] for extra, told in rows]

    def doing(self, op: OpChoice, tensors: Sequence[Layout]) -> str:
        """Say what an op does whose tensors lie so: the threads that it splits, on each axis."""
        splits = self.splits[self.local(op.name)[0]]
        names = [self.local(value)[1] for value in (*op.reads, *op.makes)]
        count = len(op.reads)
        told = []
        for axis in range(len(self.plan.mesh.axes)):
            cut = next(
                (
                    splits.named(row, shard)
                    for value, layout in zip(names, tensors, strict=True)
                    if isinstance(shard := layout[axis], Shard)
                    and (row := splits.threads.dims[value][shard.dim])
                ),
                "",
            )
            if cut:
                told.append((f"split {cut}", axis))
            elif any(isinstance(layout[axis], Partial) for layout in tensors[count:]):
                told.append(("pass a pending sum on", axis))
            elif any(isinstance(layout[axis], Replicate) for layout in tensors):
                told.append(("whole on all, each for its part", axis))
            else:
                told.append(("whole on all", axis))
        return self.words.by_axes(told)

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
        maker = self.words.producers.get(conversion.value)
        optional = {
            "line": maker.line if maker is not None else "",
            "alt": self.done_without(conversion),
        }
        row.update({key: value for key, value in optional.items() if value})
        content = ("sync", conversion.source, conversion.target, row["t"])
        self.number[_pill(conversion)] = self.add(Element(where, row, content))

    def causes(self, conversion: Conversion) -> list[str]:
        """Return why a conversion communicates, a sentence for each collective."""
        prefix, name = self.local(conversion.value)
        splits = self.splits.get(prefix)
        if splits is None:
            return []
        readers = {reader.removeprefix(prefix) for reader in conversion.readers}
        told = [
            f"{one.phase}{self.words.on(one.axis)}: {splits.sentence(one)}"
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

    def local(self, name: str) -> tuple[str, str]:
        """Return the part that an op or value belongs to, as the prefix of its names in the plan,
        and its name in that part.
        """
        if name in self.homes:
            return self.homes[name]
        prefix = next((one for one in self.splits if one and name.startswith(one)), "")
        return prefix, name.removeprefix(prefix)


def _programs(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield the plans of what is traced, each with the prefix of its names in the whole plan."""
    if not plan.parts:
        yield "", plan
    for part in plan.parts:
        for path in part.paths:
            yield f"{path}/", part.plan


def _signed(seconds: float) -> str:
    """Return seconds with their sign."""
    return ("+" if seconds > 0 else "−") + seconds_text(abs(seconds))


def _pill(conversion: Conversion) -> str:
    """Return the key of a conversion's element, which no value's name is."""
    return f"{conversion.value} -> {conversion.target}"
