"""Measures how long the stages of a pipeline wait, with every schedule, against the closed forms.

    python benchmarks/pipelines.py [--seconds 0.03] [--json out.json] [--plot docs/pipelines.svg]

A stack of equal layers is trained by four gloo processes, one stage each. A stage sleeps for the
seconds that its passes are said to take, F forward, B for the gradients of what came in, and W for
those of its weights, so that processes that share a core wait for each other and for nothing else:
the schedule, the sends and the receives are the real ones. With M micro-batches and S stages a step
takes (M + S - 1) (F + B + W) in GPipe's order and in that of 1F1B (arXiv:2104.04473), and
M (F + B + W) + (S - 1) (F + B - W) where gradients of weights fill the bubble (arXiv:2401.10241,
table 1, ZB-H1). Beside it stand the bytes that each stage has saved for its backward passes at the
worst moment.
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

STAGES, STEPS, WIDTH, ROWS = 4, 6, 64, 64
COUNTS = (1, 2, 4, 8, 16)
SCHEDULES = ("gpipe", "1f1b", "zero_bubble")


def predicted(schedule: str, count: int, seconds: float) -> float:
    """Return the seconds of a step by the closed form, for F = B = W = `seconds`."""
    if schedule == "zero_bubble":
        # Of few micro-batches, the last one's way forth and back is longer, and its weights' pass.
        return max(3 * count + STAGES - 1, 2 * (count + STAGES - 1) + 1) * seconds
    return 3 * (count + STAGES - 1) * seconds


class Saved:
    """The bytes that autograd has saved, of each memory once, and the most that they ever were."""

    def __init__(self, kept: set[int]) -> None:
        self.kept, self.now, self.most = kept, 0, 0
        self.holders: dict[int, int] = {}

    def pack(self, tensor: Any) -> Any:
        """Note a tensor that is saved, unless it is a weight."""
        memory = tensor.untyped_storage()
        place = memory.data_ptr()
        if place in self.kept:
            return tensor
        self.holders[place] = self.holders.get(place, 0) + 1
        if self.holders[place] == 1:
            self.now += memory.nbytes()
            self.most = max(self.most, self.now)
        # A result that its own op has saved would keep the op that keeps it.
        return _Holder(self, tensor.detach())

    def unpack(self, held: Any) -> Any:
        """Return the tensor."""
        return held.tensor if isinstance(held, _Holder) else held


class _Holder:
    """A tensor that is saved, until nobody has this."""

    def __init__(self, saved: Saved, tensor: Any) -> None:
        self.saved, self.tensor = saved, tensor

    def __del__(self) -> None:
        memory = self.tensor.untyped_storage()
        self.saved.holders[memory.data_ptr()] -= 1
        if not self.saved.holders[memory.data_ptr()]:
            self.saved.now -= memory.nbytes()


def sleeping(seconds: float, saved: Saved | None) -> None:
    """Have this process's stages sleep in each pass; saved: notes what they save."""
    import torch

    from autoparallel.parallel.pipeline_stage import Stage

    forward, backward = Stage.forward_one_chunk, Stage.backward_one_chunk
    weight = Stage.backward_weight_one_chunk

    def slow_forward(stage: Any, *args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        if saved is None:
            return forward(stage, *args, **options)
        saved.kept = {w.untyped_storage().data_ptr() for w in stage.module.weights}
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            return forward(stage, *args, **options)

    def slow_backward(
        stage: Any, number: int, loss: Any = None, full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:  # fmt: skip
        time.sleep(seconds * (2 if full_backward else 1))
        backward(stage, number, loss, full_backward, last_backward)

    def slow_weight(stage: Any, number: int, last_backward: bool = False) -> None:
        time.sleep(seconds)
        # A stage that puts all of its backward pass off must not sleep for it twice.
        Stage.backward_one_chunk = backward
        try:
            weight(stage, number, last_backward)
        finally:
            Stage.backward_one_chunk = slow_backward

    Stage.forward_one_chunk = slow_forward
    Stage.backward_one_chunk = slow_backward
    Stage.backward_weight_one_chunk = slow_weight


def measure(seconds: float) -> list[dict[str, Any]]:
    """Return a row for each schedule and number of micro-batches: seconds of a step, the quickest
    of several, and the saved bytes of this rank's stage, without the sleeps.
    """
    import torch
    import torch.distributed as dist

    import autoparallel

    class Stack(torch.nn.Module):
        """Equal layers, and a loss."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(2 * STAGES)]
            self.layers = torch.nn.Sequential(
                *(each for one in layers for each in (one, torch.nn.Tanh()))
            )

        def forward(self, rows: Any) -> Any:
            return self.layers(rows).square().mean()

    saved = Saved(set())
    sleeping(seconds, saved)
    batch = torch.randn(ROWS, WIDTH)
    cases = [(schedule, count) for schedule in SCHEDULES for count in COUNTS]
    models = {
        (schedule, count): autoparallel.autoparallelize(
            Stack(), mesh=autoparallel.Mesh(pp=STAGES), example_inputs=batch,
            microbatches=count, schedule=schedule, check_inputs=False,
        )
        for schedule, count in cases
    }  # fmt: skip
    times: dict[Any, list[float]] = {case: [] for case in cases}
    most = {}
    # Round by round, as what a machine does besides comes and goes.
    for _ in range(STEPS):
        for case in cases:
            saved.now = saved.most = 0
            dist.barrier()
            start = time.perf_counter()
            models[case](batch).backward()
            dist.barrier()
            times[case].append(time.perf_counter() - start)
            most[case] = saved.most
    return [
        {
            "schedule": schedule, "microbatches": count,
            "seconds": min(times[schedule, count][1:]),
            "predicted": predicted(schedule, count, seconds), "saved": most[schedule, count],
        }
        for schedule, count in cases
    ]  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw measured steps as points over the closed forms, in seconds for each micro-batch."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Letters as such: half the file, and found by a search.
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "pipelines"
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in SCHEDULES:
        own = [row for row in rows if row["schedule"] == name]
        counts = [row["microbatches"] for row in own]
        line = axes.plot(
            counts, [row["predicted"] / row["microbatches"] for row in own], label=f"{name}, model"
        )[0]
        axes.plot(
            counts, [row["seconds"] / row["microbatches"] for row in own], "o",
            color=line.get_color(), label=f"{name}, measured",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.set_xlabel(f"micro-batches, {STAGES} stages")
    axes.set_ylabel("seconds of a step for each of them")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.03, help="of each of F, B and W")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        import torch.distributed as dist

        rank, folder = int(given.rank[0]), Path(given.rank[1])
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=STAGES
        )
        figures = measure(given.seconds)
        (folder / str(rank)).write_text(json.dumps(figures))
        dist.barrier()
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--seconds", str(given.seconds), "--rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*command, str(rank), folder], env=environment)
            for rank in range(STAGES)
        ]
        if any(process.wait() for process in processes):
            raise SystemExit("a rank has failed")
        ranks = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(STAGES)]
    rows = []
    print("schedule      M   step s  model s  ratio  KiB saved on each stage")
    for each in zip(*ranks, strict=True):
        row = {**each[0], "seconds": statistics.median(one["seconds"] for one in each)}
        row["saved"] = [one["saved"] for one in each]
        rows.append(row)
        kibs = " ".join(f"{nbytes / 1024:6.1f}" for nbytes in row["saved"])
        print(
            f"{row['schedule']:12}{row['microbatches']:3}{row['seconds']:9.3f}"
            f"{row['predicted']:9.3f}{row['seconds'] / row['predicted']:7.2f}  {kibs}"
        )
    if given.json:
        given.json.write_text(json.dumps({"seconds": given.seconds, "rows": rows}, indent=1) + "\n")
    if given.plot:
        draw(rows, given.plot)


if __name__ == "__main__":
    main()
