"""The command line. Results go to stdout, progress to stderr; torch is imported when needed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoparallel.cost.fit import Fit

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="autoparallel", description="Splits any PyTorch model over devices by itself."
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_calibrate(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "measure this machine, and write a file that hardware= takes"
    parser = commands.add_parser(
        "calibrate",
        help=about,
        description=f"{about[0].upper()}{about[1:]}. Alone it measures one process; under "
        "torchrun (torchrun --nproc-per-node 8 -m autoparallel calibrate ...) also the links: "
        "gloo on CPUs, NCCL on GPUs.",
    )
    parser.add_argument("--output", type=Path, required=True, help="the file, such as my.json")
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
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    if options.output.suffix != ".json":
        print("error: --output must end in .json, by which files are told", file=sys.stderr)
        return 2
    if not options.output.absolute().parent.is_dir():
        print(f"error: there is no folder {options.output.absolute().parent}", file=sys.stderr)
        return 2
    import torch

    from autoparallel.cost.calibrate import Effort, calibrate, started
    from autoparallel.cost.hardware import write_hardware

    cuda = torch.cuda.is_available()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with started() as rank:
        found = calibrate(
            Effort.quick(cuda) if options.quick else Effort.full(cuda),
            name=options.name,
            clock=clock,
            say=lambda text: print(f"measuring {text}", file=sys.stderr) if rank == 0 else None,
        )
        if rank == 0:
            write_hardware(found.hardware, options.output)
            print(_as_json(found) if options.json else _as_text(found, options.output))
    return 0


def _as_json(found: Fit) -> str:
    rows = [
        {"what": row.what, "measured": row.measured, "fitted": row.fitted} for row in found.rows
    ]
    return json.dumps({"hardware": found.hardware.name, "rows": rows}, indent=1)


def _as_text(found: Fit, output: Path) -> str:
    from autoparallel.view.calibration import calibration_text

    return calibration_text(found.hardware, found.rows) + f"written to {output}"
