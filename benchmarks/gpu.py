"""Tries and measures this project on one GPU, in at most eight minutes, with nothing fetched.

    python benchmarks/gpu.py [--only checks,families,steps,shares,calibration] [--minutes 8]

It is meant for a machine that is hired by the minute: a bare image with Python, PyTorch and
transformers, and no network. What this project needs besides is imported only where it is used, and
wheels of it may be brought (`make gpu-wheels`). Every part runs in processes of its own with a
limit on its time, so that one that fails leaves the others' figures. They are written to
benchmarks/gpu/, in a file that is named after the GPU, and `python benchmarks/steps.py --document
docs` shows them.

Without a GPU the same parts run on the CPU with tiny sizes. That shows only that they run; the
figures go to out/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "gpu"
# The parts, with the processes that each takes and the most minutes that it may.
PARTS = {
    "nccl": (1, 1.0),
    "gloo2": (2, 1.5),
    "gloo4": (4, 1.5),
    "masks": (1, 0.5),
    "flash": (1, 0.5),
    "families": (1, 3.0),
    "steps": (1, 3.0),
    "shares": (1, 2.0),
    "calibration": (1, 1.5),
}
CHECKS = ("nccl", "gloo2", "gloo4", "masks", "flash")
# Without a GPU nobody pays by the minute, and the machine may be small and busy.
PATIENCE = 20.0
# Processes among which the families are dealt out.
FAMILY_PROCESSES = 6
TINY_FAMILIES = ("gpt2", "llama")


def run_part(part: str, folder: Path, families: list[str]) -> Iterator[dict[str, Any]]:
    """Run one part in this process, and yield its rows."""
    from gpu_kit import checks, steps
    from gpu_kit.setting import Setting

    setting = Setting.here()
    if part == "families":
        yield from checks.families(setting, families)
    elif part == "calibration":
        yield from steps.predicted(setting, folder)
    elif part.startswith("gloo"):
        yield from checks.gloo_ranks(setting)
    else:
        functions = {
            "nccl": checks.single_nccl,
            "masks": checks.masks,
            "flash": checks.flash,
            "steps": steps.step_times,
            "shares": steps.shares,
        }
        yield from functions[part](setting)


def work(part: str, file: Path, families: list[str]) -> None:
    """Run one part, and write its rows to a file, each when it is known."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    first = os.environ.get("RANK", "0") == "0"
    with file.open("w") if first else open(os.devnull, "w") as out:
        try:
            for row in run_part(part, file.parent, families):
                print(json.dumps(row), file=out, flush=True)
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            told = f"{type(error).__name__}: {lines[0]}"
            print(json.dumps({"what": part, "failed": told}), file=out, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo now and then abort a process that is ending.
    os._exit(0)


def start(part: str, file: Path, families: list[str], log: Any) -> subprocess.Popen[bytes]:
    """Start the processes of a part."""
    processes, _ = PARTS[part]
    program = [str(Path(__file__)), "--part", part, "--file", str(file)]
    program += ["--families", ",".join(families)]
    launcher: list[str] = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *program], stdout=log, stderr=log, env=environment
    )


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Return the rows that a part has written so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def collect(
    parts: list[str], minutes: float, families: list[str], patience: float
) -> dict[str, Any]:
    """Run parts one after the other, and return their rows.

    minutes: for all of it. families: those of the zoo. patience: what all limits are multiplied by.
    """
    end = time.monotonic() + minutes * patience * 60
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in parts:
            count = min(FAMILY_PROCESSES, os.cpu_count() or 1) if part == "families" else 1
            shares = [families[index::count] for index in range(count)]
            files = [folder / f"{part}-{index}.json" for index in range(count)]
            began = time.monotonic()
            with (folder / f"{part}.log").open("wb") as log:
                running = [
                    start(part, file, share, log)
                    for file, share in zip(files, shares, strict=True)
                    if share or part != "families"
                ]
                for process in running:
                    limit = began + PARTS[part][1] * patience * 60
                    left = min(end, limit) - time.monotonic()
                    try:
                        process.wait(max(1.0, left))
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
            rows = [row for file in files for row in rows_of(file)]
            if not rows:
                said = (folder / f"{part}.log").read_text(errors="replace").splitlines()
                rows = [{"what": part, "failed": "ended or timed out: " + " / ".join(said[-3:])}]
            results[part] = {"seconds": round(time.monotonic() - began, 1), "rows": rows}
            show(part, results[part])
    return results


def show(part: str, result: dict[str, Any]) -> None:
    """Print the rows of a part."""
    print(f"{part}: {result['seconds']} s")
    for row in result["rows"]:
        what = row.get("what") or f"{row['model']}, {row['way']}"
        if "failed" in row or "absent" in row:
            print(f"  {what}: {row.get('failed') or row.get('absent')}")
        elif "error" in row:
            verdict = "right" if row["right"] else "WRONG"
            print(f"  {what}: {verdict}, error {row['error']:.1e}")
        else:
            guess = f", predicted {row['predicted'] * 1e3:.2f} ms" if "predicted" in row else ""
            waits = f", waits: {row['waits']}" if row.get("waits") else ""
            print(f"  {what}: {row['seconds'] * 1e3:.2f} ms{guess}{waits}")
    sys.stdout.flush()


def main() -> int:
    """Run what was asked for, and write the figures. Returns 1 where a check is wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = {"checks": CHECKS, **{part: (part,) for part in PARTS}}
    parser.add_argument("--only", default="checks,families,steps,shares,calibration")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--families", default="", help="of tests/support/zoo.py; by default all")
    parser.add_argument("--out", type=Path, help="the folder for the figures")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [name for name in options.families.split(",") if name]
    if options.part:
        work(options.part, options.file, chosen)
    unknown = [name for name in options.only.split(",") if name not in groups]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(groups)}")
    import torch

    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"no GPU ({platform.machine()} CPU)"
    print(f"{hardware}, torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    if not cuda:
        print("no GPU is here: this shows only that the kit runs, on tiny sizes", flush=True)
    parts = [part for name in options.only.split(",") for part in groups[name]]
    if "families" in parts and not chosen:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
        if cuda:
            import zoo

            chosen = list(zoo.FAMILIES)
        else:
            chosen = list(TINY_FAMILIES)
    results = {
        "hardware": hardware,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": cuda,
        "parts": collect(parts, options.minutes, chosen, 1.0 if cuda else PATIENCE),
    }
    folder = options.out or (RESULTS if cuda else ROOT / "out" / "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {folder / name}.json")
    rows = [row for part in results["parts"].values() for row in part["rows"]]
    return int(any("failed" in row or row.get("right") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
