"""The contents of a picture of threads: ops as rows, threads as lanes, and a mark where they meet.

This file decides what is drawn, threads_svg.py how it looks. Of equal blocks the first is drawn,
and ops that change nothing for any thread are drawn with the op before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from autoparallel.analysis.synchronization import Synchronization, ThreadSplits
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.repeated_blocks import Repeats
from autoparallel.graph.weight_values import weight_values
from autoparallel.threads import Passage, Thread, Threads, Treatment
from autoparallel.view.words import op_text

__all__ = ["Lane", "Mark", "Meeting", "Row", "ThreadsPicture", "draw_threads"]


class Mark(Enum):
    """A Mark says what happens to a thread in a row. The first that applies is drawn."""

    WHOLE = "needs all of it"
    KERNEL = "needs all of it, and can ask the other ranks"
    SUM = "ends in a sum"
    BORN = "begins"
    FREE = "passes free"


@dataclass(frozen=True, slots=True)
class Meeting:
    """A Meeting of a row and a lane.

    marks: what happens there, all of it. backward: the gradients of activations that are sums over
    the thread there. weights: whether gradients of parameters are. axes: names of the mesh axes on
    which the plan splits the thread there. is_carried: the row's result has the thread.
    """

    marks: tuple[Mark, ...]
    backward: tuple[str, ...] = ()
    weights: bool = False
    axes: tuple[str, ...] = ()
    is_carried: bool = False


@dataclass(slots=True)
class Row:
    """A Row is one or more ops that are drawn as one.

    where: the module's path. text: what it is called. ops: names, in order. meetings: by the number
    of the thread. merged: groups of threads that lie in one dim of the result. synchronizations:
    those that follow it, in words.
    """

    where: str
    text: str
    ops: list[str]
    meetings: dict[int, Meeting]
    merged: tuple[tuple[int, ...], ...]
    synchronizations: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lane:
    """A Lane is a thread that is drawn.

    verdict: whether it is good to split, in a sentence. kind: "split" for threads that take a sum
    at their end, "free" for those that take none forward, "whole" for those that something needs.
    """

    thread: Thread
    kind: str
    verdict: str


@dataclass(frozen=True, slots=True)
class ThreadsPicture:
    """A ThreadsPicture is all that is drawn.

    title: of the model, or of the module. repeats: for paths of blocks that stand for several, how
    many.
    """

    title: str
    lanes: tuple[Lane, ...]
    rows: tuple[Row, ...]
    repeats: Mapping[str, int]


def draw_threads(
    threads: Threads,
    title: str,
    repeats: Repeats | None = None,
    splits: ThreadSplits | None = None,
    within: str = "",
) -> ThreadsPicture:
    """Return the picture of a model's threads, or of those in one module.

    repeats: the equal blocks of the graph, of which the first is drawn. splits: of a plan, whose
    splits are drawn then. within: the path of the module, "" for the whole model.
    """
    return _Drawing(threads, title, repeats, splits, within).picture()


class _Drawing:
    """A picture in the making."""

    def __init__(
        self,
        threads: Threads,
        title: str,
        repeats: Repeats | None,
        splits: ThreadSplits | None,
        within: str,
    ) -> None:
        self.threads, self.title, self.splits, self.within = threads, title, splits, within
        self.graph: Graph = threads.graph
        self.weights = weight_values(self.graph)
        self.parameters = {n.result.name for n in self.graph.nodes if n.kind == "parameter"}
        self.repeats: dict[str, int] = {}
        self.hidden: set[str] = set()
        for block in repeats.blocks if repeats is not None and not within else ():
            if block.index:
                nodes = self.graph.nodes[block.start : block.stop]
                self.hidden.update(node.name for node in nodes)
                first = repeats.firsts[block.kind].path if repeats is not None else ""
                self.repeats[first] = self.repeats.get(first, 1) + 1

    def picture(self) -> ThreadsPicture:
        """Return the rows, and the lanes of the threads that they meet."""
        rows: list[Row] = []
        row_of: dict[str, Row] = {}
        for node in self.graph.calls:
            if not self.is_drawn(node):
                continue
            last = rows[-1] if rows else None
            if last is not None and self.goes_on(last, node, row_of):
                last.ops.append(node.name)
                self.add(last, node)
                row_of.update((value.name, last) for value in node.results)
                continue
            row = self.row(node)
            rows.append(row)
            row_of.update((value.name, row) for value in node.results)
        for row in rows:
            row.text = self.text(row)
        if self.splits is not None:
            self.synchronize(rows, self.splits)
        numbers = dict.fromkeys(
            number
            for row in rows
            for number, meeting in row.meetings.items()
            if meeting.is_carried or {Mark.SUM, Mark.KERNEL} & {*meeting.marks}
        )
        lanes = tuple(self.lane(self.threads.threads[number]) for number in self.ordered(numbers))
        return ThreadsPicture(self.title, lanes, tuple(rows), self.repeats)

    def is_drawn(self, node: Node) -> bool:
        """Return whether an op is part of the picture: not one that only prepares masks, or makes
        one weight of another, and none of the blocks that the first one stands for.
        """
        if self.within and not f"{node.where}.".startswith(f"{self.within}."):
            return False
        if node.name in self.hidden or node.results[0].name in self.weights:
            return False
        return any(value.requires_grad for value in node.results)

    def ordered(self, numbers: Iterable[int]) -> list[int]:
        """Return lanes in the order in which ops meet them: those of the inputs, which run through,
        then those of parameters, then those that ops bring in.
        """
        threads = self.threads.threads

        def rank(number: int) -> int:
            births = threads[number].births
            if any(birth.kind == "input" for birth in births):
                return 0
            return 2 if births and all(birth.kind == "call" for birth in births) else 1

        return sorted(numbers, key=rank)

    # -- rows

    def row(self, node: Node) -> Row:
        """Return the row of an op alone."""
        result = self.threads.dims[node.results[0].name]
        row = Row(node.where, "", [node.name], {}, tuple(d for d in result if len(d) > 1))
        self.add(row, node)
        return row

    def add(self, row: Row, node: Node) -> None:
        """Add what an op does with its threads to a row."""
        reads = node.operands()
        carried = {
            n for value in node.results for dim in self.threads.dims[value.name] for n in dim
        }
        read = {
            number
            for name in reads
            if name not in self.weights
            for dim in self.threads.dims[name]
            for number in dim
        }
        for passage in self.threads.passages[node.name]:
            axes = self.axes(node, passage)
            backward = tuple(n for n in passage.gradients if n not in self.weights)
            weights = any(name in self.weights for name in passage.gradients)
            for number in passage.threads:
                # What is looked up in a table is no dim of an activation, and yet ends here.
                looked_up = passage.treatment is Treatment.KERNEL and passage.is_end
                if number not in read and number not in carried and not looked_up:
                    continue
                is_born = number in carried and number not in read
                mark = _mark(passage, is_born)
                old = row.meetings.get(number, Meeting(()))
                split = axes if axes and self.is_split(node, number) else ()
                row.meetings[number] = Meeting(
                    tuple(dict.fromkeys((*old.marks, mark))),
                    tuple(dict.fromkeys((*old.backward, *backward))),
                    old.weights or weights,
                    tuple(dict.fromkeys((*old.axes, *split))),
                    number in carried,
                )

    def axes(self, node: Node, passage: Passage) -> tuple[str, ...]:
        """Return the names of the axes on which the plan splits the loop of a passage."""
        if self.splits is None:
            return ()
        chosen = self.splits.passages.get(node.name, ())
        names = [name for name, _ in self.splits.plan.mesh.axes]
        return tuple(name for name, one in zip(names, chosen, strict=False) if one == passage)

    def is_split(self, node: Node, number: int) -> bool:
        """Return whether the plan splits this thread in an op, of those that a loop is made of."""
        if self.splits is None:
            return False
        axes = range(len(self.splits.plan.mesh.axes))
        split = (self.splits.split(node.name, axis) for axis in axes)
        return any(thread is not None and thread.number == number for thread in split)

    def goes_on(self, row: Row, node: Node, row_of: Mapping[str, Row]) -> bool:
        """Return whether an op changes nothing for any thread: it passes all of them on, in the
        same dims, from the row before.
        """
        if node.where != row.where:
            return False
        reads = [name for name in node.operands() if name not in self.weights]
        if not any(row_of.get(name) is row for name in reads):
            return False
        if any(row_of.get(name) is not row for name in reads if name in row_of):
            return False
        passages = self.threads.passages[node.name]
        if any(passage.treatment is not Treatment.FREE for passage in passages):
            return False
        result = self.threads.dims[node.results[0].name]
        if tuple(dim for dim in result if len(dim) > 1) != row.merged:
            return False
        before = {number for number, meeting in row.meetings.items() if meeting.is_carried}
        return {number for dim in result for number in dim} == before

    def text(self, row: Row) -> str:
        """Name a row by its ops: the first, and how many more."""
        nodes = {node.name: node for node in self.graph.calls}
        names = list(dict.fromkeys(op_text(nodes[name].target) for name in row.ops))
        return ", ".join(names[:2]) + (f", {len(names) - 2} more" if len(names) > 2 else "")

    def synchronize(self, rows: Sequence[Row], splits: ThreadSplits) -> None:
        """Tell each synchronization in the row of the op that makes the value, or else reads it."""
        by_op = {name: row for row in rows for name in row.ops}
        axes = [name for name, _ in splits.plan.mesh.axes]
        for one in splits.synchronizations:
            if one.together or one.value in self.parameters:
                continue
            row = by_op.get(one.maker) or next(
                (by_op[reader] for reader in one.readers if reader in by_op), None
            )
            if row is not None:
                on = f" on {axes[one.axis]}" if len(axes) > 1 else ""
                text = f"{_short(one)}{on}: {splits.sentence(one).partition(': ')[2]}"
                row.synchronizations.append((one.phase, text))

    # -- lanes

    def lane(self, thread: Thread) -> Lane:
        """Return the lane of a thread, with the verdict on splitting it."""
        passages = [p for p in thread.passages if self.is_met(p)]
        whole = [p for p in passages if p.treatment is Treatment.WHOLE]
        summed = [p for p in passages if _is_summed(p)]
        kernels = [p for p in passages if p.treatment is Treatment.KERNEL and p not in summed]
        gradients = {n for p in passages for n in p.gradients}
        backward = [n for n in gradients if n not in self.weights]
        weights = [n for n in gradients if n in self.weights]
        if whole:
            ops = f"{_ops(self.graph, whole)} needs all of it"
            if len(summed) > 1:
                return Lane(thread, "whole", f"{ops}, and {len(summed)} products sum it")
            if not summed and len(passages) > 4 * len(whole):
                return Lane(thread, "free", f"{ops}; elsewhere it is free to be split")
            return Lane(thread, "whole", ops)
        if not summed and weights:
            ends = f" but for {_ops(self.graph, kernels)}" if kernels else ""
            text = f"free forward{ends}; gradients of weights are sums over it: data parallelism"
            return Lane(thread, "free", text)
        if len(summed) == len(backward) == 1 and not kernels:
            text = (
                "free up to its one sum: split it, by columns where it begins, by rows at its end"
            )
            return Lane(thread, "split", text)
        parts = [f"{_times(len(summed), 'sum')} forward"] if summed else []
        parts += [f"{_times(len(backward), 'sum')} backward"] if backward else []
        parts += [f"{_ops(self.graph, kernels)} to ask the other ranks"] if kernels else []
        kind = "free" if len(summed) < 2 else "whole"
        return Lane(thread, kind, f"a split takes {', '.join(parts) or 'nothing'}")

    def is_met(self, passage: Passage) -> bool:
        """Return whether a passage is one of an op that is drawn."""
        nodes = self.graph.producers
        node = nodes.get(passage.call)
        return node is None or self.is_drawn(node)


def _mark(passage: Passage, is_born: bool) -> Mark:
    """Return what one passage is drawn as. is_born: it brings the thread into what is computed."""
    if passage.treatment is Treatment.WHOLE:
        return Mark.WHOLE
    if _is_summed(passage):
        return Mark.SUM
    if passage.treatment is Treatment.KERNEL:
        return Mark.KERNEL
    return Mark.BORN if is_born and passage.results else Mark.FREE


def _is_summed(passage: Passage) -> bool:
    """Return whether a thread ends in a sum: also what a part of a table is looked up for, whose
    rows on other ranks count as zeros.
    """
    looked_up = passage.is_end and passage.is_pending and not passage.collectives
    return passage.treatment is Treatment.SUMMED or (
        passage.treatment is Treatment.KERNEL and looked_up
    )


def _short(one: Synchronization) -> str:
    """Return the collective as the field writes it."""
    return one.collective.value.replace("_", "-")


def _times(count: int, name: str) -> str:
    """Return a count with its noun: "1 sum", "3 sums"."""
    return f"{count} {name}{'s' if count != 1 else ''}"


def _ops(graph: Graph, passages: Sequence[Passage]) -> str:
    """Name the ops that need all of a thread: each kind once."""
    nodes = {node.name: node for node in graph.calls}
    names = list(dict.fromkeys(op_text(nodes[p.call].target) for p in passages))
    return " and ".join(name.replace("_", " ") for name in names[:2])
