"""Writes a plan as one HTML file: graph, threads, timeline and memory, to look into offline."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from os import PathLike
from string import Template

from autoparallel.plan import Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.support.units import seconds_text
from autoparallel.support.written_files import write_file
from autoparallel.view.html.page_data import page_data

__all__ = ["page_text", "write_html"]

NO_EXPLANATIONS: Mapping[str, Sequence[str]] = {}


def write_html(
    plan: Plan,
    path: str | PathLike[str],
    *,
    explanations: Mapping[str, Sequence[str]] = NO_EXPLANATIONS,
    alternatives: bool = True,
) -> None:
    """Write the plan as one self-contained HTML file, the same for the same plan.

    The page shows the graph by modules, each op with its shapes, placements, cost and source line
    and what the alternatives to its split would cost, each collective with its reason, the model's
    threads, the predicted step as a timeline, and the memory. It opens offline in any browser of
    the last years, and asks for nothing from anywhere.

    plan: one that was read from a text is shown without shapes, threads, alternatives and the table
    of memory, which need the graph. explanations: more sentences about ops, by their names.
    alternatives: whether to tell what each op could have done instead, for which the plan's costs
    are counted once more.

        >>> import autoparallel, pathlib, tempfile, torch
        >>> plan = autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "plan.html")
        >>> write_html(plan, path)
        >>> path.read_text()[:15]
        '<!doctype html>'

    Raises AutoParallelError where no such file can be written.
    """
    require_kind(plan, Plan, MAKE_ONE)
    write_file(path, page_text(plan, explanations, alternatives).encode())


def page_text(
    plan: Plan,
    explanations: Mapping[str, Sequence[str]] = NO_EXPLANATIONS,
    alternatives: bool = True,
) -> str:
    """Return the page that `write_html` writes.

    Example: `page_text(plan)`
    """
    data = page_data(plan, explanations, alternatives)
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    # Without the time in the header, which would make each file another one.
    packed = gzip.compress(text.encode(), compresslevel=9, mtime=0)
    ranks = f"{plan.world_size} rank{'s' if plan.world_size != 1 else ''}"
    heading = f"{escape(plan.model)} on {escape(str(plan.mesh))}"
    return Template(_asset("page.html")).substitute(
        title=f"{heading}: plan",
        heading=heading,
        about=escape(f"{ranks}, {seconds_text(plan.step)} a step on {plan.hardware}"),
        style=_asset("page.css"),
        script=_asset("page.js"),
        data=base64.b64encode(packed).decode(),
        licences=escape(_asset("LICENCES.txt")),
    )


def _asset(name: str) -> str:
    """Return the text of a file that lies beside this one."""
    return files("autoparallel.view.html").joinpath(name).read_text(encoding="utf-8")
