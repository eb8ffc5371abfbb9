"""`autoparallel dims`: the dims of a model by name, which demands on its plan may speak of."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoparallel.commands.asked_plan import add_model, add_model_sizes, model_of
from autoparallel.commands.command import Command, progress

if TYPE_CHECKING:
    from autoparallel.threads import Threads
    from autoparallel.threads.thread import Thread

__all__ = ["DIMS", "dims_of"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dims`."""
    add_model(parser)
    add_model_sizes(parser)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _run(options: argparse.Namespace) -> int:
    """Print the dims, and the words that demands may have for them."""
    from autoparallel.planning.model_threads import trace_threads

    named = model_of(options)
    progress("tracing it")
    rows = dims_of(trace_threads(named.model, example_inputs=named.inputs))
    print(json.dumps(rows, indent=1) if options.json else _text(rows))
    return 0


def dims_of(threads: Threads) -> list[dict[str, Any]]:
    """Return the dims of a model, as JSON can hold them: each name once, with its sizes and places.

    What is no matter of the model, but of the program that was traced, is left out.

    Example: `dims_of(autoparallel.trace_threads(model))`
    """
    from autoparallel.graph.graph import hint
    from autoparallel.threads.thread_names import ROLES

    rows = []
    for name in threads.names:
        if name in ROLES:
            named = threads.named(name)
            rows.append(
                {
                    "name": name,
                    "sizes": list(dict.fromkeys(hint(thread.size) for thread in named)),
                    "of_inputs": any(not isinstance(thread.size, int) for thread in named),
                    "about": ROLES[name],
                    "modules": _modules(named),
                    "whole_in": _needing(threads, named),
                }
            )
    return rows


def _modules(threads: Sequence[Thread]) -> list[str]:
    """Return the modules that the threads are in, numbers of repeated ones as "*"."""
    places = (re.sub(r"(?<![^.])\d+(?![^.])", "*", thread.where) for thread in threads)
    return list(dict.fromkeys(places))


def _needing(threads: Threads, named: Sequence[Thread]) -> list[str]:
    """Return the ops that need one of the threads whole, by their kind."""
    from autoparallel.threads.thread import Treatment

    targets = {node.name: node.target for node in threads.graph.calls}
    kinds = (
        targets[passage.call].split(".")[-2 if targets[passage.call].count(".") > 1 else -1]
        for thread in named
        for passage in thread.treated(Treatment.WHOLE)
    )
    return list(dict.fromkeys(kinds))


def _text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table, and below it what may be said of the dims."""
    from autoparallel.strategy.named_dims import OTHER_NAMES
    from autoparallel.strategy.role_demands import ROLES

    lines = [("dim", "size", "whole in", "is")]
    for row in rows:
        sizes = ", ".join(map(str, row["sizes"])) + (" (inputs)" if row["of_inputs"] else "")
        lines.append((row["name"], sizes, ", ".join(row["whole_in"]), row["about"]))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    names = [row["name"] for row in rows]
    words = [
        f"{word} ({', '.join(name for name in meant if name in names)})"
        for word, meant in OTHER_NAMES.items()
        if any(name in names and name != word for name in meant)
    ]
    width = max(map(len, ROLES))
    roles = "\n".join(f"  {word.ljust(width)}  {about}" for word, (_, about) in ROLES.items())
    return (
        f"{table}\n\nother words: {', '.join(words) or 'none'}\n\n"
        'demands: --constraint "heads on tp"; --layout "batch:dp, heads:tp", for axes that split '
        f'nothing else; or --constraint "fsdp on dp", of the layouts that have names:\n{roles}'
    )


DIMS = Command(
    "dims",
    "print the dims of a model by name, for demands on its plan",
    ("autoparallel dims gpt2", "autoparallel dims hf:config.json --layers 2"),
    _add_arguments,
    _run,
)
