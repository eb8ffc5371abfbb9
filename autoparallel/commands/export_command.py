"""`autoparallel export` and `autoparallel emit`: a plan in the words of another program."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from autoparallel.commands.asked_plan import model_again, read_plan
from autoparallel.commands.command import Command, progress
from autoparallel.support.written_files import check_folder, write_file

if TYPE_CHECKING:
    from autoparallel.exports.export_text import Export

__all__ = ["EMIT", "EXPORT"]

# As in autoparallel/exports/targets.py, which imports torch; a test compares the two.
NAMES = (
    "parallelize_module", "transformers", "python", "jax", "mesh-tensorflow", "megatron",
    "torchtitan", "deepspeed",
)  # fmt: skip


def _add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument("plan", type=Path, help="a file that `autoparallel plan -o` has written")
    parser.add_argument("--to", required=True, choices=NAMES, help="the program that reads it")
    _add_output(parser)


def _add_emit(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `emit`."""
    parser.add_argument("plan", type=Path, help="a file that `autoparallel plan -o` has written")
    parser.set_defaults(to="python")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    """Add what both have in common."""
    parser.add_argument("-o", "--output", type=Path, help="write a file, in place of printing")
    parser.add_argument(
        "--json", action="store_true", help="print the text, and what it does not have, as JSON"
    )


def _run(options: argparse.Namespace) -> int:
    """Print the export or write it; what it does not have of the plan is told on stderr."""
    if options.output is not None:
        check_folder(options.output)
    plan = read_plan(options.plan)
    named = model_again(plan)
    progress("tracing it")
    from autoparallel.api import traced_plan
    from autoparallel.exports.emitted_script import emitted_script
    from autoparallel.exports.targets import export

    plan = traced_plan(named.model, plan, example_inputs=named.inputs)
    result: Export
    if options.to == "python":
        # Buffers that no checkpoint has are written into the file, and so need their values.
        model = named.model
        kept = model.state_dict()
        if any(buffer.is_meta and path not in kept for path, buffer in model.named_buffers()):
            model = model_again(plan, weights="buffers").model
        file = options.output.name if options.output is not None else "sharded_model.py"
        result = emitted_script(plan, model, file=file)
    else:
        result = export(plan, options.to, named.model, example_inputs=named.inputs)
    for sentence in result.missing:
        progress(f"not in it: {sentence}")
    if options.output is not None:
        write_file(options.output, result.text.encode())
        progress(f"written to {options.output}")
    if options.json:
        rows = {"target": result.target, "text": result.text, "missing": list(result.missing)}
        print(json.dumps(rows, indent=1))
    elif options.output is None:
        print(result.text, end="")
    return 0


EXPORT = Command(
    "export",
    "write a plan in the words of another program",
    (
        "autoparallel export plan.json --to parallelize_module -o split_by_torch.py",
        "autoparallel export plan.json --to transformers",
    ),
    _add_export,
    _run,
)
EMIT = Command(
    "emit",
    "write a plan as a Python file of its own, to be run by torchrun",
    ("autoparallel emit plan.json -o sharded_gpt.py",),
    _add_emit,
    _run,
)
