"""Write docs/safety.md: what was tried with files that come from elsewhere, and what happened.

python docs/make_safety.py [count [seed]]; takes minutes. It exits with 1 where anything happened
that must not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from safety_rows import Row, safety_rows  # noqa: E402

MARKS = "<!-- The table: written by `make safety`. -->", "<!-- The end of the table. -->"


def table(rows: list[Row], count: int, seed: int) -> str:
    """Return the table as Markdown."""
    lines = [f"Tried with up to {count} of each, seed {seed}:", ""]
    lines += ["| tried | times | what happened |", "|---|---|---|"]
    for row in rows:
        happened = ", ".join(
            f"{text if row.is_good else f'**{text}**'} {number}"
            for text, number in row.counts.most_common()
        )
        lines.append(f"| {row.what} | {row.counts.total()} | {happened} |")
    return "\n".join(lines)


def main() -> int:
    """Try everything, and write the table; return the number of the process's exit."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    rows = []
    for row in safety_rows(count, seed):
        sys.stderr.write(f"{row.what}: {dict(row.counts)}\n")
        rows.append(row)
    path = ROOT / "docs" / "safety.md"
    before, _, rest = path.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    written = f"{before}{MARKS[0]}\n\n{table(rows, count, seed)}\n\n{MARKS[1]}{after}"
    path.write_text(written)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
