"""`autoparallel show`: all that a plan says, as a report, and as files to look at."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from autoparallel.commands.asked_plan import model_again, read_plan
from autoparallel.commands.command import Command, progress
from autoparallel.errors import PlanError
from autoparallel.support.written_files import check_folder, write_file

__all__ = ["SHOW"]

_PAGES = "autoparallel.view.html"  # the package that writes pages, where there is one


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
        help="in place of the report, write a page to look into (.html), a picture (.svg, .png, "
        ".dot; .stages.svg of stages side by side), the report (.txt), or the step for "
        "ui.perfetto.dev (.trace.json); may be given again",
    )


def _run(options: argparse.Namespace) -> int:
    """Print the report, or write the files that are asked for."""
    endings = [".svg", ".png", ".dot", ".txt", ".trace.json"]
    if importlib.util.find_spec(_PAGES) is not None:
        endings.append(".html")
    for path in options.output:
        if not path.name.endswith(tuple(endings)):
            raise PlanError(
                f"{path} has no ending that is known", fix=f"end in one of {', '.join(endings)}"
            )
        check_folder(path)
    plan = read_plan(options.plan)
    # Reports are printed from the plan alone; pictures, steps and formulas need its graph.
    if options.formulas or any(path.suffix != ".txt" for path in options.output):
        from autoparallel.api import traced_plan

        named = model_again(plan)
        plan = traced_plan(named.model, plan, example_inputs=named.inputs)
    for path in options.output:
        _write(plan, path)
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


def _write(plan: object, path: Path) -> None:
    """Write a file of the kind that its name says."""
    from autoparallel.analysis.timeline import timeline
    from autoparallel.plan import Plan
    from autoparallel.view.dot import write_svg
    from autoparallel.view.report import plan_text
    from autoparallel.view.trace import write_trace

    assert isinstance(plan, Plan)
    if path.name.endswith(".trace.json"):
        write_trace(timeline(plan), path)
    elif path.name.endswith(".stages.svg"):
        importlib.import_module("autoparallel.view.stages_svg").write_stages(plan, path)
    elif path.suffix == ".html":
        importlib.import_module("autoparallel.view.html.page").write_html(plan, path)
    elif path.suffix == ".txt":
        write_file(path, plan_text(plan).encode())
    else:
        write_svg(plan, path)


SHOW = Command(
    "show",
    "print all that a plan says, or write it as pictures",
    ("autoparallel show plan.json", "autoparallel show plan.json -o plan.html -o step.trace.json"),
    _add_arguments,
    _run,
)
