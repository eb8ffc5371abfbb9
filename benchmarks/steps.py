"""Trains the same models by several libraries, step by step in turn, and compares what they take.

    python benchmarks/steps.py [--workloads gpt-64,llama-256] [--contenders ours-tp,hand-tp]
        [--before ../folder-of-another-build] [--json out/steps.json] [--document docs]

Two gloo processes of one thread each, and one process by itself, hold all contenders of a workload
at once. A round makes some steps by each contender, in an order that changes from round to round,
so that whatever else the machine does falls on all alike. A step is forward, backward, clipping
and AdamW. The figure of a round is the slower rank's. Processor time leaves out what the machine
does otherwise, and waiting; the wall's clock does not. Where others use the machine too, even
processor time has a long tail, of caches that are lost and of threads that take turns: ratios are
those of lower quartiles. With --alone nothing is communicated, and only the work of one rank is
measured, which is steady on any machine.

Every contender must have the plain model's loss after two steps, to 1e-4; one that has not, is not
installed or fails is listed with the reason. With --before, another checkout of this project takes
part in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders.document import write_document
from contenders.processes import FOLDER, Processes
from contenders.worker import CONTENDERS
from contenders.workloads import SMALLEST, WORKLOADS

TOLERANCE = 1e-4  # of losses in float32


@dataclass(frozen=True)
class Row:
    """The figures of one contender in one workload.

    cpu, wall: median seconds of a step. spread: of the processor time, half of the distance between
    the quartiles, relative to the median. rounds: the processor time of each round. collectives,
    nbytes: of a step on one rank, with the bytes of whole tensors. peak: bytes of all tensors of a
    rank at the worst moment. absent: the reason why there are no figures.
    """

    workload: str
    contender: str
    cpu: float | None = None
    wall: float | None = None
    spread: float | None = None
    collectives: int | None = None
    nbytes: int | None = None
    peak: int | None = None
    rounds: tuple[float, ...] = ()
    absent: str = ""


@dataclass
class Place:
    """A contender and the processes that it runs in. name: as in tables; "before: " is of another
    build. alone: the other rank does not run.
    """

    name: str
    contender: str
    processes: Processes
    alone: bool = False


def measure(workload: str, places: list[Place], rounds: int, seconds: float) -> list[Row]:
    """Return a row for each contender. seconds: what one contender steps for in a round, about."""
    running: list[Place] = []
    rows: dict[str, Row] = {}
    counts: dict[str, int] = {}
    expected: list[float] = []
    for place in places:
        _say(f"{workload}: {place.name} is made")
        reason = _make(workload, place, expected)
        if reason:
            rows[place.name] = Row(workload, place.name, absent=reason)
            continue
        running.append(place)
        once = place.processes.do("time", name=place.contender, count=2)
        each = max(answer["wall"] for answer in once)
        counts[place.name] = max(1, round(seconds / each))
    times: dict[str, list[tuple[float, float]]] = {place.name: [] for place in running}
    for number in range(rounds):
        _say(f"{workload}: round {number + 1} of {rounds}")
        start = number % max(1, len(running))
        for place in running[start:] + running[:start]:
            answers = place.processes.do("time", name=place.contender, count=counts[place.name])
            times[place.name].append(
                (max(a["cpu"] for a in answers), max(a["wall"] for a in answers))
            )
    for place in running:
        answer = place.processes.do("count", name=place.contender)[0]
        cpu = [one for one, _ in times[place.name]]
        quartiles = statistics.quantiles(cpu, n=4) if len(cpu) > 1 else [cpu[0]] * 3
        middle = statistics.median(cpu)
        rows[place.name] = Row(
            workload,
            place.name,
            middle,
            statistics.median(wall for _, wall in times[place.name]),
            (quartiles[2] - quartiles[0]) / 2 / middle,
            rounds=tuple(cpu),
            **answer,
        )
    for processes in {id(place.processes): place.processes for place in places}.values():
        processes.do("forget")
    return [rows[place.name] for place in places]


def _say(text: str) -> None:
    """Tell on stderr what is under way: planning and compiling take long."""
    print(text, file=sys.stderr, flush=True)


def _make(workload: str, place: Place, expected: list[float]) -> str:
    """Have a contender made; return the reason why it does not run, "" where it does.

    expected: the losses of the first contender, the plain model; they are put there by it.
    """
    answers = place.processes.do("make", name=place.contender, workload=workload)
    reasons = [answer["absent"] for answer in answers if "absent" in answer]
    if reasons:
        return str(reasons[0])
    for answer in answers:
        losses = answer["losses"]
        if place.alone:
            continue  # of sums that nobody has added up
        if not expected:
            expected += losses
        pairs = zip(losses, expected, strict=True)
        if any(abs(loss - other) > TOLERANCE * abs(other) for loss, other in pairs):
            return f"its losses {losses} are not the plain model's, {expected}"
    return ""


def hardware() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    family = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return f"{fields.get('model name', 'unknown')} ({family})"


def environment(before: Path | None) -> dict[str, str]:
    """Return what the figures depend on: hardware, releases and builds."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"hardware": hardware(), "cores": str(os.cpu_count())}
    # Far above the number of cores, others used the machine too.
    found["load average"] = f"{os.getloadavg()[0]:.0f}"
    for package in ("torch", "transformers", "megatron-core", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    for name, folder in (("build", FOLDER.parent), ("before", before)):
        if folder is not None:
            found[name] = subprocess.run(
                ["git", "-C", str(folder), "describe", "--always", "--dirty"],
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip()
    return found


def main() -> None:
    """Run what the command line asks for, print the rows, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [name for name in WORKLOADS if name != SMALLEST]
    parser.add_argument("--workloads", default=",".join(usual), help="comma-separated")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="run one of the two ranks, whose collectives return at once: for busy machines",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a contender in a round")
    parser.add_argument("--before", type=Path, help="a checkout of this project to compare with")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--figures",
        type=Path,
        nargs="+",
        help="measure nothing: write the document from a JSON file, and one of --alone",
    )
    parser.add_argument("--document", type=Path, help="write benchmarks.md and .svg there")
    parser.add_argument("--log", type=Path, help="write what libraries say to this file")
    options = parser.parse_args()
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    if options.figures:
        figures = [json.loads(file.read_text()) for file in options.figures]
        write_document(figures[0], titles, options.document or Path("docs"), *figures[1:2])
        return
    names = options.contenders.split(",")
    for given, known in ((names, CONTENDERS), (options.workloads.split(","), WORKLOADS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    log: Any = options.log.open("w") if options.log else subprocess.DEVNULL
    builds = {"": FOLDER.parent} | ({"before: ": options.before} if options.before else {})
    groups = {
        (prefix, ranks): Processes(folder, ranks, log, options.alone)
        for prefix, folder in builds.items()
        for ranks in (1, 2)
        if any(CONTENDERS[name].ranks == ranks for name in names)
        and (not prefix or any(name.startswith("ours") for name in names))
    }
    rows: list[Row] = []
    chosen = options.workloads.split(",")
    try:
        for workload in chosen:
            places = [
                Place(
                    prefix + name,
                    name,
                    groups[prefix, CONTENDERS[name].ranks],
                    options.alone and CONTENDERS[name].ranks > 1,
                )
                for prefix in builds
                for name in names
                if WORKLOADS[workload].kind in CONTENDERS[name].kinds
                and (not prefix or name.startswith("ours"))
            ]
            for row in measure(workload, places, options.rounds, options.seconds):
                rows.append(row)
                print(_line(row), flush=True)
            # What is known so far is kept: to measure everything takes long.
            done = chosen[: chosen.index(workload) + 1]
            _write(options, rows, done)
    finally:
        for processes in groups.values():
            processes.end()


def _write(options: argparse.Namespace, rows: list[Row], workloads: list[str]) -> None:
    """Write the figures, and the document, where the command line asks for them."""
    result = {
        "environment": environment(options.before),
        "rounds": options.rounds,
        "alone": options.alone,
        "workloads": {name: asdict(WORKLOADS[name]) for name in workloads},
        "rows": [asdict(row) for row in rows],
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.document:
        titles = {name: contender.title for name, contender in CONTENDERS.items()}
        write_document(json.loads(json.dumps(result)), titles, options.document)


def _line(row: Row) -> str:
    """Return a row as a line of text."""
    start = f"{row.workload:10}{row.contender:24}"
    if row.absent:
        return f"{start}{row.absent[:200]}"
    assert row.cpu is not None
    assert row.wall is not None
    assert row.spread is not None
    sent = "" if row.nbytes is None else f"{row.collectives:5}{row.nbytes / 2**20:9.2f} MiB"
    peak = f"{(row.peak or 0) / 2**20:9.1f} MiB"
    return (
        f"{start}{row.cpu * 1e3:9.2f} ms cpu ±{row.spread:5.1%}{row.wall * 1e3:9.2f} ms{sent}{peak}"
    )


if __name__ == "__main__":
    sys.exit(main())
