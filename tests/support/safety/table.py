"""The table of docs/safety.md: its lines, and what a document says of each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .registry import GOOD, Row

__all__ = ["MARKS", "document", "lines_of"]

MARKS = "<!-- The table: written by `make safety`. -->", "<!-- The end of the table. -->"
_HEAD = ["| tried | times | what happened |", "|---|---|---|"]


def line_of(row: Row, counts: Counter[str]) -> str:
    """Return the line of a row; what must not happen stands out."""
    happened = ", ".join(
        f"{text if text in GOOD else f'**{text}**'} {number:,}"
        for text, number in counts.most_common()
    )
    return f"| {row.what} | {counts.total():,} | {happened.replace('|', '/')} |"


def lines_of(text: str) -> dict[str, str]:
    """Return the lines of the table in a document, by what was tried."""
    table = text.partition(MARKS[0])[2].partition(MARKS[1])[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line != _HEAD[0]}


def document(text: str, rows: tuple[Row, ...], tried: Mapping[str, Counter[str]]) -> str:
    """Return the document with the rows that were tried; those that were not stay as they are."""
    before, _, rest = text.partition(MARKS[0])
    known = lines_of(text)
    lines = [
        line_of(row, tried[row.what]) if row.what in tried else known[row.what]
        for row in rows
        if row.what in tried or row.what in known
    ]
    words = f"{len(lines)} rows, tried on gloo and in simulated ranks:"
    table = "\n".join([words, "", *_HEAD, *lines])
    return f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"
