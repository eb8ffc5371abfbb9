"""The picture of a plan as SVG, PNG or DOT: ops coloured by placement, collectives in between."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import graphviz

from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.plan import Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.support.module_paths import join_path
from autoparallel.support.written_files import write_file
from autoparallel.view.labels import GREY, Painter, legend
from autoparallel.view.picture import Box, Picture, Pill, draw

__all__ = ["to_dot", "write_svg"]

Layers = Literal["fold", "all"]

_RIM = 'paint-order="stroke" stroke="#f8f9fa" stroke-width="3"'
_FONT = "DejaVu Sans,Verdana,sans-serif"
_ENDINGS = (".svg", ".png", ".dot")
_DEPTH = 3  # levels of nested modules that are framed
_LEAF = 3  # boxes that a module without children may have and needs no frame


def write_svg(
    plan: Plan, path: str | PathLike[str], *, layers: Layers = "fold", within: str = ""
) -> None:
    """Write the picture of a plan as one self-contained file, the same for the same plan.

    path: its ending says what is written: ".svg", ".png", or ".dot" for the text that both are
    drawn from. layers: "fold" draws repeated modules once with their number, "all" draws every
    one. within: the path of a module, to draw only that; "" draws the whole model. The plan may
    have been read from JSON, and no installed graphviz is needed.

        >>> import autoparallel, pathlib, tempfile, torch
        >>> plan = autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "plan.svg")
        >>> autoparallel.write_svg(plan, path)
        >>> "</svg>" in path.read_text()
        True

    Raises AutoParallelError for another ending, before anything is drawn, and where no such file
    can be written. Raises PlanError as to_dot does.
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
    """Return the picture of a plan as DOT text.

    layers, within: as for write_svg. Raises PlanError for other layers, and where the plan has no
    op in the module.

        >>> import autoparallel, torch
        >>> plan = autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
        >>> to_dot(plan).splitlines()[0]
        'digraph plan {'
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
    graph.attr("graph", label=legend(plan, within), labelloc="t", nodesep="0.2", ranksep="0.22")
    graph.attr("node", fontname=_FONT, fontsize="10", shape="box", style="rounded,filled")
    graph.attr("node", margin="0.12,0.03", height="0.2", color=GREY)
    graph.attr("edge", fontname=_FONT, fontsize="8", color="#607d8b", arrowsize="0.6")
    painter = Painter(plan, picture)
    _fill(graph, _tree(picture), painter, "", "")
    pills = {pill.name: pill for pill in picture.pills}
    for arrow in picture.arrows:
        attributes: dict[str, str] = {}
        pill = pills.get(arrow.source) or pills.get(arrow.target)
        if pill is not None:
            width = "2.5" if arrow.target in pills else "1.5"
            attributes = {"color": painter.colour(pill.conversion), "penwidth": width}
        if arrow.label:
            attributes.update(label=f" {arrow.label}", fontcolor=GREY)
        graph.edge(arrow.source, arrow.target, **attributes)
    return str(graph.source)


def _render(source: str, kind: str) -> bytes:
    """Draw a DOT text with the engine that comes with pygraphviz, as "svg" or "png"."""
    import pygraphviz

    with _without_chatter():
        picture = pygraphviz.AGraph(string=source).draw(path=None, format=kind, prog="dot")
    assert isinstance(picture, bytes)
    return _titles_on_top(picture.decode()).encode() if kind == "svg" else picture


def _titles_on_top(svg: str) -> str:
    """Move the titles of frames behind all else in an SVG, with a light rim around the letters.

    The engine draws frames first and lets arrows run over their titles.
    """
    titles: list[str] = []

    def take(frame: re.Match[str]) -> str:
        texts = re.findall(r"<text .*?</text>\n", frame[0])
        titles.extend(text.replace("<text ", f"<text {_RIM} ", 1) for text in texts)
        return re.sub(r"<text .*?</text>\n", "", frame[0])

    svg = re.sub(r'<g id="[^"]*" class="cluster">.*?</g>\n', take, svg, flags=re.DOTALL)
    body, end, rest = svg.rpartition("</g>\n</svg>")
    return body + "".join(titles) + end + rest


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep off stderr the warnings that say nothing about the picture.

    The engine's own fontconfig warns of the settings of a newer system, pygraphviz of size. Both
    are C code, which knows the file descriptor and not sys.stderr.
    """
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            for line in file:
                if not line.startswith((b"Fontconfig warning", b"Warning: graph has")):
                    os.write(2, line)


@dataclass(slots=True)
class _Module:
    """A _Module is a module of the user's tree with what is drawn in it."""

    items: list[Box | Pill] = field(default_factory=list)
    children: dict[str, _Module] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of boxes and pills in it, at any depth."""
        return len(self.items) + sum(child.size for child in self.children.values())


def _tree(picture: Picture) -> _Module:
    """Sort boxes and pills into the tree of modules, by the paths of their modules."""
    root = _Module()
    items: tuple[Box | Pill, ...] = (*picture.boxes, *picture.pills)
    for item in items:
        module = root
        for part in item.where.split(".") if item.where else ():
            module = module.children.setdefault(part, _Module())
        module.items.append(item)
    return root


def _fill(
    graph: Any, module: _Module, painter: Painter, path: str, above: str, depth: int = 0
) -> None:
    """Draw a module's boxes and pills, and the modules in it, with a frame where that helps.

    path: of the module. above: path of the frame that it is drawn in. depth: number of frames
    around.
    """
    for item in module.items:
        painter.paint(graph, item, above)
    for name, child in module.children.items():
        inner = join_path(path, name)
        while len(child.children) == 1 and not child.items:
            (name, child) = next(iter(child.children.items()))
            inner = f"{inner}.{name}"
        # A list of layers, a module of few boxes and one deep inside would be frames for nothing.
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
