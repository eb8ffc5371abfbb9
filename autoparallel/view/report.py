"""The report of a plan for the terminal: splits, communication, memory, and what they cost."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoparallel.analysis.communication import collective_totals
from autoparallel.placement import Invariant, Partial, Replicate, Shard
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.view.folded_rows import Folded, fold
from autoparallel.view.report_header import report_header
from autoparallel.view.words import Words, collective_text, kind_of
from autoparallel.view.wrapped_path import WrappedPath

__all__ = ["plan_text", "print_plan"]

WIDTH = 160  # of a report that is not written to a terminal

_STYLES: Mapping[type, str] = {
    Invariant: "dim",
    Replicate: "green",
    Shard: "bold cyan",
    Partial: "yellow",
}

_LEGEND = (
    "I     the same on all ranks, as in one process (Invariant)",
    "R     the same on all ranks, used by each for its part: its gradient is a sum (Replicate)",
    "S(d)  each rank has a part of dim d; blocks=k: its part of each of k equal blocks; "
    "unit=u: in whole runs of u elements (Shard)",
    "P     each rank has a term of the sum that is the value (Partial)",
)
# Words in the table of communications that need an explanation, where they occur.
_NOTES = {
    "together": "together: in one collective with the gradients of other parameters",
    "again": "again: sent once more in the backward pass, in place of keeping a copy",
}


def print_plan(plan: Plan, file: TextIO | None = None, console: Console | None = None) -> None:
    """Print all that a plan says: splits, communication, memory, and what is left whole.

    plan: it may have been read from JSON; nothing is computed that needs the graph. file: where to
    print, standard output if not given. console: rich's, instead of one made here. Off a terminal
    it is plain text, 160 columns wide. Raises AutoParallelError where `plan` is no plan.

        >>> import autoparallel, io, torch
        >>> plan = autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
        >>> file = io.StringIO()
        >>> print_plan(plan, file)
        >>> file.getvalue().splitlines()[1].rstrip()
        'mesh            Mesh(tp=2), 2 ranks'
    """
    require_kind(plan, Plan, MAKE_ONE)
    if console is None:
        console = Console(file=file, highlight=False)
        if not console.is_terminal:
            console = Console(file=file, highlight=False, width=WIDTH, color_system=None)
    words = Words(plan)
    tables = (
        _breaks(plan),
        _parameters(plan, words),
        _communications(plan, words),
        _totals(plan),
        _memory(plan),
        _whole(plan),
    )
    console.print(report_header(plan, words))
    console.print()
    for table in tables:
        if table is not None:
            console.print(table)
    for line in (*_kernels(plan), *_discovered(plan), "", *_LEGEND):
        console.print(Text(line))


def plan_text(plan: Plan) -> str:
    """Return as plain text what print_plan prints: 160 columns, no spaces at the ends of lines.

    plan: it may have been read from JSON.
    """
    file = io.StringIO()
    print_plan(plan, console=Console(file=file, width=WIDTH, color_system=None, highlight=False))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


_Cell = str | Text | WrappedPath


# Texts are wrapped in Text, because rich would read "[...]" in them as a style.
def _table(title: str, columns: list[tuple[str, bool]], rows: Sequence[tuple[_Cell, ...]]) -> Table:
    """Make a table of these columns, (name, is it aligned to the right)."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _times(folded: Folded) -> str:
    """Say how many rows one stands for; nothing for itself alone."""
    return f"×{folded.count}" if folded.count > 1 else ""


def _parameters(plan: Plan, words: Words) -> Table:
    """Tell how each parameter is stored and split, repeated layers once."""

    def split(parameter: ParameterChoice) -> str:
        text = words.split(parameter)
        return f"{text}: {parameter.reason}" if parameter.reason else text

    rows = fold((p.path, (p.shape, p.storage, p.state, split(p)), p) for p in plan.parameters)
    return _table(
        "Parameters",
        [
            ("parameter", False),
            ("", False),
            ("shape", False),
            ("placement", False),
            ("split", False),
        ],
        [
            (
                WrappedPath(row.path),
                _times(row),
                " × ".join(map(str, row.first.shape)) or "scalar",
                Text(words.layout(row.first.storage), style=_STYLES[kind_of(row.first.storage)]),
                split(row.first),
            )
            for row in rows
        ],
    )


def _communications(plan: Plan, words: Words) -> Table:
    """Tell each conversion that communicates, repeated layers once, with notes on rare words."""
    moves = [c for c in plan.conversions if words.sent(c)]
    sent = [transfer for conversion in moves for transfer in words.sent(conversion)]
    occurs = {
        "together": any(transfer.together for transfer in sent),
        "again": any(transfer.again for transfer in sent),
    }

    def content(conversion: Conversion) -> tuple[object, ...]:
        op = words.producers.get(conversion.value)
        return (
            op.target if op else "",
            conversion.source,
            conversion.target,
            conversion.steps,
            conversion.again,
            conversion.shape,
            conversion.nbytes,
            conversion.requires_grad,
        )

    rows = fold((words.where(c.value), content(c), c) for c in moves)
    columns = ["value", "where", "", "change", "forward", "backward", "shape", "bytes", "time"]
    table = _table(
        "Communications (one step; bytes and time of each)",
        [(name, name in ("bytes", "time")) for name in columns],
        [
            (
                _value(words, row.first.value),
                WrappedPath(row.path),
                _times(row),
                words.change(row.first, "\n"),
                Text(_sent(words, row.first, ("forward",)), style="magenta"),
                Text(_sent(words, row.first, ("backward", "update")), style="blue"),
                words.shape(row.first),
                bytes_text(row.first.nbytes),
                seconds_text(row.first.seconds),
            )
            for row in rows
        ],
    )

    notes = [note for word, note in _NOTES.items() if occurs[word]]
    if notes:
        table.caption, table.caption_justify = Text("\n".join(notes), style="dim"), "left"
    return table


def _value(words: Words, value: str) -> _Cell:
    """Name a value; a parameter is named by the column beside."""
    return "(parameter)" if value in words.parameters else WrappedPath(words.value(value))


def _sent(words: Words, conversion: Conversion, phases: Sequence[str]) -> str:
    """Tell what is sent in these phases: "all-reduce together on dp and tp", "–" for nothing."""
    told = []
    for transfer in words.sent(conversion):
        if transfer.phase in phases:
            text = collective_text(transfer.collective)
            # On several axes a move sends the part that the other axes have left.
            if len(words.axes) > 1 and transfer.nbytes != conversion.nbytes:
                text += f" {bytes_text(transfer.nbytes)}"
            text += " together" if transfer.together else ""
            text += " again" if transfer.again else ""
            text += " after the update" if transfer.phase == "update" else ""
            told.append((text, transfer.step.axis))
    return words.by_axes(told, "\n" if len(words.axes) > 1 else ", ") or "–"


def _breaks(plan: Plan) -> Table | None:
    """Tell which modules are not traced, and why; None where the model is traced whole."""
    if not plan.breaks:
        return None
    rows = fold((item.path, (item.line, item.reason), item) for item in plan.breaks)
    return _table(
        "Plain Python, run alike on all ranks (what it calls is split; see the parts below)",
        [("module", False), ("", False), ("why", False), ("where", False)],
        [
            (WrappedPath(row.path or "(model)"), _times(row), row.first.reason, row.first.line)
            for row in rows
        ],
    )


def _totals(plan: Plan) -> Table:
    """Count the collectives of one step by phase, mesh axis and kind."""
    several = len(plan.mesh.axes) > 1
    rows = []
    for (phase, axis, collective), (count, nbytes) in collective_totals(plan).items():
        place = [axis] if several else []
        rows.append((phase, *place, collective_text(collective), str(count), bytes_text(nbytes)))
    if not rows:
        rows = [("forward and backward", *([""] if several else []), "none", "0", "0 B")]
    columns = [("pass", False), *([("axis", False)] if several else []), ("collective", False)]
    return _table("Collectives in one step", [*columns, ("count", True), ("bytes", True)], rows)


def _memory(plan: Plan) -> Table | Text:
    """Tell what takes the memory of the rank that needs most."""
    memory = plan.memory
    if not memory:
        return Text("Memory: the plan does not say what it takes; plan again to have it counted.")
    total = sum(nbytes for _, nbytes in memory)
    rows = [
        (name.replace("_", " "), bytes_text(nbytes), f"{nbytes / total:.1%}" if total else "")
        for name, nbytes in memory
        if nbytes
    ]
    rows.append(("all", bytes_text(total), ""))
    if plan.memory_limit is not None:
        limit = plan.memory_limit
        rows.append(("limit", bytes_text(limit), f"{total / limit:.1%} of it used"))
    columns = [("for", False), ("bytes", True), ("share", True)]
    return _table("Memory of the rank that needs most", columns, rows)


def _whole(plan: Plan) -> Table | None:
    """Tell what is left whole, by reason; None where nothing is.

    What splitting one would add is that of the best plan that splits it.
    """
    parameters: dict[str, list[ParameterChoice]] = {}
    for parameter in plan.parameters:
        if parameter.reason:
            parameters.setdefault(parameter.reason, []).append(parameter)
    products: dict[str, list[OpChoice]] = {}
    for op in plan.ops:
        if op.reason:
            products.setdefault(op.reason, []).append(op)
    if not parameters and not products:
        return None
    nbytes = sum(parameter.nbytes for parameter in plan.parameters)
    flops = sum(op.whole_flops for op in plan.ops)
    rows = []
    for reason, group in parameters.items():
        whole = sum(parameter.nbytes for parameter in group)
        share = f"{whole / nbytes:.2%} of bytes" if nbytes else ""
        rows.append((reason, "parameters", str(len(group)), share, _added(group)))
    for reason, ops in products.items():
        share = f"{sum(op.whole_flops for op in ops) / flops:.2%} of FLOPs" if flops else ""
        rows.append((reason, "products", str(len(ops)), share, _added(ops)))
    columns = [("why", False), ("what", False), ("count", True), ("share", True)]
    return _table("Left whole", [*columns, ("splitting one adds to the cost", True)], rows)


def _added(group: Sequence[ParameterChoice] | Sequence[OpChoice]) -> str:
    """Return the range of what splitting one of the group would add, "" if nothing is known."""
    known = sorted(item.added for item in group if item.added > 0)
    if not known:
        return ""
    low, high = seconds_text(known[0]), seconds_text(known[-1])
    return low if low == high else f"{low} to {high}"


def _kernels(plan: Plan) -> list[str]:
    """Name the kernels of ours that run ops, whose collectives are inside of them."""
    kernels = Counter(name for op in plan.ops for name in op.kernels if name)
    if not kernels:
        return []
    text = ", ".join(f"{name} ×{count}" for name, count in kernels.items())
    return [f"Run by kernels that may communicate inside, which is not counted above: {text}"]


def _discovered(plan: Plan) -> list[str]:
    """Tell the rules that were found by trial, and why none was, each once with the number of its
    calls.
    """
    rules = Counter((op.target, op.discovered) for op in plan.ops if op.discovered)
    rows = [f"  {target} ×{count}: {rule}" for (target, rule), count in rules.items()]
    return ["Rules of ops for which none is written:", *rows] if rows else []
