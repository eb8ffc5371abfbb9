"""The picture of a plan with stages as SVG: stages side by side, and below them what waits when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from os import PathLike
from typing import Any

from autoparallel.analysis.pipeline_step import PipelineTimeline, timeline_of_stages
from autoparallel.analysis.training_step import COMPUTE, Event
from autoparallel.errors import PlanError
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.plan import OpChoice, Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.support.written_files import write_file

__all__ = ["stages_svg", "write_stages"]

# Okabe and Ito's colours, which are told apart by all readers.
_COLOURS = {
    "forward": "#56a0d3",
    "backward": "#e69f00",
    "weights": "#009e73",
    "update": "#cc79a7",
}
_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "weights": "gradients of weights",
    "update": "reducing gradients, and the update",
}
_MARGIN, _BOX, _GAP, _LINE = 24, 190, 74, 17
_LANE, _LABEL, _PER_ROW = 22, 70, 6
_LEAST_WIDTH = 900
# Passes that are narrower than this are drawn as one with their neighbours.
_NARROW = 1.5


def write_stages(plan: Plan, path: str | PathLike[str]) -> None:
    """Write the picture of a plan with stages as one SVG file.

    It has a box for each stage, with what its ranks compute and hold, arrows with the bytes that a
    micro-batch sends, and the predicted step of each rank, in which the bubble is what is empty.
    The plan may have been read from JSON.

        >>> import autoparallel, pathlib, tempfile, torch
        >>> layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
        >>> plan = autoparallel.make_plan(
        ...     layers, mesh=autoparallel.Mesh(pp=2), example_inputs=torch.zeros(8, 64)
        ... )
        >>> path = pathlib.Path(tempfile.mkdtemp(), "plan.stages.svg")
        >>> write_stages(plan, path)
        >>> "stage 1" in path.read_text()
        True

    Raises PlanError for a plan without stages, and for one without the seconds of its passes.
    """
    require_kind(plan, Plan, MAKE_ONE)
    write_file(path, stages_svg(plan).encode())


def stages_svg(plan: Plan) -> str:
    """Return the picture that `write_stages` writes.

    Example: `stages_svg(autoparallel.make_plan(model, mesh=Mesh(pp=4), example_inputs=batch))`
    """
    if plan.pipeline is None:
        raise PlanError(
            f"the plan for {plan.model} has no stages",
            fix="write_svg(plan, path) draws it; Mesh(pp=2, ...) plans with stages",
        )
    return _Drawing(plan, timeline_of_stages(plan, None, None, None)).text()


class _Drawing:
    """The lines of one picture. step: the plan's predicted step."""

    def __init__(self, plan: Plan, step: PipelineTimeline) -> None:
        assert plan.pipeline is not None
        self.plan, self.pipeline, self.step = plan, plan.pipeline, step
        self.rows = [_rows_of_stage(plan, ops, n) for n, ops in enumerate(_ops_of_stages(plan))]
        across = min(self.pipeline.stages, _PER_ROW)
        self.width = max(_LEAST_WIDTH, 2 * _MARGIN + across * _BOX + (across - 1) * _GAP)
        self.box_height = _LINE * (max(map(len, self.rows)) + 1) + 12
        lines = -(-self.pipeline.stages // _PER_ROW)
        self.top = 66
        self.lanes_top = self.top + lines * (self.box_height + 34) + 48

    def text(self) -> str:
        """Return the whole picture."""
        height = self.lanes_top + _LANE * self.pipeline.ranks + 44
        body = "\n".join((*self.title(), *self.boxes(), *self.lanes()))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{height}" '
            f'viewBox="0 0 {self.width} {height}" font-family="DejaVu Sans,Verdana,sans-serif" '
            f'font-size="12">\n<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
        )

    def title(self) -> Iterator[str]:
        """Yield what the picture is of."""
        plan = self.plan
        yield _text(_MARGIN, 26, f"{plan.model} on {plan.whole_mesh}", size=16, weight="bold")
        step = seconds_text(self.step.seconds)
        yield _text(_MARGIN, 46, f"{self.pipeline}; a step takes {step}, predicted", fill="#555")

    def boxes(self) -> Iterator[str]:
        """Yield the stages, and what goes from one to the next."""
        pipeline = self.pipeline
        for stage, rows in enumerate(self.rows):
            line, column = divmod(stage, _PER_ROW)
            x = _MARGIN + column * (_BOX + _GAP)
            y = self.top + line * (self.box_height + 34)
            yield (
                f'<rect x="{x}" y="{y}" width="{_BOX}" height="{self.box_height}" rx="5" '
                'fill="#f4f7fa" stroke="#7a8b99"/>'
            )
            ranks = f"stage {stage}, pp = {pipeline.rank_of(stage)}"
            yield _text(x + 8, y + 18, ranks, weight="bold")
            for number, row in enumerate(rows):
                yield _text(x + 8, y + 18 + _LINE * (number + 1), row)
            if stage + 1 < pipeline.stages:
                yield from self.arrows(stage, x + _BOX, y + self.box_height // 2 - 16)

    def arrows(self, stage: int, x: int, y: int) -> Iterator[str]:
        """Yield what a stage and the next one send each other for a micro-batch."""
        back = self.pipeline.back_nbytes[stage + 1] if self.pipeline.back_nbytes else 0
        sent = ((self.pipeline.nbytes[stage], "forward", 0), (back, "backward", 36))
        for nbytes, phase, below in sent:
            if not nbytes:
                continue
            one, other = (x + 5, x + _GAP - 5)
            begin, end = (one, other) if phase == "forward" else (other, one)
            tip = -6 if phase == "forward" else 6
            at = y + below
            yield (
                f'<path d="M{begin} {at}H{end}m{tip} -4L{end} {at}L{end + tip} {at + 4}" '
                f'fill="none" stroke="{_COLOURS[phase]}" stroke-width="2"/>'
            )
            yield _text(x + _GAP // 2, at - 5, bytes_text(nbytes), anchor="middle", size=10)

    def lanes(self) -> Iterator[str]:
        """Yield the step of each rank; what is empty in it is the bubble."""
        top, end = self.lanes_top, self.step.seconds
        x, width = _MARGIN + _LABEL, self.width - 2 * _MARGIN - _LABEL
        told = f"a step, of which ranks wait {self.step.bubble:.1%} of the passes' time"
        yield _text(_MARGIN, top - 30, told, weight="bold")
        left = _MARGIN
        for kind, name in _NAMES.items():
            if kind not in {_kind(event) for event in self.step.events}:
                continue
            colour = _COLOURS[kind]
            yield f'<rect x="{left}" y="{top - 20}" width="10" height="10" fill="{colour}"/>'
            yield _text(left + 14, top - 11, name, size=11)
            left += 30 + 7 * len(name)
        for place in range(self.step.places):
            y = top + place * _LANE
            yield _text(_MARGIN, y + 14, f"pp = {place}")
            yield f'<rect x="{x}" y="{y}" width="{width}" height="{_LANE - 4}" fill="#eceff1"/>'
            for event, first, last in self.drawn(place, width / end):
                yield from _pass(event, x + first, y, last - first)
        bottom = top + self.step.places * _LANE + 12
        yield _text(x, bottom, "0", size=10)
        yield _text(x + width, bottom, seconds_text(end), anchor="end", size=10)

    def drawn(self, place: int, scale: float) -> Iterator[tuple[Event, float, float]]:
        """Yield what a rank computes, with where each begins and ends in the picture.

        Passes of one kind that are too narrow to be told apart are one.
        """
        waiting: tuple[Event, float, float] | None = None
        events = sorted(self.step.events, key=lambda event: event.start)
        for event in events:
            if event.place != place or event.stream != COMPUTE:
                continue
            first, last = event.start * scale, event.end * scale
            if waiting is not None:
                narrow = last - first < _NARROW and first - waiting[2] < _NARROW / 2
                if narrow and _kind(event) == _kind(waiting[0]):
                    waiting = (waiting[0], waiting[1], last)
                    continue
                yield waiting
            waiting = (event, first, last)
        if waiting is not None:
            yield waiting


def _pass(event: Event, x: float, y: float, width: float) -> Iterator[str]:
    """Yield one pass, with the number of its micro-batch where there is room for it."""
    yield (
        f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.3):.1f}" height="{_LANE - 4}" '
        f'fill="{_COLOURS[_kind(event)]}" stroke="#ffffff" stroke-width="0.4">'
        f"<title>{escape(event.name)}: {seconds_text(event.end - event.start)}</title></rect>"
    )
    number = str(event.microbatch)
    if event.microbatch >= 0 and width > 7 * len(number) + 3:
        yield _text(x + width / 2, y + 13, number, anchor="middle", size=10)


def _kind(event: Event) -> str:
    """Return what an event is drawn as."""
    return "weights" if event.name.startswith("gradients of weights") else event.phase


def _ops_of_stages(plan: Plan) -> list[list[OpChoice]]:
    """Return the ops of each stage, in the plan's order."""
    assert plan.pipeline is not None
    first = {name: stage for stage, name in enumerate(plan.pipeline.starts)}
    stages: list[list[OpChoice]] = [[] for _ in plan.pipeline.starts]
    stage = 0
    for op in plan.ops:
        stage = first.get(op.name, stage)
        stages[stage].append(op)
    return stages


def _rows_of_stage(plan: Plan, ops: Sequence[OpChoice], stage: int) -> list[str]:
    """Return what is written in the box of a stage."""
    pipeline = plan.pipeline
    assert pipeline is not None
    sizes = tuple(size for _, size in plan.mesh.axes)
    read = {name for op in ops for name in op.reads}
    held = sum(
        row.nbytes * layout_fraction(row.shape, row.storage, sizes)
        for row in plan.parameters
        if row.name in read
    )
    rows = [_short(row) for row in _modules(ops)]
    ahead = pipeline.forward_seconds[stage]
    rows.append(f"{bytes_text(int(held))} of parameters")
    rows.append(f"forward {seconds_text(ahead)}")
    rows.append(f"backward {seconds_text(pipeline.seconds[stage] - ahead)}")
    if pipeline.in_flight:
        rows.append(f"{pipeline.in_flight[stage]} in flight")
    if pipeline.memory:
        rows.append(f"{bytes_text(pipeline.memory[pipeline.rank_of(stage)])} on a rank")
    return rows


def _modules(ops: Sequence[OpChoice]) -> list[str]:
    """Return the modules that a stage computes, runs of numbered ones as one, four at most."""
    paths: dict[str, None] = {}
    for op in ops:
        parts = op.where.split(".")
        ends = [place for place, part in enumerate(parts) if part.isdigit()]
        paths[".".join(parts[: ends[0] + 1] if ends else parts[:2])] = None
    runs: list[list[Any]] = []
    for path in paths:
        name, _, number = path.rpartition(".")
        if number.isdigit() and runs and runs[-1][0] == name:
            runs[-1][2] = number
        else:
            runs.append([name, number, number] if number.isdigit() else [path, "", ""])
    texts = [
        f"{name}.{first}" + (f" to {last}" if last != first else "") if first else name
        for name, first, last in runs
        if name
    ]
    return texts if len(texts) <= 4 else [*texts[:2], "...", texts[-1]]


def _short(text: str, letters: int = 27) -> str:
    """Return the end of a text, where the text is longer."""
    return text if len(text) <= letters else "…" + text[1 - letters :]


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "normal",
    fill: str = "#222",
    anchor: str = "start",
) -> str:
    """Return a line of text."""
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
