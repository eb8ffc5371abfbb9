"""Measures how much communication a step of training waits for, on links as slow as you like.

    python benchmarks/overlap.py [--bandwidth 125e6] [--against folder] [--json out.json]

A GPT is trained by two gloo processes, split by tensor parallelism, with and without sequence
parallelism, by data parallelism, and by ZeRO-3: with parameters that stay gathered to the end of
the step, and with copies that are dropped and gathered again. The link is a model: each collective
takes the latency and its bytes at the bandwidth, one after the other, from the moment when it is
started. The clock is the processor's time of the rank's main thread, plus what it had to wait for
the link so far. So the figures do not depend on what else the machine does, and nobody sleeps. A
rank is *exposed* to the link for the seconds that its clock jumps when it waits for a result.

Each way is measured waiting (overlap=False), overlapping, and, with --against, in another checkout
of this project, whose module is run as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("tp", "sp", "dp", "zero3", "dropped")
SIZES = {"layers": 4, "hidden": 256, "heads": 8, "vocabulary": 2048, "positions": 256}
BATCH, SEQUENCE, STEPS = 8, 256, 5


class SlowOps:
    """The functional collectives, on a link with a clock of its own.

    exposed, busy: the seconds that the rank has waited for the link, and that the link has worked.
    calls: the number of collectives.
    """

    def __init__(self, ops: Any, latency: float, bandwidth: float) -> None:
        self.ops, self.latency, self.bandwidth = ops, latency, bandwidth
        self.free = self.exposed = self.busy = 0.0
        self.calls = 0
        self.ends: dict[int, float] = {}

    def now(self) -> float:
        """Return the rank's time."""
        return time.thread_time() + self.exposed

    def __getattr__(self, name: str) -> Any:
        """Return a collective that is noted when it is started."""
        collective = getattr(self.ops, name)

        def started(tensor: Any, *arguments: Any) -> Any:
            result = collective(tensor, *arguments)
            # On two ranks each sends the half of a sum twice, or its own part once.
            whole = max(tensor.nbytes, result.nbytes)
            times = 1.0 if name.startswith("all_reduce") else 0.5
            seconds = self.latency + times * whole / self.bandwidth
            self.free = max(self.free, self.now()) + seconds
            self.busy += seconds
            self.calls += 1
            self.ends[result.data_ptr()] = self.free
            return result

        return started

    def wait_tensor(self, tensor: Any) -> Any:
        """Wait for a result, and note how long the link would have let the rank wait."""
        end = self.ends.pop(tensor.data_ptr(), 0.0)
        result = self.ops.wait_tensor(tensor)
        self.exposed += max(end - self.now(), 0.0)
        return result


def measure(
    folder: str, way: str, options: dict[str, Any], link: tuple[float, float]
) -> list[float]:
    """Return a rank's seconds of a step: exposed, of the link, and of all; and its collectives.

    folder: for files that both ranks read.
    """
    import torch

    import autoparallel
    from autoparallel.runtime import groups
    from autoparallel.train.models import GPT, GPTConfig

    slow = SlowOps(groups.functional_collectives(), *link)
    groups.functional_collectives = lambda: slow  # type: ignore[assignment]
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, dropout=0.0))
    ids = torch.randint(0, SIZES["vocabulary"], (BATCH, SEQUENCE))
    how: dict[str, Any] = {"world_size": 2, "sequence_parallel": way == "sp"}
    if way not in ("tp", "sp"):
        hardware = on_link(link, Path(folder) / "link.json")
        how = {"mesh": autoparallel.Mesh(dp=2), "hardware": hardware}
    if way == "dp":
        # What is measured is another order, and not another plan.
        how["constraints"] = ["ddp on dp"]
    if way in ("zero3", "dropped"):
        how |= zero_3(model, ids, way == "dropped", hardware)
    split = autoparallel.autoparallelize(
        model, example_inputs=(ids, ids), check_inputs=False, **how, **options
    )
    rows = []
    for _ in range(STEPS + 1):
        before = (slow.exposed, slow.busy, slow.now(), slow.calls)
        split(ids, ids).loss.backward()
        split.zero_grad()
        after = (slow.exposed, slow.busy, slow.now(), slow.calls)
        rows.append([b - a for a, b in zip(before, after, strict=True)])
    return [statistics.median(column) for column in zip(*rows[1:], strict=True)]


def on_link(link: tuple[float, float], file: Path) -> str:
    """Return the name of a file with this processor on such a link, which is written, alike by both
    ranks.
    """
    from dataclasses import replace

    from autoparallel.cost.hardware import find_hardware, write_hardware

    latency, bandwidth = link
    hardware = find_hardware("cpu")
    regimes = tuple(
        replace(each, bytes_per_second=bandwidth, hop_seconds=0.0, floor_seconds=latency)
        for each in hardware.inside.regimes
    )
    write_hardware(replace(hardware, inside=type(hardware.inside)(regimes)), file)
    return str(file)


def zero_3(model: Any, ids: Any, dropped: bool, hardware: str) -> dict[str, Any]:
    """Return the options of ZeRO-3 on two ranks.

    dropped: gathered copies are dropped after the forward pass, all but a few: as a memory limit
    has it. hardware: that is planned for.
    """
    import autoparallel
    from autoparallel.analysis.memory import memory_of

    how: dict[str, Any] = {"constraints": ["fsdp on dp"], "recompute": "none"}
    if dropped:
        mesh = autoparallel.Mesh(dp=2)
        plan = autoparallel.make_plan(
            model, mesh=mesh, hardware=hardware, example_inputs=(ids, ids), **how
        )
        gathered = sum(row.nbytes for row in plan.parameters)
        how["memory_limit"] = memory_of(plan).total - gathered // 3
    return how


def ran(folder: str, way: str, options: dict[str, Any], link: tuple[float, float]) -> list[float]:
    """Return `measure` of two processes that run the project in a folder: the slower rank's."""
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--rank"]
        what = json.dumps([name, way, options, link])
        processes = [
            subprocess.Popen([*command, str(rank), what], env=environment) for rank in range(2)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"{way} {options} failed in {folder}")
        rows = [json.loads((Path(name) / str(rank)).read_text()) for rank in range(2)]
    return [max(pair) for pair in zip(*rows, strict=True)]


def work(rank: int, folder: str, way: str, options: dict[str, Any], link: Any) -> None:
    """Be one rank, and write down what it measures."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    figures = measure(folder, way, options, link)
    dist.barrier()
    (Path(folder) / str(rank)).write_text(json.dumps(figures))
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=125e6, help="bytes per second")
    parser.add_argument("--latency", type=float, default=5e-5, help="seconds")
    parser.add_argument("--against", help="folder of another checkout")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        work(int(given.rank[0]), *json.loads(given.rank[1]))
        return
    here = str(Path(__file__).resolve().parent.parent)
    builds: list[tuple[str, str, dict[str, Any]]] = []
    if given.against:
        builds.append(("other build", given.against, {}))
    builds += [("waiting", here, {"overlap": False}), ("overlapping", here, {})]
    link = (given.latency, given.bandwidth)
    print(f"{'':4}{'':14}{'exposed':>9}{'link':>9}{'step':>9}  collectives, ms")
    table = []
    for way in given.ways.split(","):
        first = None
        for name, folder, options in builds:
            exposed, busy, step, calls = ran(folder, way, options, link)
            first = exposed if first is None else first
            print(
                f"{way:4}{name:14}{exposed * 1e3:9.1f}{busy * 1e3:9.1f}{step * 1e3:9.1f}"
                f"  {calls:.0f}   {exposed / first:.2f} of the first",
                flush=True,
            )
            table.append(
                {"way": way, "build": name, "exposed": exposed, "link": busy, "step": step}
            )
    if given.json:
        given.json.write_text(json.dumps({"link": link, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
