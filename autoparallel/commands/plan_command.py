"""`autoparallel plan`: plans a model for any devices, without any of them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoparallel.commands.asked_plan import add_model, add_request, planned
from autoparallel.commands.command import Command, progress
from autoparallel.commands.plan_files import PLAN_ENDING, SHOWN, check_outputs, write_plan

if TYPE_CHECKING:
    from autoparallel.plan import Plan

__all__ = ["PLAN", "in_short", "summary"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    add_model(parser)
    add_request(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        default=[],
        help=f"write the plan, which all other commands read (.json), {SHOWN}; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _run(options: argparse.Namespace) -> int:
    """Make the plan, write it where that is asked for, and print the answer in short."""
    check_outputs(options.output, PLAN_ENDING)
    plan = planned(options)
    for path in options.output:
        write_plan(plan, path)
        is_plan = path.suffix == PLAN_ENDING and not path.name.endswith(".trace.json")
        more = f"; autoparallel show {path} prints it all" if is_plan else ""
        if is_plan and len(options.output) == 1:
            more += f", and with -o {path.stem}.html makes a page of it"
        progress(f"written to {path}{more}")
    print(json.dumps(summary(plan), indent=1) if options.json else in_short(plan))
    return 0


def summary(plan: Plan) -> dict[str, Any]:
    """Return the answer to whether it fits and how fast it is, as JSON can hold it.

    Example: `summary(plan)["seconds"]`
    """
    from autoparallel.analysis.timeline import timeline

    answer: dict[str, Any] = {
        "model": plan.model,
        "request": dict(plan.request),
        "mesh": dict(plan.whole_mesh.axes),
        "world_size": plan.world_size,
        "hardware": plan.hardware,
        "seconds": plan.seconds,
        "step_seconds": plan.step,
        "cost": plan.cost,
        "lower_bound": plan.lower_bound,
        "method": plan.method,
        "split_flops": plan.split_flops,
        "split_parameter_bytes": plan.split_parameter_bytes,
        "memory": dict(plan.memory),
        "memory_nbytes": sum(nbytes for _, nbytes in plan.memory),
        "collectives": [list(row) for row in plan.collectives or ()],
        "recompute": dict(plan.recompute),
        "pipeline": None if plan.pipeline is None else asdict(plan.pipeline),
        "python": [str(stays) for stays in plan.breaks],
    }
    if plan.is_traced and not plan.breaks:
        step = timeline(plan)
        answer["step"] = {
            "seconds": step.seconds,
            "exposed_seconds": step.exposed_seconds,
            "tokens": step.tokens,
            "tokens_per_second": step.tokens_per_second,
            "mfu": step.mfu,
        }
    return answer


def in_short(plan: Plan) -> str:
    """Return the answer on one screen: the plan's own lines, and the step's.

    Example: `print(in_short(plan))`
    """
    from autoparallel.analysis.timeline import timeline

    text = str(plan)
    if plan.is_traced and not plan.breaks:
        lines = str(timeline(plan)).splitlines()
        text += "\n\n" + "\n".join(lines)
    return text


PLAN = Command(
    "plan",
    "find the cheapest way to split a model over devices",
    (
        "autoparallel plan gpt3-175b --cluster dgx-a100 --nodes 8 --memory-limit 76GiB",
        "autoparallel plan my_module:build --world-size 8 -o plan.json -o plan.html",
        "autoparallel plan hf:path/to/config.json --world-size 4 --hardware dgx-h100",
    ),
    _add_arguments,
    _run,
)
