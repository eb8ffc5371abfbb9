"""One run of the trainer in which random ranks are killed again and again, at random moments.

    python benchmarks/soak.py [kills [ranks]]

It ends well if the run does, and each of its steps has the loss of a run that nobody disturbs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from run_faults import Job, require  # noqa: E402

SAVES = ("--checkpoint.every=2", "--checkpoint.asynchronous=true")


def main() -> None:
    """Hunt a run, and compare it."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    ranks = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    options = (f"--training.steps={3 * kills + 10}", *SAVES)
    with tempfile.TemporaryDirectory() as name:
        quiet, hunted = Path(name, "quiet"), Path(name, "hunted")
        for folder in (quiet, hunted, hunted / "kills"):
            folder.mkdir()
        undisturbed = Job(quiet)
        require(undisturbed.run(1, *options), 0)
        os.environ.update(HUNTED=str(hunted / "kills"), HUNTED_KILLS=str(kills))
        job, begun = Job(hunted, "hunted"), time.monotonic()
        text = require(job.run(ranks, *options, restarts=2 * kills, timeout_seconds=3600), 0)
        done = len(list((hunted / "kills").iterdir()))
        resumed = re.findall(r"resumed from step (\d+)", text)
        expected, losses = undisturbed.losses(), job.losses()
        apart = max(abs(losses[step] - expected[step]) for step in expected)
        print(
            f"{done} kills on {ranks} ranks in {time.monotonic() - begun:.0f} s; resumed from "
            f"steps {', '.join(resumed)}; {len(losses)} steps, losses at most {apart:.1e} apart"
        )
        if apart > 1e-9 or len(losses) != len(expected):
            raise SystemExit("the disturbed run is not the undisturbed one")


if __name__ == "__main__":
    main()
