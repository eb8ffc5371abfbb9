"""The labels of a plan's picture as HTML for graphviz: of boxes and pills, and the legend."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from autoparallel.placement import Invariant, Layout, Partial, Replicate, Shard
from autoparallel.plan import Conversion, Plan
from autoparallel.support.units import bytes_text
from autoparallel.view.picture import Box, Picture, Pill
from autoparallel.view.words import Words, collective_text, kind_of, op_text

__all__ = ["GREY", "Painter", "legend"]

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
_DETAILS = {
    "blocks": "blocks=k: each of k equal blocks is split by itself, or of blocks of these sizes",
    "unit": "unit=u: split in whole runs of u elements",
    "again": "again: recomputed in the backward pass",
}
_FORWARD = "#c2185b"
_BACKWARD = "#6a3fa0"
GREY = "#546e7a"
_GAP = "&#160;&#160;&#160;"
_NAMED = 6  # ops that are named in a box


class Painter:
    """A Painter writes the labels of a picture's boxes and pills, as HTML for graphviz."""

    def __init__(self, plan: Plan, picture: Picture) -> None:
        """The picture must be of this plan."""
        self.plan = plan
        self.picture = picture
        self.words = Words(plan)

    def title(self, path: str, above: str) -> str:
        """Return the label of a module's frame: its name within the frame above, and its number."""
        name, count = self.picture.repeats.get(path, (path, 1))
        local = name.removeprefix(f"{above}.")
        times = f' <font color="{_FORWARD}" point-size="13"><b>×{count}</b></font>'
        return f"<<b>{escape(local)}</b>{times if count > 1 else ''}>"

    def paint(self, graph: Any, item: Box | Pill, path: str) -> None:
        """Add one node to a graphviz.Digraph. path: of the frame that it is in."""
        if isinstance(item, Pill):
            colour = self.colour(item.conversion)
            first, *others = self._moves(item.conversion)
            kinds = _small(self.words.change(item.conversion))
            rows = _rows([f"{first}{_GAP}{kinds}", *others])
            graph.node(item.name, rows, fillcolor="white", color=colour, penwidth="2.5")
        elif item.ops:
            self._box(graph, item, path)
        else:
            source = self.words.source(item.name)
            label = {"input": source, "next": "next layer"}.get(item.kind, item.name)
            if item.kind == "input" and item.name in self.words.producers:
                label = f"from {self.words.where(item.name)}"
            graph.node(item.name, label, shape="plaintext", style="", fontcolor=GREY)

    def _box(self, graph: Any, box: Box, path: str) -> None:
        """Add a box of ops: their module and placement, their names and split, then details."""
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
        """Name the kernels of a box, and say how much of its products a rank computes."""
        rows = [f"kernel {escape(name)}" for op in box.ops for name in op.kernels if name]
        for op in box.ops:
            if op.whole_flops and self.plan.world_size > 1:
                # Ranks that cannot share evenly, as 8 ranks 12 heads, do not compute equally much.
                even = op.flops in (op.whole_flops, op.whole_flops / self.plan.world_size)
                rank = "each" if even else "the busiest"
                rows.append(f"{100 * op.flops / op.whole_flops:.3g}% of the FLOPs on {rank} rank")
        return rows

    def _parameters(self, box: Box) -> list[str]:
        """Tell of each parameter of a box its shape, its storage and what is sent for it."""
        rows: list[str] = []
        for op in box.ops:
            for value in op.reads:
                parameter = self.words.parameters.get(self.words.origin(value))
                if parameter is None:
                    continue
                name = parameter.path.removeprefix(f"{op.where}.") if op.where else parameter.path
                shape = "×".join(map(str, parameter.shape))
                storage = parameter.storage
                how = "whole" if kind_of(storage) is Invariant else self.words.layout(storage)
                conversion = self.words.converted.get((value, op.name))
                moves = self._moves(conversion) if conversion else []
                row = f"{escape(name)} {shape} <b>{how}</b>"
                rows += [_GAP.join([row, *moves])] if len(moves) < 2 else [row, *moves]
        return rows

    def _moves(self, conversion: Conversion) -> list[str]:
        """Name what is communicated for a conversion, a text for each pass."""
        phases: dict[str, list[tuple[str, int]]] = {}
        for transfer in self.words.sent(conversion):
            told = f"{collective_text(transfer.collective)} {bytes_text(transfer.nbytes)}"
            phase = f"{transfer.phase}{' again' if transfer.again else ''}"
            phases.setdefault(phase, []).append((told, transfer.step.axis))
        rows = []
        for phase, each in phases.items():
            colour = _FORWARD if phase == "forward" else _BACKWARD
            sent = self.words.by_axes(each)
            rows.append(f'<font color="{colour}">{phase}: <b>{sent}</b></font>')
        return rows

    def _badge(self, layout: Layout) -> str:
        """Write a layout in its colour."""
        kind = kind_of(layout)
        text = "whole" if kind is Invariant else self.words.layout(layout)
        return f'<font color="{_LINE[kind]}"><b>{text}</b></font>'

    def colour(self, conversion: Conversion) -> str:
        """Return the colour of a conversion's pill and arrows: by the first pass that sends."""
        forward = any(transfer.phase == "forward" for transfer in self.words.sent(conversion))
        return _FORWARD if forward else _BACKWARD


def _rows(rows: list[str]) -> str:
    """Put texts below each other, in one label."""
    cells = "".join(f"<tr><td>{row}</td></tr>" for row in rows)
    return f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="1">{cells}</table>>'


def _small(text: str) -> str:
    """Write a text in small grey letters."""
    return f'<font point-size="8" color="{GREY}">{text}</font>'


def legend(plan: Plan, within: str) -> str:
    """Write the title, and below it what colours and words mean; of rare words those that occur."""
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
    details = "".join(
        f'<tr><td colspan="3" cellpadding="0">{_small(_DETAILS[word])}</td></tr>'
        for word in _rare_words(plan)
    )
    return (
        f'<{table}<tr><td colspan="3">{title}</td></tr>'
        f"<tr>{cells[0]}{cells[1]}{forward}</tr><tr>{cells[2]}{cells[3]}{backward}</tr>{details}</table>>"
    )


def _rare_words(plan: Plan) -> list[str]:
    """Return the keys of _DETAILS that the picture of a plan may have."""
    layouts = {layout for op in plan.ops for layout in (*op.operands, *op.results)}
    layouts |= {parameter.storage for parameter in plan.parameters}
    shards = [item for layout in layouts for item in layout if isinstance(item, Shard)]
    occurs = {
        "blocks": any(shard.blocks != 1 for shard in shards),
        "unit": any(shard.unit != 1 for shard in shards),
        "again": any(conversion.again for conversion in plan.conversions),
    }
    return [word for word in _DETAILS if occurs[word]]
