"""The contents of a picture of a plan: boxes of ops, pills of collectives, and arrows.

This file decides what is drawn, and dot.py how it looks. Views become part of arrows, ops that
belong together become one box, and a run of sibling modules (x.0, x.1, ...) that do the same in the
same way is drawn once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from autoparallel.placement import Invariant, Layout, Movement
from autoparallel.plan import Conversion, OpChoice, Plan
from autoparallel.support.module_paths import join_path
from autoparallel.view.folded_rows import index_text
from autoparallel.view.words import Words, is_unary

__all__ = ["Arrow", "Box", "Picture", "Pill", "draw"]

# Moves that send nothing, as labels of arrows.
_LOCAL_MOVES = {
    Movement.SLICE: "sliced",
    Movement.PAD: "padded with zeros",
    Movement.KEEP_ON_FIRST: "kept on the first rank",
}


@dataclass(slots=True)
class Box:
    """A Box is a run of ops that are drawn as one.

    name: unique in the picture. where: the path of the ops' module. ops: in the plan's order. kind:
    "op"; "side" for work that all ranks do on the inputs; "input", "output" and "next" (the next of
    a run of layers) have no ops.
    """

    name: str
    where: str
    ops: list[OpChoice] = field(default_factory=list)
    kind: str = "op"

    @property
    def layout(self) -> Layout | None:
        """The layout of the last op's first result; None for a box without ops."""
        return self.ops[-1].results[0] if self.ops and self.ops[-1].results else None


@dataclass(frozen=True, slots=True)
class Pill:
    """A Pill is a conversion that communicates, drawn between a box and its readers.

    name: unique in the picture. where: the path of the module that both ends are in.
    """

    name: str
    where: str
    conversion: Conversion


@dataclass(frozen=True, slots=True)
class Arrow:
    """An Arrow leads from a box or pill to another, both by name.

    label: what happens on the way where no communication is needed, as "sliced"; often empty.
    """

    source: str
    target: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A Picture is all that is drawn, in the plan's order.

    repeats: for the path of the module that stands for a run of equal siblings, the name of the
    run ("h.{0..11}") and the number of modules in it.
    """

    boxes: tuple[Box, ...]
    pills: tuple[Pill, ...]
    arrows: tuple[Arrow, ...]
    repeats: dict[str, tuple[str, int]]


def draw(plan: Plan, folded: bool = True, within: str = "") -> Picture:
    """Return the picture of a plan, or of one module of it.

    folded: runs of sibling modules that are planned alike are drawn once. within: the path of the
    module, "" for the whole model. A module without ops gives a picture without boxes.

    >>> import autoparallel, torch
    >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    >>> plan = autoparallel.make_plan(layers, 2, example_inputs=torch.ones(4, 8))
    >>> [(box.where, box.kind) for box in draw(plan).boxes if box.ops]
    [('0', 'op'), ('1', 'op')]
    """
    return _Drawing(plan, folded, within).picture()


class _Drawing:
    """A _Drawing is a picture in the making."""

    def __init__(self, plan: Plan, folded: bool, within: str) -> None:
        """Choose the ops that are drawn: those within the module, of repeated ones the first."""
        self.plan = plan
        self.words = Words(plan)
        self.within = within
        self.image: dict[str, str] = {}  # value of a hidden op -> value of the one that is drawn
        self.hidden: set[str] = set()
        self.repeats: dict[str, tuple[str, int]] = {}
        inside = [op for op in plan.ops if not within or f"{op.where}.".startswith(f"{within}.")]
        if folded:
            self._fold(inside)
        self.ops = [op for op in inside if op.name not in self.hidden]
        self.alias: dict[str, str] = {}  # result of a view -> the value that it views
        self.boxes: list[Box] = []
        self.box_of: dict[str, Box] = {}  # by value
        self.last: Box | None = None
        self.pills: dict[tuple[str, Layout], Pill] = {}
        self.arrows: dict[Arrow, None] = {}

    def picture(self) -> Picture:
        """Make all boxes first, then the arrows and pills between them."""
        side = self._side_work()
        for op in self.ops:
            if op.name in side:
                box = side[op.name]
                if box is not None:
                    self._put(op, box)
                    continue
            if op.name in side or self._is_view(op):
                self.alias.update(dict.fromkeys(op.makes, op.reads[0]))
                continue
            if self.last is None or not self._goes_on(self.last, op):
                self.last = Box(op.name, op.where)
            self._put(op, self.last)
        for box in list(self.boxes):
            for op in box.ops:
                self._connect(op, box)
        self._ends()
        return Picture(
            tuple(self.boxes), tuple(self.pills.values()), tuple(self.arrows), self.repeats
        )

    # -- repeated modules

    def _fold(self, ops: list[OpChoice]) -> None:
        """Find runs of siblings with one structure, outermost first; hide all but the first."""
        paths = [op.where.split(".") for op in ops]
        start = self.within.count(".") + 1 if self.within else 0
        for position in range(start, max(map(len, paths), default=0)):
            members: dict[str, dict[int, list[OpChoice]]] = {}
            for op, parts in zip(ops, paths, strict=True):
                if op.name in self.hidden or len(parts) <= position:
                    continue
                if parts[position].isdigit():
                    prefix = ".".join(parts[:position])
                    members.setdefault(prefix, {}).setdefault(int(parts[position]), []).append(op)
            for prefix, siblings in members.items():
                self._fold_siblings(prefix, siblings)

    def _fold_siblings(self, prefix: str, siblings: dict[int, list[OpChoice]]) -> None:
        """Fold runs among the modules `prefix`.0, `prefix`.1, ..., whose ops are by number."""
        run: list[int] = []
        last: Hashable = None
        for index in sorted(siblings):
            path = join_path(prefix, str(index))
            signature = self._signature(path, siblings[index])
            if run and signature == last and index == run[-1] + 1:
                run.append(index)
                self._hide(siblings[run[0]], siblings[index])
            else:
                run, last = [index], signature
            if len(run) > 1:
                first = join_path(prefix, str(run[0]))
                name = join_path(prefix, index_text(run))
                self.repeats[first] = name, len(run)

    def _hide(self, drawn: list[OpChoice], same: list[OpChoice]) -> None:
        """Let the ops of one module stand for those of another."""
        for one, other in zip(drawn, same, strict=True):
            self.hidden.add(other.name)
            self.image.update(zip(other.makes, one.makes, strict=True))

    def _signature(self, path: str, ops: list[OpChoice]) -> Hashable:
        """Return a key that is equal for modules whose ops do the same in the same way.

        path: of the module. Values made in it are numbered, parameters are named from it on, and
        all that comes from outside is equal, so that the key is free of the module's own names.
        """
        numbers: dict[str, int] = {}
        rows = []
        for op in ops:
            reads: list[Hashable] = []
            for value in op.reads:
                parameter = self.words.parameters.get(value)
                conversion = self.words.converted.get((value, op.name))
                if parameter is not None:
                    inside = parameter.path.startswith(path + ".")
                    local = parameter.path[len(path) :] if inside else parameter.path
                    reads.append((local, parameter.shape, parameter.storage))
                elif value in numbers:
                    move = conversion and (conversion.source, conversion.target)
                    reads.append((numbers[value], move))
                else:
                    reads.append("outside")
            first = len(numbers)
            numbers.update({value: first + place for place, value in enumerate(op.makes)})
            rows.append(
                (
                    op.target,
                    op.where[len(path) :],
                    op.kernels,
                    op.operands,
                    op.results,
                    tuple(reads),
                )
            )
        return tuple(rows)

    # -- boxes

    def _put(self, op: OpChoice, box: Box) -> None:
        """Add an op to a box, and the box to the picture if it is new."""
        if not box.ops:
            self.boxes.append(box)
        box.ops.append(op)
        self.box_of.update(dict.fromkeys(op.makes, box))

    def _data(self, op: OpChoice) -> list[str]:
        """Return the values that an op reads but for parameters."""
        return [value for value in op.reads if value not in self.words.parameters]

    def _is_view(self, op: OpChoice) -> bool:
        """Return whether an op takes no time and has one operand: it is drawn as part of an
        arrow.
        """
        if op.seconds or not is_unary(op):
            return False
        return not self.words.sent(self.words.converted.get((op.reads[0], op.name)))

    def _side_work(self) -> dict[str, Box | None]:
        """Return the ops that prepare masks, positions and labels, whole on all ranks: by
        name, their box.

            These depend on inputs alone. What hangs together is one box; None stands for ops that
            are part of an arrow: chains of ops with one operand, and those within a repeated layer.
        """
        from_inputs: set[str] = set()
        groups: dict[str, list[OpChoice]] = {}  # by value: all that hangs together with it
        side: dict[str, Box | None] = {}
        for op in self.ops:
            from_side = all(
                value in from_inputs or value not in self.words.producers
                for value in self._data(op)
            )
            takes_part = len(self._data(op)) == len(op.reads) and from_side
            whole = all(set(map(type, layout)) == {Invariant} for layout in op.results)
            if not takes_part or not whole or op.whole_flops or any(op.kernels) or self.within:
                continue
            repeated = any(part.isdigit() for part in op.where.split("."))
            if repeated and not is_unary(op):
                continue
            from_inputs.update(op.makes)
            if repeated:
                side[op.name] = None
                continue
            group = [op]
            for value in op.reads:
                other = groups.get(value, group)
                if other is not group:
                    group += other
                    for joined in other:
                        groups.update(dict.fromkeys(joined.makes, group))
            groups.update(dict.fromkeys(op.makes, group))
        order = {op.name: place for place, op in enumerate(self.ops)}
        for group in {id(group): group for group in groups.values()}.values():
            group.sort(key=lambda op: order[op.name])
            where = group[0].where
            for op in group:
                where = _common(where, op.where)
            box = None if all(map(is_unary, group)) else Box(group[0].name, where, kind="side")
            side.update(dict.fromkeys((op.name for op in group), box))
        return side

    def _root(self, value: str) -> str:
        """Return the drawn value that a value is a view of, or the repetition of, or both."""
        value = self.image.get(value, value)
        while value in self.alias:
            value = self.alias[value]
            value = self.image.get(value, value)
        return value

    def _goes_on(self, box: Box, op: OpChoice) -> bool:
        """Return whether an op goes on with the work of the box: in one module, placed alike."""
        last = box.ops[-1]
        if box.where != op.where or op.whole_flops or any((*op.kernels, *last.kernels)):
            return False
        if list(map(_kinds, op.results)) != list(map(_kinds, last.results)):
            return False
        inside = [value for value in self._data(op) if self.box_of.get(self._root(value)) is box]
        moved = [self.words.converted.get((value, op.name)) for value in inside]
        return bool(inside) and not any(map(self.words.sent, moved))

    # -- arrows

    def _connect(self, op: OpChoice, box: Box) -> None:
        """Draw the arrows to an op of a box, from the boxes that make what it reads."""
        for value in self._data(op):
            source = self._source(value)
            if source is None or source is box:
                continue
            conversion = self.words.converted.get((value, op.name))
            self._arrow(source, box, conversion)

    def _source(self, value: str) -> Box | None:
        """Return the box that makes a value; for an input a box without ops, which may be new."""
        root = self._root(value)
        if root in self.words.parameters:
            return None
        if root not in self.box_of:
            box = Box(root, self.within, kind="input")
            self.boxes.append(box)
            self.box_of[root] = box
        return self.box_of[root]

    def _arrow(self, source: Box, target: Box, conversion: Conversion | None) -> None:
        """Draw an arrow between boxes, through a pill where the conversion communicates."""
        if not self.words.sent(conversion):
            label = self._label(conversion) if conversion is not None else ""
            self.arrows[Arrow(source.name, target.name, label)] = None
            return
        assert conversion is not None
        key = (conversion.value, conversion.target)
        if key not in self.pills:
            where = _common(source.where, target.where)
            name = f"{conversion.value} to {self.words.layout(conversion.target)}"
            self.pills[key] = Pill(name, where, conversion)
            self.arrows[Arrow(source.name, name)] = None
        self.arrows[Arrow(self.pills[key].name, target.name)] = None

    def _label(self, conversion: Conversion) -> str:
        """Say what a conversion that sends nothing does to the value."""
        return self.words.by_axes(
            (_LOCAL_MOVES[step.forward], step.axis)
            for step in conversion.steps
            if step.forward in _LOCAL_MOVES
        )

    def _ends(self) -> None:
        """Draw what leaves: results, values read outside, and those sent to the next layer."""
        drawn = {op.name for op in self.ops}
        for box in [box for box in self.boxes if box.ops]:
            for value in [value for op in box.ops for value in op.makes]:
                returned = self.words.converted.get((value, "return"))
                readers = [op for op, _ in self.words.readers.get(value, ())]
                if returned is not None or not readers:
                    self._end(f"return {value}", "output", box, returned)
                for op in readers:
                    conversion = self.words.converted.get((value, op.name))
                    if op.name in self.hidden:
                        if self.words.sent(conversion):
                            self._end(f"next {value}", "next", box, conversion)
                    elif op.name not in drawn:
                        self._end(f"to {op.where or op.name}", "output", box, conversion)

    def _end(self, name: str, kind: str, source: Box, conversion: Conversion | None) -> None:
        """Draw one way out, as a box without ops."""
        end = Box(name, source.where if kind == "next" else self.within, kind=kind)
        if all(box.name != name for box in self.boxes):
            self.boxes.append(end)
        self._arrow(source, end, conversion)


def _kinds(layout: Layout) -> tuple[type, ...]:
    """Return the classes of a layout's placements: S(0) and S(1) are drawn in one box."""
    return tuple(map(type, layout))


def _common(one: str, other: str) -> str:
    """Return the path of the innermost module that both paths are in."""
    parts = []
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        parts.append(left)
    return ".".join(parts)
