"""`autoparallel show`: all that a plan says, as a report, and as files to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from autoparallel.commands.asked_plan import model_again, read_plan
from autoparallel.commands.command import Command, progress
from autoparallel.commands.plan_files import SHOWN, check_outputs, write_plan

__all__ = ["SHOW"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `show`."""
    parser.add_argument("plan", type=Path, help="a file that `autoparallel plan -o` has written")
    parser.add_argument("--json", action="store_true", help="print the plan itself, as JSON")
    parser.add_argument("--formulas", action="store_true", help="also communication, computation "
                        "and memory in closed form")  # fmt: skip
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        default=[],
        help=f"in place of the report, write {SHOWN}; may be given again",
    )


def _run(options: argparse.Namespace) -> int:
    """Print the report, or write the files that are asked for."""
    check_outputs(options.output)
    plan = read_plan(options.plan)
    # Reports are printed from the plan alone; pictures, steps and formulas need its graph.
    if options.formulas or any(path.suffix != ".txt" for path in options.output):
        from autoparallel.api import traced_plan

        named = model_again(plan)
        plan = traced_plan(named.model, plan, example_inputs=named.inputs)
    for path in options.output:
        write_plan(plan, path)
        progress(f"written to {path}")
    if options.json:
        print(plan.to_json(), end="")
    elif not options.output:
        from autoparallel.view.report import print_plan

        print_plan(plan)
    if options.formulas:
        from autoparallel.analysis.closed_forms import closed_forms
        from autoparallel.view.closed_forms_text import forms_text

        print(forms_text(closed_forms(plan), plan))
    return 0


SHOW = Command(
    "show",
    "print all that a plan says, or write it as pictures",
    ("autoparallel show plan.json", "autoparallel show plan.json -o plan.html -o step.trace.json"),
    _add_arguments,
    _run,
)
