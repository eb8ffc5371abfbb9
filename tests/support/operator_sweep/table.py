"""The table of operators as a document, and what it says of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

import torch

from .outcomes import FAILURES, Run

__all__ = ["Row", "document", "kinds_in", "row_of"]

_HEAD = """# Operators

PyTorch tests itself with a database of its operators and one of its modules. Each op that knows
float64 was put between parameters and a loss, at several sizes, and the small model was split: over
2 and 3 ranks and a mesh of 2 x 2, by the best plan and by plans of random costs. Loss, outputs,
gradients and buffers of all ranks together were compared with those of the unsplit model, to a
relative difference of 1e-8. Written by `make opinfo`, which exits with an error where an op is
wrong or crashes.

- split: some plan splits it.
- whole: every rank computes it on whole operands.
- Python: the module that calls it stays Python, and what is around it is split.
- refused: an error of the library says why.
- nothing left: the trace has no op of it, because it is a view of all, or a constant.
- not run: torch itself does not run it on ordinary CPU tensors.
- **wrong**, **crash**, **dead**, **slow**: failures; there should be none.

Reasons are of the samples that are not split or were refused.
"""


@dataclass(frozen=True)
class Row:
    """A Row says what came of an op: its kind, and the reason where it is not split everywhere."""

    name: str
    kind: str
    note: str

    @property
    def failed(self) -> bool:
        """Whether it is a failure."""
        return self.kind in FAILURES


def row_of(name: str, runs: Sequence[Run]) -> Row:
    """Return what the runs of an op come to.

    >>> row_of("add", [Run("[]", "2", "right", split=1)])
    Row(name='add', kind='split', note='')
    """
    by_status = {run.status: run for run in reversed(runs)}
    for status in FAILURES:
        if status in by_status:
            return Row(name, status, by_status[status].why)
    refused = by_status.get("refused")
    python = next((run.python for run in runs if run.python), "")
    alone = next((run.alone for run in runs if run.alone), "")
    note = f"refused: {refused.why}" if refused else f"Python: {python}" if python else alone
    if any(run.split for run in runs):
        return Row(name, "split", note)
    if any(run.whole for run in runs):
        return Row(name, "whole", note)
    if python:
        return Row(name, "Python", python)
    if refused:
        return Row(name, "refused", refused.why)
    if "right" in by_status:
        return Row(name, "nothing left", "")
    return Row(name, "not run", by_status["not run"].why if "not run" in by_status else "")


def document(results: Mapping[str, Sequence[Run]]) -> str:
    """Return the document. results: the runs of each op, by its name."""
    rows = [row_of(name, runs) for name, runs in results.items()]
    modules = [row for row in rows if row.name.startswith("torch.nn.")]
    ops = [row for row in rows if row not in modules]
    runs = sum(run.status in ("right", "wrong") for each in results.values() for run in each)
    release = torch.__version__.partition("+")[0]
    parts = [_HEAD.strip(), f"Torch {release}; {runs} runs were compared."]
    counted = ["| | " + " | ".join(kinds := _kinds(rows)) + " |", "|---" * (len(kinds) + 1) + "|"]
    for title, group in (("operators", ops), ("modules", modules)):
        counts = [str(sum(row.kind == kind for row in group)) for kind in kinds]
        counted.append(f"| {len(group)} {title} | {' | '.join(counts)} |")
    parts.append("\n".join(counted))
    for title, group in (("Operators", ops), ("Modules", modules)):
        parts.append(f"## {title}")
        parts.append("\n".join(["| name | is |", "|---|---|", *map(_line, group)]))
        notes = [_item(row) for row in group if row.note]
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def _kinds(rows: Sequence[Row]) -> list[str]:
    """Return the kinds that there are, in the order of the head."""
    order = ("split", "whole", "Python", "refused", "nothing left", "not run", *FAILURES)
    return [kind for kind in order if any(row.kind == kind for row in rows)]


def _line(row: Row) -> str:
    kind = f"**{row.kind}**" if row.failed else row.kind
    return f"| {row.name} | {kind} |"


def _item(row: Row) -> str:
    """Return the reason of a row as an item of a list."""
    text = " ".join(row.note.replace("`", "'").split())
    broken = {"break_long_words": False, "break_on_hyphens": False}
    return "\n".join(wrap(f"- {row.name}: `{text}`", 100, subsequent_indent="  ", **broken))


def kinds_in(text: str) -> dict[str, str]:
    """Return what a document says of each op: its kind, by its name."""
    lines = text.partition("\n## ")[2].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {name: kind.strip("*") for name, kind in rows if name != "name"}
