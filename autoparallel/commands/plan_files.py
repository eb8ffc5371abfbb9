"""The files that a plan is written to, each of the kind that its name ends in."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from autoparallel.errors import PlanError
from autoparallel.support.written_files import check_folder, write_file

if TYPE_CHECKING:
    from autoparallel.plan import Plan

__all__ = ["PLAN_ENDING", "SHOWN", "check_outputs", "write_plan"]

PLAN_ENDING = ".json"
# What --help says of the files in which a plan is shown.
SHOWN = (
    "a page to look into (.html), a picture (.svg, .png, .dot; .stages.svg of stages side by "
    "side), the report (.txt), or the step for ui.perfetto.dev (.trace.json)"
)
_PAGES = "autoparallel.view.html"  # the package that writes pages, where there is one


def check_outputs(paths: Iterable[Path], *others: str) -> None:
    """Raise an error unless each path has a known ending, and a folder that can be written to.

    others: endings besides those of what a plan is shown in.

    >>> check_outputs([Path("plan.doc")])
    Traceback (most recent call last):
        ...
    autoparallel.errors.PlanError: plan.doc has no ending that is known
      fix:   end in one of .svg, .png, .dot, .txt, .trace.json, .html
    """
    endings = [*others, ".svg", ".png", ".dot", ".txt", ".trace.json"]
    if importlib.util.find_spec(_PAGES) is not None:
        endings.append(".html")
    for path in paths:
        if not path.name.endswith(tuple(endings)):
            raise PlanError(
                f"{path} has no ending that is known", fix=f"end in one of {', '.join(endings)}"
            )
        check_folder(path)


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a file of the kind that its name says; it is one that `check_outputs` takes.

    Example: `write_plan(plan, Path("plan.html"))`
    """
    from autoparallel.analysis.timeline import timeline
    from autoparallel.view.dot import write_svg
    from autoparallel.view.report import plan_text
    from autoparallel.view.trace import write_trace

    if path.name.endswith(".trace.json"):
        write_trace(timeline(plan), path)
    elif path.name.endswith(".stages.svg"):
        importlib.import_module("autoparallel.view.stages_svg").write_stages(plan, path)
    elif path.suffix == PLAN_ENDING:
        write_file(path, plan.to_json().encode())
    elif path.suffix == ".html":
        importlib.import_module("autoparallel.view.html.page").write_html(plan, path)
    elif path.suffix == ".txt":
        write_file(path, plan_text(plan).encode())
    else:
        write_svg(plan, path)
