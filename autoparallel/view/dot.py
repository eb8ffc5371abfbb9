"""A picture of the plan: ops coloured by placement, collectives where they happen, as SVG."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import graphviz

from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.placement import Invariant, Layout, Partial, Replicate, Shard
from autoparallel.plan import Conversion, Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.support.units import bytes_text
from autoparallel.support.written_files import write_file
from autoparallel.view.picture import Box, Picture, Pill, draw
from autoparallel.view.words import Words, collective_text, kind_of, op_text

__all__ = ["to_dot", "write_svg"]

Layers = Literal["fold", "all"]

# Colours that are told apart by the colour-blind (after Okabe and Ito), tinted for black text.
_FILL: Mapping[type, str] = {
    Invariant: "#eceff1",
    Replicate: "#cdeee0",
    Shard: "#cfe6f7",
    Partial: "#fbe0b4",
}
_LINE: Mapping[type, str] = {
    Invariant: "#78909c",
    Replicate: "#009e73",
    Shard: "#2b7bba",
    Partial: "#d08700",
}
_MEANING = (
    (Invariant, "whole (I)"),
    (Replicate, "whole, for split work (R)"),
    (Shard, "split along dim d: S(d)"),
    (Partial, "sum pending (P)"),
)
_FORWARD = "#c2185b"
_BACKWARD = "#6a3fa0"
_FONT = "DejaVu Sans,Verdana,sans-serif"
_GREY = "#546e7a"
_GAP = "&#160;&#160;&#160;"
_ENDINGS = (".svg", ".png", ".dot")
_DEPTH = 3  # of nested modules that are framed
_LEAF = 3  # boxes in a module without children that need no frame
_NAMED = 6  # ops in a box that are named


def write_svg(
    plan: Plan, path: str | PathLike[str], *, layers: Layers = "fold", within: str = ""
) -> None:
    """Write the picture as one self-contained file, the same for the same plan.

    path: its ending says what is written: ".svg", ".png", or ".dot" for the text that both are
    drawn from. layers: "fold" draws repeated modules once, "all" draws every one. within: as for
    to_dot.

        >>> import autoparallel, pathlib, tempfile, torch
        >>> plan = autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "plan.svg")
        >>> autoparallel.write_svg(plan, path)
        >>> "</svg>" in path.read_text()
        True

    Raises AutoParallelError for another ending, before anything is drawn, and where no such file
    can be written.
    """
    ending = Path(path).suffix.lower()
    if ending not in _ENDINGS:
        raise AutoParallelError(
            f"a picture of a plan cannot be written to {os.fspath(path)!r}",
            why=f"the ending says what is written, and {ending or 'none'!r} is not one of "
            + ", ".join(_ENDINGS),
            fix=f"write_svg(plan, {str(Path(path).with_suffix('.svg'))!r})",
        )
    source = to_dot(plan, layers=layers, within=within)
    content = source.encode() if ending == ".dot" else _render(source, ending.removeprefix("."))
    write_file(path, content)


def to_dot(plan: Plan, *, layers: Layers = "fold", within: str = "") -> str:
    """The picture as DOT text. within: a module's path, to draw only what is in it.

    Raises PlanError for other layers, and where nothing is in the module.
    """
    require_kind(plan, Plan, MAKE_ONE)
    if layers not in ("fold", "all"):
        raise PlanError(f"layers={layers!r}", fix='choose "fold" or "all"')
    picture = draw(plan, layers == "fold", within)
    if within and not picture.boxes:
        raise PlanError(
            f"no op of {plan.model} is in a module {within!r}",
            fix="give the path of a module, as in model.named_modules()",
        )
    graph = graphviz.Digraph("plan")
    graph.attr("graph", fontname=_FONT, fontsize="10", bgcolor="white", pad="0.15")
    graph.attr("graph", label=_legend(plan, within), labelloc="t", nodesep="0.2", ranksep="0.22")
    graph.attr("node", fontname=_FONT, fontsize="10", shape="box", style="rounded,filled")
    graph.attr("node", margin="0.12,0.03", height="0.2", color=_GREY)
    graph.attr("edge", fontname=_FONT, fontsize="8", color="#607d8b", arrowsize="0.6")
    painter = _Painter(plan, picture)
    _fill(graph, _tree(picture), painter, "", "")
    pills = {pill.name: pill for pill in picture.pills}
    for arrow in picture.arrows:
        attributes: dict[str, str] = {}
        pill = pills.get(arrow.source) or pills.get(arrow.target)
        if pill is not None:
            width = "2.5" if arrow.target in pills else "1.5"
            attributes = {"color": painter.colour(pill.conversion), "penwidth": width}
        if arrow.label:
            attributes.update(label=f" {arrow.label}", fontcolor=_GREY)
        graph.edge(arrow.source, arrow.target, **attributes)
    return str(graph.source)


def _render(source: str, kind: str) -> bytes:
    """The picture of a DOT text, by the engine that comes with pygraphviz: no `dot` is needed."""
    import pygraphviz

    with _without_chatter():
        picture = pygraphviz.AGraph(string=source).draw(path=None, format=kind, prog="dot")
    assert isinstance(picture, bytes)
    return picture


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep from stderr what says nothing about the picture.

    The engine's own fontconfig warns of the settings of a newer system, pygraphviz of size.
    """
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if not line.startswith((b"Fontconfig warning", b"Warning: graph has")):
                    os.write(2, line)


@dataclass(slots=True)
class _Module:
    """A module of the user's tree with what is drawn in it."""

    items: list[Box | Pill] = field(default_factory=list)
    children: dict[str, _Module] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.items) + sum(child.size for child in self.children.values())


def _tree(picture: Picture) -> _Module:
    root = _Module()
    items: tuple[Box | Pill, ...] = (*picture.boxes, *picture.pills)
    for item in items:
        module = root
        for part in item.where.split(".") if item.where else ():
            module = module.children.setdefault(part, _Module())
        module.items.append(item)
    return root


def _fill(
    graph: Any, module: _Module, painter: _Painter, path: str, above: str, depth: int = 0
) -> None:
    """Draw what is in a module. path: of it. above: of the frame that it is drawn in."""
    for item in module.items:
        painter.paint(graph, item, above)
    for name, child in module.children.items():
        inner = f"{path}.{name}" if path else name
        while len(child.children) == 1 and not child.items:
            (name, child) = next(iter(child.children.items()))
            inner = f"{inner}.{name}"
        numbered = not child.items and all(key.isdigit() for key in child.children)
        leaf = not child.children and child.size <= _LEAF
        repeated = inner in painter.picture.repeats
        if not repeated and (numbered or leaf or depth >= _DEPTH):
            _fill(graph, child, painter, inner, above, depth)
            continue
        with graph.subgraph(name=f"cluster_{inner}") as frame:
            frame.attr(label=painter.title(inner, above), style="rounded", labeljust="l")
            frame.attr(color="#b0bec5", bgcolor="#fafbfc" if depth % 2 else "#f5f7f8")
            _fill(frame, child, painter, inner, inner, depth + 1)


class _Painter:
    def __init__(self, plan: Plan, picture: Picture) -> None:
        self.plan = plan
        self.picture = picture
        self.words = Words(plan)

    def title(self, path: str, above: str) -> str:
        """Of a module's frame: its name within the frame above, and how often it occurs."""
        name, count = self.picture.repeats.get(path, (path, 1))
        local = name.removeprefix(f"{above}.")
        times = f' <font color="{_FORWARD}" point-size="13"><b>×{count}</b></font>'
        return f"<<b>{escape(local)}</b>{times if count > 1 else ''}>"

    def paint(self, graph: Any, item: Box | Pill, path: str) -> None:
        """Add one node. path: of the cluster that it is in."""
        if isinstance(item, Pill):
            colour = self.colour(item.conversion)
            first, *others = self._moves(item.conversion)
            kinds = _small(self.words.change(item.conversion))
            rows = _rows([f"{first}{_GAP}{kinds}", *others])
            graph.node(item.name, rows, fillcolor="white", color=colour, penwidth="2.5")
        elif item.ops:
            self._box(graph, item, path)
        else:
            own = self.words.value(item.name)
            label = {"input": f"input {own}", "next": "next layer"}.get(item.kind, item.name)
            if item.kind == "input" and item.name in self.words.producers:
                label = f"from {self.words.where(item.name)}"
            graph.node(item.name, label, shape="plaintext", style="", fontcolor=_GREY)

    def _box(self, graph: Any, box: Box, path: str) -> None:
        names = list(dict.fromkeys(op_text(op.target) for op in box.ops))
        ops = escape(", ".join(names[:_NAMED]))
        if len(names) > _NAMED:
            ops += ", …"
        local = box.where.removeprefix(path).removeprefix(".")
        if box.kind == "side" and len(box.ops) > 1:
            local = f"{len(box.ops)} ops on inputs alone"
        roles = [role for op in box.ops if (role := self.words.role(op))]
        layout = box.layout
        badge = self._badge(layout) if layout is not None else ""
        rows = [f"<b>{escape(local) or ops}</b>{_GAP}{badge}"]
        role = f"<b>{escape(roles[0])}</b>" if roles else ""
        if local or role:
            rows.append(
                f'<font point-size="9">{" — ".join(filter(None, [local and ops, role]))}</font>'
            )
        rows += [_small(text) for text in (*self._shares(box), *self._parameters(box))]
        kind = kind_of(layout) if layout is not None else Invariant
        graph.node(
            box.name,
            _rows(rows),
            fillcolor=_FILL[kind],
            color=_LINE[kind],
            tooltip="\n".join(op.name for op in box.ops),
        )

    def _shares(self, box: Box) -> list[str]:
        """What each rank does of a product, and who communicates inside."""
        found = [f"kernel {escape(name)}" for op in box.ops for name in op.kernels if name]
        for op in box.ops:
            if op.whole_flops and self.plan.world_size > 1:
                found.append(f"{op.flops / op.whole_flops:.0%} of the FLOPs on each rank")
        return found

    def _parameters(self, box: Box) -> list[str]:
        rows = []
        for op in box.ops:
            for value in op.reads:
                parameter = self.words.parameters.get(self.words.origin(value))
                if parameter is None:
                    continue
                name = parameter.path.removeprefix(f"{op.where}.") if op.where else parameter.path
                shape = "×".join(map(str, parameter.shape))
                how = "whole" if parameter.reason else self.words.layout(parameter.storage)
                conversion = self.words.converted.get((value, op.name))
                moves = self._moves(conversion) if conversion else []
                rows.append(_GAP.join([f"{escape(name)} {shape} <b>{how}</b>", *moves]))
        return rows

    def _moves(self, conversion: Conversion) -> list[str]:
        """What is communicated, forward and backward."""
        found = []
        for transfer in self.words.sent(conversion):
            what = collective_text(transfer.collective) + self.words.on(transfer.step.axis)
            size = bytes_text(transfer.nbytes)
            phase = f"{transfer.phase}{' again' if transfer.again else ''}"
            colour = _FORWARD if transfer.phase == "forward" else _BACKWARD
            found.append(f'<font color="{colour}">{phase}: <b>{what} {size}</b></font>')
        return found

    def _badge(self, layout: Layout) -> str:
        kind = kind_of(layout)
        text = "whole" if kind is Invariant else self.words.layout(layout)
        return f'<font color="{_LINE[kind]}"><b>{text}</b></font>'

    def colour(self, conversion: Conversion) -> str:
        """Of its pill and arrows."""
        forward = any(transfer.phase == "forward" for transfer in self.words.sent(conversion))
        return _FORWARD if forward else _BACKWARD


def _rows(rows: list[str]) -> str:
    cells = "".join(f"<tr><td>{row}</td></tr>" for row in rows)
    return f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="1">{cells}</table>>'


def _small(text: str) -> str:
    return f'<font point-size="8" color="{_GREY}">{text}</font>'


def _legend(plan: Plan, within: str) -> str:
    cells = []
    for kind, text in _MEANING:
        colours = f'bgcolor="{_FILL[kind]}" color="{_LINE[kind]}"'
        cells.append(f'<td {colours} border="1" style="rounded">{_GAP}{text}{_GAP}</td>')
    forward = (
        f'<td align="left"><font color="{_FORWARD}"><b>━</b> communicates in forward</font></td>'
    )
    backward = f'<td align="left"><font color="{_BACKWARD}"><b>━</b> only in backward</font></td>'
    what = f"{within} of {plan.model}" if within else plan.model
    title = (
        f'<font point-size="13"><b>{escape(what)}</b>&#160; on {escape(str(plan.mesh))}, '
        f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}</font>"
    )
    table = '<table border="0" cellborder="0" cellspacing="5" cellpadding="5">'
    return (
        f'<{table}<tr><td colspan="3">{title}</td></tr>'
        f"<tr>{cells[0]}{cells[1]}{forward}</tr><tr>{cells[2]}{cells[3]}{backward}</tr></table>>"
    )
