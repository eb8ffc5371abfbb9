"""`autoparallel calibrate`: measures this machine, and writes a file that hardware= takes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from autoparallel.commands.command import Command, progress
from autoparallel.support.written_files import check_folder

if TYPE_CHECKING:
    from autoparallel.cost.fit import Fit

__all__ = ["CALIBRATE"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `calibrate`."""
    parser.description = (
        f"{parser.description} Alone it measures one process; under torchrun also the links: gloo "
        "on CPUs, NCCL on GPUs."
    )
    parser.add_argument("--output", type=Path, required=True, help="the file, such as my.json")
    parser.add_argument(
        "--plot", type=Path, help="draw fitted against measured times, as .svg or .png"
    )
    parser.add_argument("--quick", action="store_true", help="seconds, and rougher figures")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    parser.add_argument("--name", default="", help="of the hardware; by default the device's")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="what CPUs are timed by; cpu, the process's own seconds, on a machine that others use "
        "too, with one thread per process; waiting for other ranks is then not counted",
    )


def _run(options: argparse.Namespace) -> int:
    """Measure this machine, write the file, and print what was measured, on rank 0 alone.

    Return 2 for a name of a file that says nothing of its kind, and raise PlanError for a file that
    cannot be written, both before anything is measured.
    """
    if options.output.suffix != ".json":
        print("error: --output must end in .json, by which files are told", file=sys.stderr)
        return 2
    check_folder(options.output)
    if options.plot is not None and options.plot.suffix not in (".svg", ".png"):
        print("error: --plot must end in .svg or .png", file=sys.stderr)
        return 2
    # After the arguments have been looked at: what is wrong with them is told without torch.
    import torch

    from autoparallel.cost.calibrate import calibrate, started
    from autoparallel.cost.hardware import write_hardware
    from autoparallel.cost.timed_runs import Effort

    cuda = torch.cuda.is_available()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with started() as rank:
        fit = calibrate(
            Effort.quick(cuda) if options.quick else Effort.full(cuda),
            name=options.name,
            clock=clock,
            say=lambda text: progress(f"measuring {text}") if rank == 0 else None,
        )
        if rank == 0:
            write_hardware(fit.hardware, options.output)
            if options.plot is not None:
                from autoparallel.view.plots import plot_measured

                rows = [(row.what, row.fitted, row.measured) for row in fit.rows]
                plot_measured(rows, options.plot)
            print(_as_json(fit) if options.json else _as_text(fit, options.output))
    return 0


def _as_json(fit: Fit) -> str:
    """Return the measurements, beside what the fitted figures predict, as JSON."""
    rows = [{"what": row.what, "measured": row.measured, "fitted": row.fitted} for row in fit.rows]
    return json.dumps({"hardware": fit.hardware.name, "rows": rows}, indent=1)


def _as_text(fit: Fit, output: Path) -> str:
    """Return the measurements as tables, and where the file is."""
    from autoparallel.view.calibration import calibration_text

    return calibration_text(fit.hardware, fit.rows) + f"written to {output}"


CALIBRATE = Command(
    "calibrate",
    "measure this machine, and write a file that hardware= takes",
    (
        "autoparallel calibrate --output my-machine.json",
        "torchrun --nproc-per-node 8 -m autoparallel calibrate --output my-machine.json",
    ),
    _add_arguments,
    _run,
)
