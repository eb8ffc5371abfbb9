"""`autoparallel doctor`: what is installed, what this machine can do, and what is in the way."""

from __future__ import annotations

import argparse
import json

from autoparallel.commands.command import Command
from autoparallel.support.installation import device_rows, installation_rows

__all__ = ["DOCTOR"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def _run(options: argparse.Namespace) -> int:
    """Print what is installed; return 1 where something is not as it should be."""
    rows = [*installation_rows(), *device_rows()]
    if options.json:
        print(json.dumps([{"what": what, "text": text, "good": good} for what, text, good in rows]))
    else:
        for what, text, good in rows:
            print(f"{'  ' if good else '! '}{what:16} {text}")
    return 0 if all(good for _, _, good in rows) else 1


DOCTOR = Command(
    "doctor",
    "say what is installed, what this machine can do, and whose package each of the project's "
    "names is",
    ("autoparallel doctor",),
    _add_arguments,
    _run,
)
