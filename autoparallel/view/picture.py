"""What a picture of a plan shows: boxes of ops, pills where something is communicated, arrows.

Views become part of arrows, ops that belong together become one box, and a run of sibling modules
(x.0, x.1, ...) that do the same in the same way is drawn once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from autoparallel.placement import Movement, Placement
from autoparallel.plan import Conversion, OpChoice, Plan
from autoparallel.view.fold import index_text
from autoparallel.view.words import Words

__all__ = ["Arrow", "Box", "Picture", "Pill", "draw"]


@dataclass(slots=True)
class Box:
    """Ops drawn as one. where: their module. inputs: names of values, if it stands for one."""

    name: str
    where: str
    ops: list[OpChoice] = field(default_factory=list)
    kind: str = "op"

    @property
    def placement(self) -> Placement | None:
        """Of the result."""
        return self.ops[-1].results[0] if self.ops and self.ops[-1].results else None


@dataclass(frozen=True, slots=True)
class Pill:
    """A conversion that communicates, between a box and its readers."""

    name: str
    where: str
    conversion: Conversion


@dataclass(frozen=True, slots=True)
class Arrow:
    """From a box or pill to another, by name. label: of a move that does not communicate."""

    source: str
    target: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is drawn. repeats: module path to what to call it and how often it occurs."""

    boxes: tuple[Box, ...]
    pills: tuple[Pill, ...]
    arrows: tuple[Arrow, ...]
    repeats: dict[str, tuple[str, int]]


def draw(plan: Plan, folded: bool = True, within: str = "") -> Picture:
    """The picture of a plan, or of what is in one module of it."""
    return _Drawing(plan, folded, within).picture()


class _Drawing:
    def __init__(self, plan: Plan, folded: bool, within: str) -> None:
        self.plan = plan
        self.words = Words(plan)
        self.within = within
        self.image: dict[str, str] = {}  # value of a hidden op -> value of the one that is drawn
        self.hidden: set[str] = set()
        self.repeats: dict[str, tuple[str, int]] = {}
        if folded:
            self._fold()
        self.ops = [op for op in plan.ops if op.name not in self.hidden and self._inside(op)]
        self.alias: dict[str, str] = {}  # result of a view -> what it views
        self.boxes: list[Box] = []
        self.box_of: dict[str, Box] = {}  # by value
        self.pills: dict[tuple[str, Placement], Pill] = {}
        self.arrows: dict[Arrow, None] = {}

    def _inside(self, op: OpChoice) -> bool:
        return not self.within or (op.where + ".").startswith(self.within + ".")

    def picture(self) -> Picture:
        for op in self.ops:
            if self._is_view(op):
                self.alias.update(dict.fromkeys(op.makes, op.reads[0]))
            else:
                self._place(op)
        for box in list(self.boxes):
            for op in box.ops:
                self._connect(op, box)
        self._ends()
        return Picture(
            tuple(self.boxes), tuple(self.pills.values()), tuple(self.arrows), self.repeats
        )

    # -- repeated modules

    def _fold(self) -> None:
        """Find runs of siblings with one structure, outermost first; hide all but the first."""
        depth = max((op.where.count(".") + 1 for op in self.plan.ops if op.where), default=0)
        for position in range(depth):
            members: dict[str, dict[int, list[OpChoice]]] = {}
            for op in self.plan.ops:
                parts = op.where.split(".")
                if op.name in self.hidden or len(parts) <= position:
                    continue
                if parts[position].isdigit():
                    prefix = ".".join(parts[:position])
                    members.setdefault(prefix, {}).setdefault(int(parts[position]), []).append(op)
            for prefix, siblings in members.items():
                self._fold_siblings(prefix, siblings)

    def _fold_siblings(self, prefix: str, siblings: dict[int, list[OpChoice]]) -> None:
        run: list[int] = []
        last: Hashable = None
        for index in sorted(siblings):
            path = f"{prefix}.{index}" if prefix else str(index)
            signature = self._signature(path, siblings[index])
            if run and signature == last and index == run[-1] + 1:
                run.append(index)
                self._hide(siblings[run[0]], siblings[index])
            else:
                run, last = [index], signature
            if len(run) > 1:
                first = f"{prefix}.{run[0]}" if prefix else str(run[0])
                name = f"{prefix}.{index_text(run)}" if prefix else index_text(run)
                self.repeats[first] = name, len(run)

    def _hide(self, drawn: list[OpChoice], same: list[OpChoice]) -> None:
        for one, other in zip(drawn, same, strict=True):
            self.hidden.add(other.name)
            self.image.update(zip(other.makes, one.makes, strict=True))

    def _signature(self, path: str, ops: list[OpChoice]) -> Hashable:
        """What ops do, how, and on what: equal for modules that are drawn alike."""
        made: dict[str, int] = {}
        names = {op.name for op in ops}
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
                elif value in made:
                    reads.append((made[value], conversion and (conversion.source, conversion.target)))
                else:
                    reads.append("outside")
            made.update({value: len(made) + place for place, value in enumerate(op.makes)})
            rows.append(
                (op.target, op.where[len(path) :], op.kernel, op.operands, op.results, tuple(reads))
            )
        del names
        return tuple(rows)

    # -- boxes

    def _data(self, op: OpChoice) -> list[str]:
        return [value for value in op.reads if value not in self.words.parameters]

    def _is_view(self, op: OpChoice) -> bool:
        """Whether an op takes no time and has one operand: it is drawn as part of an arrow."""
        if op.seconds or op.kernel or op.whole_flops or len(op.reads) != 1:
            return False
        if op.reads[0] in self.words.parameters:
            return True
        return not _communicates(self.words.converted.get((op.reads[0], op.name)))

    def _root(self, value: str) -> str:
        value = self.image.get(value, value)
        while value in self.alias:
            value = self.alias[value]
            value = self.image.get(value, value)
        return value

    def _place(self, op: OpChoice) -> None:
        """Put an op into the box made last, if it goes on with its work, or a new one."""
        box = self.boxes[-1] if self.boxes else None
        if box is None or not self._goes_on(box, op):
            box = Box(op.name, op.where)
            self.boxes.append(box)
        box.ops.append(op)
        self.box_of.update(dict.fromkeys(op.makes, box))

    def _goes_on(self, box: Box, op: OpChoice) -> bool:
        last = box.ops[-1]
        if box.where != op.where or op.whole_flops or op.kernel or last.kernel:
            return False
        if list(map(type, op.results)) != list(map(type, last.results)):
            return False
        inside = [value for value in self._data(op) if self.box_of.get(self._root(value)) is box]
        moved = [self.words.converted.get((value, op.name)) for value in inside]
        return bool(inside) and not any(map(_communicates, moved))

    # -- arrows

    def _connect(self, op: OpChoice, box: Box) -> None:
        for value in self._data(op):
            source = self._source(value)
            if source is None or source is box:
                continue
            conversion = self.words.converted.get((value, op.name))
            self._arrow(source, box, conversion)

    def _source(self, value: str) -> Box | None:
        root = self._root(value)
        if root in self.words.parameters:
            return None
        if root not in self.box_of:
            box = Box(root, self.within, kind="input")
            self.boxes.append(box)
            self.box_of[root] = box
        return self.box_of[root]

    def _arrow(self, source: Box, target: Box, conversion: Conversion | None) -> None:
        if not _communicates(conversion):
            label = ""
            if conversion is not None and conversion.forward is not Movement.NONE:
                label = conversion.forward.value.replace("_", " ")
            self.arrows[Arrow(source.name, target.name, label)] = None
            return
        assert conversion is not None
        key = (conversion.value, conversion.target)
        if key not in self.pills:
            where = _common(source.where, target.where)
            name = f"{conversion.value} to {conversion.target}"
            self.pills[key] = Pill(name, where, conversion)
            self.arrows[Arrow(source.name, name)] = None
        self.arrows[Arrow(self.pills[key].name, target.name)] = None

    def _ends(self) -> None:
        """What leaves: results, and what goes to the next of a run of layers."""
        read = {value for op in self.plan.ops for value in op.reads}
        drawn = {op.name for box in self.boxes for op in box.ops}
        for box in [box for box in self.boxes if box.ops]:
            for value in (value for op in box.ops for value in op.makes):
                conversion = self.words.converted.get((value, "return"))
                if value not in read or conversion is not None:
                    end = Box(f"return {value}", self.within, kind="output")
                    self.boxes.append(end)
                    self._arrow(box, end, conversion)
        for conversion in self.plan.conversions:
            elsewhere = not drawn.intersection(conversion.readers)
            source = self.box_of.get(self._root(conversion.value))
            if not elsewhere or source is None or not _communicates(conversion):
                continue
            if conversion.value in self.image or "return" in conversion.readers:
                continue
            end = Box(f"next {conversion.value}", source.where, kind="next")
            self.boxes.append(end)
            self._arrow(source, end, conversion)


def _communicates(conversion: Conversion | None) -> bool:
    if conversion is None:
        return False
    return bool(conversion.forward.collective or conversion.backward.collective)


def _common(one: str, other: str) -> str:
    parts = []
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        parts.append(left)
    return ".".join(parts)
