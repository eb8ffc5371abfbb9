"""Write docs/safety.md: what was tried, how often, and what happened.

python docs/make_safety.py [count [seed [pattern]]]; takes minutes. count: how often quick things
are tried. pattern: a regular expression; other rows stay as they are in the table. It exits with 1
where anything happened that must not.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The processes that run some rows import from the same folders.
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from safety.registry import GOOD, all_rows  # noqa: E402
from safety.table import document  # noqa: E402


def main() -> int:
    """Try the rows, and write the table; return the number of the process's exit."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    pattern = sys.argv[3] if len(sys.argv) > 3 else ""
    tried: dict[str, Counter[str]] = {}
    for row in all_rows():
        if re.search(pattern, row.what):
            tried[row.what] = row.tried(count, seed)
            sys.stderr.write(f"{row.what}: {dict(tried[row.what])}\n")
    path = ROOT / "docs" / "safety.md"
    path.write_text(document(path.read_text(), all_rows(), tried))
    return 0 if all(set(counts) <= GOOD for counts in tried.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
