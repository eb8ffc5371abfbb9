"""The command line: results go to stdout, progress to stderr.

Torch is imported inside of the command that needs it, so that --help is quick.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoparallel.support.installation import installation_rows
from autoparallel.train.command import add_train
from autoparallel.train.trained_commands import add_trained_commands

if TYPE_CHECKING:
    from autoparallel.cost.fit import Fit

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status: 0, 1 where the doctor has found something, or 2
    for arguments that are wrong.

    arguments: those of the command line, without the program's name; by default sys.argv's. Raises
    SystemExit, as argparse does, for --help and for a command that there is not.

    >>> main(["calibrate", "--output", "machine.txt"])
    2
    """
    parser = argparse.ArgumentParser(
        prog="autoparallel", description="Splits any PyTorch model over devices by itself."
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_calibrate(commands)
    _add_doctor(commands)
    add_train(commands)
    add_trained_commands(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `doctor`."""
    about = "say what is installed, and whose package each of the project's names is"
    parser = commands.add_parser("doctor", help=about, description=about[0].upper() + about[1:])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    """Print what is installed; return 1 where something is not as it should be."""
    rows = installation_rows()
    if options.json:
        print(json.dumps([{"what": what, "text": text, "good": good} for what, text, good in rows]))
    else:
        for what, text, good in rows:
            print(f"{'  ' if good else '! '}{what:16} {text}")
    return 0 if all(good for _, _, good in rows) else 1


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `calibrate`, with its options."""
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
    """Measure this machine, write the file, and print what was measured, on rank 0 alone.

    Return 2 for an output file that cannot be written, which is said before anything is measured.
    """
    if options.output.suffix != ".json":
        print("error: --output must end in .json, by which files are told", file=sys.stderr)
        return 2
    if not options.output.absolute().parent.is_dir():
        print(f"error: there is no folder {options.output.absolute().parent}", file=sys.stderr)
        return 2
    # After the arguments have been looked at: what is wrong with them is told without torch.
    import torch

    from autoparallel.cost.calibrate import Effort, calibrate, started
    from autoparallel.cost.hardware import write_hardware

    cuda = torch.cuda.is_available()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with started() as rank:
        fit = calibrate(
            Effort.quick(cuda) if options.quick else Effort.full(cuda),
            name=options.name,
            clock=clock,
            say=lambda text: print(f"measuring {text}", file=sys.stderr) if rank == 0 else None,
        )
        if rank == 0:
            write_hardware(fit.hardware, options.output)
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
