"""The picture of a model's threads as SVG: a lane for each thread, a row for each op."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from os import PathLike

from autoparallel.analysis.thread_splits import thread_splits
from autoparallel.errors import PlanError
from autoparallel.graph.graph import hint
from autoparallel.plan import Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.support.written_files import write_file
from autoparallel.threads import Threads
from autoparallel.threads.thread_names import ROLES
from autoparallel.view.threads_picture import Lane, Mark, Meeting, Row, ThreadsPicture, draw_threads

__all__ = ["threads_svg", "write_threads"]

# Distinct on white and on black, and told apart by people who see few colours: the lanes next to
# each other are never red and green of one lightness (Okabe and Ito's palette, darkened a little).
_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#b8860b", "#cc79a7"),
    *("#56a0d3", "#7d5ba6", "#8c6d31", "#5a7d2a", "#a63d57"),
)
_ROW, _LANE, _LEFT, _TOP, _NOTES = 30, 84, 360, 96, 540
_VERDICT = 22
_SIGNS = {"split": "✔", "free": "○", "whole": "✕"}


def write_threads(
    plan: Plan, path: str | PathLike[str], *, within: str = "", splits: bool = True
) -> None:
    """Write the picture of a model's threads as one SVG file: how each dim fares in each op.

    plan: whose model it is, made in this process. within: the path of a module, to draw only that;
    "" draws the model, of equal blocks the first. splits: draw what the plan splits, too, and what
    is synchronized for it.

        >>> import autoparallel, pathlib, tempfile, torch
        >>> plan = autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "threads.svg")
        >>> write_threads(plan, path)
        >>> "</svg>" in path.read_text()
        True

    Raises PlanError as `Plan.threads` does, and for a module in which nothing is drawn.
    """
    require_kind(plan, Plan, MAKE_ONE)
    write_file(path, threads_svg(plan, within=within, splits=splits).encode())


def threads_svg(plan: Plan, *, within: str = "", splits: bool = True) -> str:
    """Return the picture that `write_threads` writes.

    Example: `threads_svg(plan, within="blocks.0")`
    """
    chosen = thread_splits(plan) if splits else None
    threads = chosen.threads if chosen is not None else plan.threads()
    assert plan.captured is not None
    title = f"{within} of {plan.model}" if within else plan.model
    picture = draw_threads(threads, title, plan.captured.blocks, chosen, within)
    if within and not picture.rows:
        raise PlanError(
            f"no op of {plan.model} with a gradient is in a module {within!r}",
            fix="give the path of a module, as in model.named_modules()",
        )
    return _Writer(picture, threads, plan if splits else None).text()


@dataclass(slots=True)
class _Spot:
    """The place of a lane: its x and its colour."""

    x: float
    colour: str


class _Writer:
    """A writer of one picture."""

    def __init__(self, picture: ThreadsPicture, threads: Threads, plan: Plan | None) -> None:
        self.picture, self.threads, self.plan = picture, threads, plan
        self.spots = {
            lane.thread.number: _Spot(_LEFT + _LANE * (at + 0.5), _COLOURS[at % len(_COLOURS)])
            for at, lane in enumerate(picture.lanes)
        }
        self.right = _LEFT + _LANE * len(picture.lanes)
        self.bottom = _TOP + _ROW * len(picture.rows)
        noted = any(row.synchronizations for row in picture.rows)
        self.width = self.right + (_NOTES if noted else 40)
        self.width = max(self.width, 900)
        self.height = self.bottom + 64 + _VERDICT * (len(picture.lanes) + 1)

    def text(self) -> str:
        """Return the whole SVG."""
        what = escape(self.picture.title)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" class="threads" '
            f'aria-label="Threads of {what}" font-family="DejaVu Sans,Verdana,sans-serif">',
            f"<title>Threads of {what}</title>",
            _STYLE,
            f'<rect class="ground" width="{self.width}" height="{self.height}"/>',
            *self.heads(),
            *self.lanes(),
            *self.blocks(),
            *(part for at, row in enumerate(self.picture.rows) for part in self.row(at, row)),
            *self.verdicts(),
            "</svg>",
        ]
        return "\n".join(parts)

    def y(self, at: int) -> float:
        """Return the middle of a row."""
        return _TOP + _ROW * (at + 0.5)

    def heads(self) -> Iterator[str]:
        """Draw the title, what marks mean, and the lanes' names."""
        title = f"Threads of {escape(self.picture.title)}"
        yield f'<text x="16" y="26" class="ink title">{title}</text>'
        if self.plan is not None:
            mesh = escape(f"as split on {self.plan.mesh}")
            yield f'<text x="16" y="44" class="quiet">{mesh}</text>'
        for lane in self.picture.lanes:
            spot, thread = self.spots[lane.thread.number], lane.thread
            words = _lines(thread.name)
            meaning = escape(ROLES.get(thread.name, thread.name))
            for line, word in enumerate(words):
                y = _TOP - 22 - 12 * (len(words) - 1 - line)
                yield (
                    f'<text x="{spot.x}" y="{y}" class="name" fill="{spot.colour}" '
                    f'text-anchor="middle">{escape(word)}<title>{meaning}</title></text>'
                )
            yield (
                f'<text x="{spot.x}" y="{_TOP - 8}" class="quiet" text-anchor="middle">'
                f"{hint(thread.size)}</text>"
            )

    def lanes(self) -> Iterator[str]:
        """Draw the lines behind the marks: thick where the row's result has the thread, broad where
        the plan splits it, dotted where it waits.
        """
        for at in range(len(self.picture.rows)):
            if at % 2:
                y = _TOP + _ROW * at
                yield f'<rect class="stripe" x="0" y="{y}" width="{self.width}" height="{_ROW}"/>'
        for lane in self.picture.lanes:
            number, spot = lane.thread.number, self.spots[lane.thread.number]
            met = [at for at, row in enumerate(self.picture.rows) if number in row.meetings]
            for one, other in pairwise(met):
                carried = self.picture.rows[one].meetings[number].is_carried
                kind = "lane" if other == one + 1 and carried else "waits"
                yield (
                    f'<line class="{kind}" x1="{spot.x}" x2="{spot.x}" y1="{self.y(one)}" '
                    f'y2="{self.y(other)}" stroke="{spot.colour}"/>'
                )
            for at in met:
                meeting = self.picture.rows[at].meetings[number]
                if meeting.axes:
                    y, names = _TOP + _ROW * at, ", ".join(meeting.axes)
                    yield (
                        f'<rect class="split" x="{spot.x - 17}" y="{y + 1}" width="34" '
                        f'height="{_ROW - 2}" rx="5" fill="{spot.colour}" stroke="{spot.colour}">'
                        f"<title>split on {escape(names)}</title></rect>"
                    )

    def block(self, row: Row) -> str:
        """Return the path of the repeated block that a row is in; "" for none."""
        for path in self.picture.repeats:
            if row.where == path or row.where.startswith(f"{path}."):
                return path
        return ""

    def blocks(self) -> Iterator[str]:
        """Draw a bracket beside the rows of each repeated block, with the number of such blocks."""
        blocks = [self.block(row) for row in self.picture.rows]
        for path, number in self.picture.repeats.items():
            if path not in blocks:
                continue
            first = blocks.index(path)
            last = len(blocks) - 1 - blocks[::-1].index(path)
            top, bottom = _TOP + _ROW * first + 3, _TOP + _ROW * (last + 1) - 3
            middle = (top + bottom) / 2
            text = escape(_short(f"{path} × {number}", int((bottom - top) / 7)))
            yield (
                f'<path class="bracket" d="M30 {top} h-6 V{bottom} h6"/>'
                f'<text class="ink where" x="16" y="{middle}" text-anchor="middle" '
                f'transform="rotate(-90 16 {middle})">{text}</text>'
            )

    def row(self, at: int, row: Row) -> Iterator[str]:
        """Draw one row: its name, its merged dims, its marks, and what is synchronized after it."""
        y = self.y(at)
        above = self.picture.rows[at - 1].where if at else None
        if row.where != above:
            block = self.block(row)
            inside = row.where.removeprefix(block).removeprefix(".") if block else row.where
            where = escape(_short(inside or row.where or self.picture.title, 27))
            yield f'<text x="38" y="{y + 4}" class="ink where">{where}<title>{where}</title></text>'
            if at:
                edge = y - _ROW / 2
                yield f'<line class="edge" x1="34" x2="{self.width - 8}" y1="{edge}" y2="{edge}"/>'
        name = escape(_short(row.text, 20))
        yield (
            f'<text x="{_LEFT - 22}" y="{y + 4}" class="quiet" text-anchor="end">{name}'
            f"<title>{escape(', '.join(row.ops))}</title></text>"
        )
        for dim in row.merged:
            xs = sorted(self.spots[number].x for number in dim if number in self.spots)
            if len(xs) > 1:
                yield f'<line class="merged" x1="{xs[0]}" x2="{xs[-1]}" y1="{y}" y2="{y}"/>'
        for number, meeting in row.meetings.items():
            if number in self.spots:
                yield from self.mark(self.spots[number], y, meeting, number)
        for line, (phase, text) in enumerate(row.synchronizations[:2]):
            count_ = min(len(row.synchronizations), 2)
            offset = 4 if count_ == 1 else -2 + 12 * line
            arrow = {"forward": "▶", "backward": "◀"}.get(phase, "◆")
            yield (
                f'<text x="{self.right + 16}" y="{y + offset}" class="{phase} note">{arrow} '
                f"{escape(_short(text, 76))}<title>{escape(text)}</title></text>"
            )

    def mark(self, spot: _Spot, y: float, meeting: Meeting, number: int) -> Iterator[str]:
        """Draw what happens to a thread in a row."""
        marks, x, colour = meeting.marks, spot.x, spot.colour
        name = self.threads.threads[number].name
        told = escape(f"{name}: {', '.join(mark.value for mark in marks)}")
        if meeting.backward:
            told += escape("; backward: the gradient of what is read is a sum over it")
        title = f"<title>{told}</title>"
        if Mark.WHOLE in marks or Mark.KERNEL in marks:
            kind, word = ("whole", "all") if Mark.WHOLE in marks else ("kernel", "all*")
            yield (
                f'<g><rect class="{kind}" x="{x - 19}" y="{y - 9}" width="38" height="18" rx="3"/>'
                f'<text x="{x}" y="{y + 4}" class="{kind}-word" text-anchor="middle">{word}</text>'
                f"{title}</g>"
            )
        elif Mark.SUM in marks:
            yield (
                f'<g><circle cx="{x}" cy="{y}" r="10" fill="{colour}"/>'
                f'<text x="{x}" y="{y + 5}" class="sum" text-anchor="middle">Σ</text>{title}</g>'
            )
        elif Mark.BORN in marks:
            yield (
                f'<circle class="born" cx="{x}" cy="{y}" r="6" stroke="{colour}">{title}</circle>'
            )
        else:
            yield f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}">{title}</circle>'
        if meeting.backward:
            yield (
                f'<g><circle class="back" cx="{x + 23}" cy="{y}" r="8" stroke="{colour}"/>'
                f'<text x="{x + 23}" y="{y + 4}" class="back-word" fill="{colour}" '
                f'text-anchor="middle">Σ</text>{title}</g>'
            )
        if meeting.weights:
            yield (
                f'<path class="back" d="M{x - 21} {y} l5 -5 l5 5 l-5 5 z" stroke="{colour}">'
                "<title>gradients of weights are sums over it</title></path>"
            )

    def verdicts(self) -> Iterator[str]:
        """Draw what marks mean, and for each lane whether it is good to split."""
        y = self.bottom + 28
        legend = (
            "○ begins · ● passes free · Σ filled: ends in a sum, which must be synchronized if the "
            "thread is split · Σ open: so must the gradient, in the backward pass"
        )
        more = (
            "all: the op needs the whole thread · all*: it can ask the other ranks for it · "
            "◇ gradients of weights are sums over it · bar: merged into one dim"
        )
        yield f'<text x="16" y="{y}" class="quiet">{escape(legend)}</text>'
        yield f'<text x="16" y="{y + 16}" class="quiet">{escape(more)}</text>'
        for at, lane in enumerate(self.picture.lanes):
            yield from self.verdict(lane, y + 44 + _VERDICT * at)

    def verdict(self, lane: Lane, y: float) -> Iterator[str]:
        """Draw one line of the verdicts."""
        spot = self.spots[lane.thread.number]
        yield (
            f'<text x="24" y="{y}" class="sign {lane.kind}-sign" text-anchor="middle">'
            f"{_SIGNS[lane.kind]}</text>"
            f'<text x="40" y="{y}" class="name" fill="{spot.colour}">{escape(lane.thread.name)}'
            f'</text><text x="230" y="{y}" class="ink">{escape(lane.verdict)}</text>'
        )


# In a page, the page's own variables give the colours of its light and dark dress.
_STYLE = """<style>
.threads text{font-size:11px}
.threads .ground{fill:var(--ground,#fff)}
.threads .stripe{fill:var(--stripe,#f6f8fa)}
.threads .ink{fill:var(--ink,#1f2933)}
.threads .quiet{fill:var(--quiet,#5b6770)}
.threads .title{font-size:16px;font-weight:bold}
.threads .where{font-weight:bold}
.threads .name{font-weight:bold}
.threads .bracket{fill:none;stroke:var(--quiet,#5b6770);stroke-width:1.5}
.threads .edge{stroke:var(--edge,#d5dbe1)}
.threads .lane{stroke-width:3}
.threads .waits{stroke-width:1.5;stroke-dasharray:2 4;opacity:.75}
.threads .split{fill-opacity:.22;stroke-opacity:.75;stroke-width:1.5}
.threads .merged{stroke:var(--quiet,#5b6770);stroke-width:2.5}
.threads .whole{fill:var(--ink,#1f2933)}
.threads .whole-word{fill:var(--ground,#fff);font-weight:bold}
.threads .kernel{fill:var(--ground,#fff);stroke:var(--ink,#1f2933);stroke-width:1.5}
.threads .kernel-word{fill:var(--ink,#1f2933);font-weight:bold}
.threads .sum{fill:#fff;font-size:14px;font-weight:bold}
.threads .born{fill:var(--ground,#fff);stroke-width:3}
.threads .back{fill:var(--ground,#fff);stroke-width:1.5}
.threads .back-word{font-size:11px}
.threads .forward{fill:var(--forward,#b3261e)}
.threads .backward{fill:var(--backward,#1565c0)}
.threads .kernel.note{fill:var(--quiet,#5b6770);stroke:none}
.threads .note{font-size:10.5px}
.threads .sign{font-size:13px;font-weight:bold}
.threads .split-sign{fill:var(--good,#2e7d32);fill-opacity:1;stroke:none}
.threads .free-sign{fill:var(--quiet,#5b6770)}
.threads .whole-sign{fill:var(--forward,#b3261e)}
</style>"""


def _lines(name: str) -> list[str]:
    """Return a name in lines that fit a lane."""
    lines: list[str] = []
    for word in name.split(" "):
        if lines and len(lines[-1]) + len(word) < 13:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _short(text: str, letters: int) -> str:
    """Return a text that is no longer than so many letters."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
