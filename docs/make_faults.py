"""Write docs/faults.md: faults of training runs, what happened, what was lost, seconds to recover.

python docs/make_faults.py [pattern]; takes some minutes. pattern: a regular expression; other rows
stay as they are in the table. It exits with an error where anything else happened than is said.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from run_faults import FAULTS, Outcome, try_all  # noqa: E402

DOCUMENT = ROOT / "docs" / "faults.md"
START, END = "<!-- The table: written by `make faults`. -->", "<!-- The end of the table. -->"


def rows_of(text: str) -> dict[str, str]:
    """Return the lines of the table, by the fault."""
    table = text.partition(START)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0][2:]: line for line in lines[1:]}


def line_of(what: str, outcome: Outcome) -> str:
    """Return the line of a fault."""
    seconds = "" if outcome.seconds is None else f"{outcome.seconds:.0f}"
    return f"| {what} | {outcome.happened} | {outcome.lost} | {seconds} |"


def main() -> None:
    """Try the faults, and write the table after each of them."""
    for what, outcome in try_all(sys.argv[1] if len(sys.argv) > 1 else ""):
        write({what: line_of(what, outcome)})


def write(new: dict[str, str]) -> None:
    """Put lines into the table in the place of those of the same faults."""
    text = DOCUMENT.read_text()
    lines = {**rows_of(text), **new}
    table = [
        "| fault | what happened | what was lost | seconds to the next step |",
        "|---|---|---|---|",
        *(lines[row.what] for row in FAULTS if row.what in lines),
    ]
    before, after = text.partition(START)[0], text.partition(END)[2]
    DOCUMENT.write_text(f"{before}{START}\n\n" + "\n".join(table) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
