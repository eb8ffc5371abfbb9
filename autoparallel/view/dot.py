"""A picture of the plan: ops coloured by placement, collectives where they happen, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import graphviz

from autoparallel.placement import Invariant, Partial, Placement, Replicate, Shard
from autoparallel.plan import Conversion, Plan
from autoparallel.view.picture import Box, Picture, Pill, draw
from autoparallel.view.words import Words, bytes_text, movement_text, op_text

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
    Invariant: "#90a4ae",
    Replicate: "#009e73",
    Shard: "#2b7bba",
    Partial: "#d08700",
}
_MEANING = (
    (Invariant, "whole (I)"),
    (Replicate, "whole, used by each rank for its part (R)"),
    (Shard, "split along dim d: S(d)"),
    (Partial, "sum pending (P)"),
)
_FORWARD = "#c2185b"
_BACKWARD = "#6a3fa0"
_FONT = "DejaVu Sans,Verdana,sans-serif"
_GREY = "#546e7a"
_DEPTH = 3


def write_svg(plan: Plan, path: str | PathLike[str], *, layers: Layers = "fold") -> None:
    """Write the picture as one self-contained SVG file, the same for the same plan.

    layers: "fold" draws repeated modules once, "all" draws every one.
    """
    import pygraphviz

    graph = pygraphviz.AGraph(string=to_dot(plan, layers=layers))
    Path(path).write_bytes(graph.draw(path=None, format="svg", prog="dot"))


def to_dot(plan: Plan, *, layers: Layers = "fold", within: str = "") -> str:
    """The picture as DOT text. within: a module's path, to draw only what is in it."""
    if layers not in ("fold", "all"):
        raise ValueError(f'layers must be "fold" or "all", not {layers!r}')
    picture = draw(plan, layers == "fold", within)
    graph = graphviz.Digraph("plan")
    graph.attr("graph", fontname=_FONT, bgcolor="white", label=_legend(plan), labelloc="t")
    graph.attr("graph", nodesep="0.25", ranksep="0.3", pad="0.2", fontsize="10")
    graph.attr("node", fontname=_FONT, fontsize="10", shape="box", style="rounded,filled")
    graph.attr("node", margin="0.1,0.05", height="0.3")
    graph.attr("edge", fontname=_FONT, fontsize="8", color="#607d8b", arrowsize="0.6")
    _fill(graph, _tree(picture), _Painter(plan, picture), "", 0)
    pills = {pill.name: pill for pill in picture.pills}
    for arrow in picture.arrows:
        pill = pills.get(arrow.source) or pills.get(arrow.target)
        attributes: dict[str, str] = {}
        if pill is not None:
            attributes = {"color": _colour(pill.conversion), "penwidth": "2.5"}
        graph.edge(_key(arrow.source), _key(arrow.target), label=arrow.label, **attributes)
    return str(graph.source)


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
    for item in (*picture.boxes, *picture.pills):
        module = root
        for part in item.where.split(".") if item.where else ():
            module = module.children.setdefault(part, _Module())
        module.items.append(item)
    return root


def _fill(graph: Any, module: _Module, painter: _Painter, path: str, depth: int) -> None:
    for item in module.items:
        painter.paint(graph, item, path)
    for name, child in module.children.items():
        inner = f"{path}.{name}" if path else name
        while len(child.children) == 1 and not child.items:
            (name, child) = next(iter(child.children.items()))
            inner = f"{inner}.{name}"
        leaf = not child.children and child.size <= 3
        repeated = inner in painter.picture.repeats
        if (leaf or depth >= _DEPTH) and not repeated:
            _flatten(graph, child, painter, path)
            continue
        with graph.subgraph(name=f"cluster_{inner}") as cluster:
            cluster.attr(label=painter.title(inner, path), style="rounded", labeljust="l")
            cluster.attr(color="#b0bec5", bgcolor="#fafbfc" if depth % 2 else "#f5f7f8")
            _fill(cluster, child, painter, inner, depth + 1)


def _flatten(graph: Any, module: _Module, painter: _Painter, path: str) -> None:
    for item in module.items:
        painter.paint(graph, item, path)
    for child in module.children.values():
        _flatten(graph, child, painter, path)


class _Painter:
    def __init__(self, plan: Plan, picture: Picture) -> None:
        self.plan = plan
        self.picture = picture
        self.words = Words(plan)

    def title(self, path: str, above: str) -> str:
        name, count = self.picture.repeats.get(path, (path, 1))
        local = name[len(above) + 1 :] if above and name.startswith(above + ".") else name
        if above and count == 1:
            local = path[len(above) + 1 :]
        times = f' <font color="{_FORWARD}" point-size="13"><b>×{count}</b></font>'
        return f"<<b>{escape(local)}</b>{times if count > 1 else ''}>"

    def paint(self, graph: Any, item: Box | Pill, path: str) -> None:
        if isinstance(item, Pill):
            self._pill(graph, item)
        elif item.kind == "op":
            self._box(graph, item, path)
        else:
            label = {"input": item.name, "output": item.name, "next": "next layer"}[item.kind]
            graph.node(_key(item.name), label, shape="plaintext", style="", fontcolor=_GREY)

    def _box(self, graph: Any, box: Box, path: str) -> None:
        placement = box.placement
        kind = type(placement) if placement is not None else Invariant
        local = box.where[len(path) + 1 :] if path and box.where != path else box.where
        local = "" if box.where == path else local
        names = ", ".join(dict.fromkeys(op_text(op.target) for op in box.ops))
        rows = [f"<b>{escape(names)}</b>  {_badge(placement)}"]
        if local:
            rows.append(_small(escape(local)))
        rows += self._parameters(box)
        graph.node(
            _key(box.name),
            _rows(rows),
            fillcolor=_FILL[kind],
            color=_LINE[kind],
            tooltip="\n".join(op.name for op in box.ops),
        )

    def _parameters(self, box: Box) -> list[str]:
        rows = []
        for op in box.ops:
            for value in op.reads:
                parameter = self.words.parameters.get(value)
                if parameter is None:
                    continue
                name = parameter.path.removeprefix(op.where + ".") if op.where else parameter.path
                split = self.words.split(parameter) if not parameter.reason else "whole"
                text = f"{escape(name)}  {parameter.storage}  {escape(split)}"
                conversion = self.words.converted.get((value, op.name))
                rows.append(_small(text + (_moves(conversion) if conversion else "")))
        return rows

    def _pill(self, graph: Any, pill: Pill) -> None:
        conversion = pill.conversion
        rows = [f"<b>{conversion.source} → {conversion.target}</b>"]
        rows.append(_small(_moves(conversion).strip()))
        colour = _colour(conversion)
        graph.node(_key(pill.name), _rows(rows), fillcolor="white", color=colour, penwidth="2.5")


def _moves(conversion: Conversion) -> str:
    found = []
    for name, move, colour in (
        ("forward", conversion.forward, _FORWARD),
        ("backward", conversion.backward, _BACKWARD),
    ):
        if move.collective:
            text = f"{name}: {movement_text(move)} {bytes_text(conversion.nbytes)}"
            found.append(f'<font color="{colour}"><b>{escape(text)}</b></font>')
    return "  " + "  ".join(found) if found else ""


def _rows(rows: list[str]) -> str:
    cells = "".join(f"<tr><td>{row}</td></tr>" for row in rows)
    return f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="1">{cells}</table>>'


def _small(text: str) -> str:
    return f'<font point-size="8" color="{_GREY}">{text}</font>'


def _badge(placement: Placement | None) -> str:
    if placement is None:
        return ""
    return f'<font color="{_LINE[type(placement)]}"><b>{placement}</b></font>'


def _colour(conversion: Conversion) -> str:
    return _FORWARD if conversion.forward.collective else _BACKWARD


def _key(name: str) -> str:
    return name.replace(":", "_")


def _legend(plan: Plan) -> str:
    cells = "".join(
        f'<td bgcolor="{_FILL[kind]}" color="{_LINE[kind]}" border="1">{text}</td>'
        for kind, text in _MEANING
    )
    lines = (
        f'<td><font color="{_FORWARD}"><b>━ communicates in forward</b></font></td>'
        f'<td><font color="{_BACKWARD}"><b>━ only in backward</b></font></td>'
    )
    title = f'<font point-size="14"><b>{escape(plan.model)}</b> on {escape(str(plan.mesh))}</font>'
    return (
        '<<table border="0" cellborder="0" cellspacing="4" cellpadding="3">'
        f'<tr><td colspan="6">{title}</td></tr><tr>{cells}{lines}</tr></table>>'
    )
