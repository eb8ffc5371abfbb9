"""Write docs/compatibility.md: which habits around nn.Module work with a split module.

python docs/make_compatibility.py; takes minutes. It runs every row of tests/support/habits, at one
rank and at two, and exits with 1 where a row is wrong or fails. Rows that need a library which is
not installed are not run: PYTHONPATH may name a folder that has peft, pytorch_lightning, diffusers
and requests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The processes that run the rows import from the same folders.
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from habits.launch import Outcome, outcomes  # noqa: E402
from habits.registry import all_habits  # noqa: E402
from habits.table import WORLD_SIZES, document  # noqa: E402


def main() -> int:
    """Run all rows, and write the table; return the number of the process's exit."""
    habits = all_habits()
    results: dict[int, dict[str, Outcome]] = {}
    for world_size in WORLD_SIZES:
        results[world_size] = {}
        for group in dict.fromkeys(habit.group for habit in habits):
            sys.stderr.write(f"{world_size} ranks: {group}\n")
            results[world_size] |= outcomes([h for h in habits if h.group == group], world_size)
    (ROOT / "docs" / "compatibility.md").write_text(document(habits, results))
    failed = [
        f"{world_size} ranks: {words}: {outcome.message}\n{outcome.trace}"
        for world_size, of_habits in results.items()
        for words, outcome in of_habits.items()
        if outcome.failed
    ]
    for text in failed:
        sys.stderr.write(f"\n{text}")
    missing = [habit.words for habit in habits if habit.missing]
    sys.stderr.write(f"\n{len(failed)} rows fail, {len(missing)} were not run: {missing}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
