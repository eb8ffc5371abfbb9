"""Write docs/operators.md: which of PyTorch's own operators and modules are split.

python docs/make_operators.py; takes about half an hour. It puts each op of torch's test database
into a small model, plans that in several ways, also at random, and compares losses, outputs and
gradients of all ranks with those of the unsplit model. It exits with 1 where something is wrong, or
a process dies. SEED=number makes the random plans of an earlier run again; ONLY=pattern runs the
ops whose names match, and writes nothing; RUNS=file keeps every run as a line of JSON, and does not
run again the ops that the file has, so that a sweep that was ended goes on.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from operator_sweep.launch import run_all  # noqa: E402
from operator_sweep.outcomes import Run  # noqa: E402
from operator_sweep.subjects import all_subjects  # noqa: E402
from operator_sweep.table import document, row_of  # noqa: E402

SECONDS_PER_OP = 90.0


def main() -> int:
    """Run all ops, and write the table; return the number of the process's exit."""
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    sys.stderr.write(f"SEED={seed}\n")
    only = os.environ.get("ONLY", "")
    kept = Path(os.environ["RUNS"]) if os.environ.get("RUNS") else None
    subjects = [subject for subject in all_subjects() if re.search(only, subject.name)]
    rows = []
    done: dict[str, list[Run]] = {}
    if kept is not None and kept.exists():
        for line in map(json.loads, kept.read_text().splitlines()):
            done.setdefault(line.pop("name"), []).append(Run(**line))

    def told(name: str, runs: list[Run]) -> None:
        row = row_of(name, runs)
        rows.append(row)
        if row.failed or only:
            sys.stderr.write(f"{len(rows)}/{len(subjects)} {name}: {row.kind} {row.note}\n")
            failures = {run.why: run for run in runs if run.failed}
            for run in failures.values():
                sys.stderr.write(f"    {run}\n")
                sys.stderr.write("".join(run.trace.splitlines(keepends=True)[-4:]))
        if kept is not None:
            with kept.open("a") as file:
                for run in runs:
                    file.write(json.dumps({"name": name, **asdict(run)}) + "\n")

    workers = int(os.environ.get("WORKERS") or 2)
    waiting = [subject for subject in subjects if subject.name not in done]
    done |= run_all(waiting, seed, workers, SECONDS_PER_OP, told)
    results = {subject.name: done[subject.name] for subject in subjects}
    if not only:
        (ROOT / "docs" / "operators.md").write_text(document(results))
    return 1 if any(row_of(name, runs).failed for name, runs in results.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
