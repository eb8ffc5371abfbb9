"""`autoparallel compare`: two plans side by side, a plan and Megatron's, and what if."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoparallel.commands.asked_plan import (
    STAGES,
    add_request,
    asked_for,
    model_again,
    model_of,
    plan_options,
    planned,
    read_plan,
)
from autoparallel.commands.bundled_models import BUNDLED
from autoparallel.commands.command import Command, progress
from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.support.written_files import check_folder

if TYPE_CHECKING:
    from autoparallel.commands.model_names import NamedModel
    from autoparallel.plan import Plan
    from autoparallel.questions.differences import Comparison

__all__ = ["COMPARE"]

# What may be varied, and how its values are read.
_VARIED = ("world_size", "nodes", "batch", "sequence", "layers", "memory_limit", "hardware", "mesh",
           "microbatches", "schedule", "stages_per_rank")  # fmt: skip
_LINKS = ("network", "links")
_NUMBERS = (
    "world_size", "nodes", "batch", "sequence", "layers", "microbatches", "stages_per_rank",
)  # fmt: skip


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    action = parser.add_argument(
        "first", help="a plan's file, or a model to be planned as the options say"
    )
    vars(action)["completer"] = lambda **_: list(BUNDLED)
    parser.add_argument("second", nargs="?", help="another plan's file")
    parser.add_argument(
        "--with",
        dest="other",
        choices=("megatron",),
        help="compare with the published partition of Megatron-LM, on the last axis of the mesh",
    )
    parser.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="plan anew with other values of one option, as world-size=8,16,32 or "
        "memory-limit=40GiB,60GiB, or network=0.5 (links between nodes that much faster; links= "
        "for those inside of a node); with several values a table of them is printed; may be given "
        "again for a change of several options at once",
    )
    add_request(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as .svg or .png")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _run(options: argparse.Namespace) -> int:
    """Print the comparison that is asked for."""
    if sum((options.second is not None, options.other is not None, bool(options.what_if))) != 1:
        raise PlanError(
            "what is it to be compared with?",
            fix="give a second plan, --with megatron, or --what-if world-size=8,16",
        )
    if options.plot is not None:
        if options.plot.suffix not in (".svg", ".png"):
            raise PlanError(f"{options.plot} is no picture", fix="end in .svg or .png")
        check_folder(options.plot)
    if options.what_if:
        return _what_if(options)
    if options.other == "megatron":
        plans = _with_megatron(options)
        names = ("planned", "Megatron's")
    else:
        plans = (read_plan(options.first), read_plan(options.second))
        names = (Path(options.first).stem, Path(options.second).stem)
        names = names if names[0] != names[1] else (options.first, options.second)
    from autoparallel.questions.differences import compare

    both = compare(*plans, names)
    if options.plot is not None:
        from autoparallel.view.plots import plot_steps

        plot_steps(plans, names, options.plot)
        progress(f"written to {options.plot}")
    print(json.dumps(_rows(both), indent=1) if options.json else both)
    return 0


def _first(options: argparse.Namespace) -> tuple[NamedModel, argparse.Namespace]:
    """Return the model that is compared, and the options to plan it by.

    A plan's file says which model, mesh and hardware; options that are given count more.
    """
    if not Path(options.first).is_file():
        options.model = options.first
        return model_of(options), options
    plan = read_plan(options.first)
    request = dict(plan.request)
    for name in ("model", *_NUMBERS, "dtype"):
        if getattr(options, name, None) is None and name in request:
            text = request[name]
            setattr(options, name, int(text) if name in _NUMBERS else text)
    if options.world_size is None and options.nodes is None and options.mesh is None:
        options.mesh = ",".join(f"{name}={size}" for name, size in plan.whole_mesh.axes)
    given = plan.options
    options.microbatches = options.microbatches or given.microbatches
    options.schedule = options.schedule or given.schedule
    options.stages_per_rank = options.stages_per_rank or given.stages_per_rank
    options.hardware = given.hardware if options.hardware == "auto" else options.hardware
    options.optimizer = options.optimizer or given.optimizer
    if options.memory_limit is None and given.memory_limit is not None:
        options.memory_limit = str(given.memory_limit)
    if not options.constraint and options.layout is None:
        options.constraint = list(given.constraints)
    if options.data_parallel is None:
        options.data_parallel = given.data_parallel
    options.sequence_parallel = options.sequence_parallel and given.sequence_parallel
    return model_again(plan), options


def _with_megatron(options: argparse.Namespace) -> tuple[Plan, Plan]:
    """Return the plan of a model, and the published partition of it as a plan."""
    # By a person's table, which the planner itself never reads.
    from autoparallel.questions.differences import require_comparable
    from megatron_rules.recipe import recipe

    named, options = _first(options)
    plan = planned(options, named)
    require_comparable(plan)
    progress(f"following Megatron-LM's partition on {plan.mesh}")
    # Both are free to do the same but for where parameters lie.
    asked = plan_options(options, named)
    asked = {name: value for name, value in asked.items() if name not in STAGES}
    asked |= {"data_parallel": plan.options.data_parallel, "recompute": plan.options.recompute}
    published = recipe(
        named.model,
        mesh=plan.mesh,
        example_inputs=named.inputs,
        product_weight=None if plan.memory_limit is not None else plan.product_weight,
        **asked,
    )
    return plan, asked_for(published, options)


def _what_if(options: argparse.Namespace) -> int:
    """Print what other values of options would change."""
    axis, variants = _variants(options.what_if)
    named, options = _first(options)
    base = planned(options, named)
    plans: list[Plan | None] = []
    for changes in variants:
        told = ", ".join(f"{name} {value}" for name, value in changes.items())
        progress(f"what if {told}?")
        changed = argparse.Namespace(**vars(options))
        for name, value in changes.items():
            _change(changed, name, value)
        again = any(name in ("batch", "sequence", "layers") for name in changes)
        try:
            plans.append(planned(changed, model_of(changed) if again else named))
        except AutoParallelError as error:
            progress(f"no plan: {error}")
            plans.append(None)
    labels = [", ".join(map(str, changes.values())) for changes in variants]
    if options.plot is not None:
        from autoparallel.view.plots import plot_variants

        plot_variants(base, plans, labels, axis, options.plot)
        progress(f"written to {options.plot}")
    if options.json:
        from autoparallel.commands.plan_command import summary

        rows = [
            {"what_if": changes, "plan": None if plan is None else summary(plan)}
            for changes, plan in zip(variants, plans, strict=True)
        ]
        print(json.dumps({"base": summary(base), "variants": rows}, indent=1))
    elif len(plans) == 1 and plans[0] is not None:
        from autoparallel.questions.differences import compare

        print(compare(base, plans[0], ("as it is", labels[0])))
    else:
        print("\n".join(_table(axis, base, zip(labels, plans, strict=True))))
    return 0 if any(plan is not None for plan in plans) else 1


def _variants(texts: list[str]) -> tuple[str, list[dict[str, str]]]:
    """Return what is varied, in words, and the changes of each variant.

    Raises PlanError for a text that names no option, and for several that have several values.
    """
    fixed: dict[str, str] = {}
    varied: tuple[str, list[str]] | None = None
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        name = "hardware" if name == "cluster" else name
        # The commas of a mesh are its own: other meshes are told apart by semicolons.
        several = [v.strip() for v in values.split(";" if name == "mesh" else ",") if v.strip()]
        if name not in (*_VARIED, *_LINKS) or not several:
            raise PlanError(
                f"--what-if {text!r} changes nothing that is known",
                fix=f"give NAME=VALUE with one of {', '.join((*_VARIED, *_LINKS))}",
            )
        wrong = [value for value in several if not value.isdecimal() or not int(value)]
        if name in _NUMBERS and wrong:
            raise PlanError(f"{name}={wrong[0]} is no positive whole number", fix=f"{name}=8")
        if len(several) == 1:
            fixed[name] = several[0]
        elif varied is not None:
            raise PlanError(f"both {varied[0]} and {name} have several values", fix="vary one")
        else:
            varied = (name, several)
    if varied is None:
        return " and ".join(fixed), [fixed]
    name, several = varied
    return name, [{name: value, **fixed} for value in several]


def _change(options: argparse.Namespace, name: str, value: str) -> None:
    """Set an option to another value."""
    if name in _LINKS:
        options.hardware = _other_links(options.hardware, name, value)
        return
    setattr(options, name, int(value) if name in _NUMBERS else value)
    # The number of ranks is said in one way only.
    if name in ("world_size", "nodes", "mesh"):
        for other in {"world_size", "nodes", "mesh"} - {name}:
            setattr(options, other, None)


def _other_links(hardware: str, name: str, value: str) -> str:
    """Return the path of a file with hardware whose links are that much faster.

    name: "network" for the links between nodes, "links" for those inside of a node.
    """
    import tempfile
    from dataclasses import replace

    from autoparallel.cost.hardware import find_hardware, write_hardware

    try:
        factor = float(value)
    except ValueError:
        factor = 0.0
    if not 0 < factor < math.inf:
        raise PlanError(f"{name}={value}", fix=f"give a positive factor: {name}=0.5 for half")
    known = find_hardware(hardware)
    link = known.network if name == "network" else known.inside
    regimes = tuple(
        replace(regime, bytes_per_second=regime.bytes_per_second * factor)
        for regime in link.regimes
    )
    scaled = replace(link, regimes=regimes)
    told = f"{known.name}, {name} x{factor:g}"
    if name == "network":
        other = replace(known, name=told, network=scaled)
    else:
        other = replace(known, name=told, inside=scaled)
    path = Path(tempfile.mkdtemp()) / "hardware.json"
    write_hardware(other, path)
    return str(path)


def _table(axis: str, base: Plan, rows: Iterable[tuple[str, Plan | None]]) -> list[str]:
    """Return the lines of a table of variants."""
    from autoparallel.support.units import bytes_text, seconds_text

    cells = [(axis, "mesh", "step", "tokens a second", "memory", "split")]
    for label, plan in (("as it is", base), *rows):
        if plan is None:
            cells.append((label, "no plan", "", "", "", ""))
            continue
        step, rate = _step(plan)
        cells.append(
            (
                label,
                ", ".join(f"{name}={size}" for name, size in plan.whole_mesh.axes),
                seconds_text(step),
                f"{rate:,.0f}" if rate else "not told",
                bytes_text(sum(nbytes for _, nbytes in plan.memory)),
                f"{plan.split_flops:.0%}",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _step(plan: Plan) -> tuple[float, float]:
    """Return the seconds of a step, and its tokens per second."""
    from autoparallel.analysis.timeline import timeline

    if plan.breaks:
        return plan.step, 0.0
    step = timeline(plan)
    return step.seconds, step.tokens_per_second


def _rows(both: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON can hold it."""
    from autoparallel.commands.plan_command import summary

    return {
        both.names[0]: summary(both.first),
        both.names[1]: summary(both.second),
        "differences": [
            {
                "kind": row.kind,
                "name": row.name,
                "module": row.where,
                "line": row.line,
                both.names[0]: row.first,
                both.names[1]: row.second,
                "seconds": row.seconds,
            }
            for row in both.differences
        ],
    }


COMPARE = Command(
    "compare",
    "put two plans side by side, a plan and Megatron's, or a plan and what if",
    (
        "autoparallel compare gpt2-xl --with megatron --world-size 8 --hardware dgx-a100",
        "autoparallel compare plan.json other.json",
        "autoparallel compare plan.json --what-if world-size=8,16,32 --plot scaling.svg",
    ),
    _add_arguments,
    _run,
)
