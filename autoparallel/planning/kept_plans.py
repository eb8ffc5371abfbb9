"""Plans on disk, so that a training run that starts again need not plan again.

A plan follows from the traced program, from what was asked for, from the hardware, and from the
planner's own code: these together are its key. Whatever differs is another key, so that no plan is
out of date; a program whose rules are the user's own is planned each time, because what such a rule
says may depend on anything. What is read is checked by the rules of the ops as every plan from
elsewhere is, and what cannot be read is as good as none. AUTOPARALLEL_KEEP_PLANS=0 in the
environment switches this off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import planners
from autoparallel.capture.graph_breaks import GraphBreaks
from autoparallel.cost.hardware import find_hardware
from autoparallel.discovery.unknown_ops import is_lasting
from autoparallel.errors import AutoParallelError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Graph, Sym, leaves
from autoparallel.options import Options
from autoparallel.plan import Plan
from autoparallel.planning.plan_check import require_sound
from autoparallel.planning.plan_graphs import with_graphs
from autoparallel.rules.lookup import find_rule
from autoparallel.support.cache_files import default_cache_folder, write_whole
from autoparallel.support.json_text import read_json
from autoparallel.support.pytree import leaf_paths

__all__ = ["is_on", "key_of", "load", "store"]

_log = logging.getLogger("autoparallel")

# The oldest plans make room for new ones: the largest take some megabytes.
_MOST_PLANS = 64


def is_on() -> bool:
    """Return whether plans are kept, which the environment may forbid."""
    return os.environ.get("AUTOPARALLEL_KEEP_PLANS", "1") != "0"


def key_of(
    model: nn.Module, traced: Captured | GraphBreaks, options: Options, asked: Any
) -> str | None:
    """Return a digest of all that a plan follows from, None where that is not known.

    model: the one that is planned. traced: its trace. asked: what else the planner was asked for,
    whose repr says it all.

    >>> from autoparallel.planning.whole_trace import trace_whole
    >>> model = nn.Linear(2, 2)
    >>> traced = trace_whole(model, (torch.ones(4, 2),), {})
    >>> key_of(model, traced, Options(), "tp=2") == key_of(model, traced, Options(), "tp=3")
    False
    """
    rows: list[Any] = [type(model).__name__, str(options)]
    rows += [repr(find_hardware(options.hardware)), repr(asked), torch.__version__, _code()]
    if isinstance(traced, Captured):
        parts: list[tuple[tuple[str, ...], Captured]] = [((), traced)]
    else:
        parts = [(part.paths, part.captured) for part in traced.parts]
        rows += [[(stays.path, stays.reason) for stays in traced.breaks], dict(traced.aliases)]
        # Those that no part reads are in no program, and are told by the plan.
        rows += [
            (path, tuple(parameter.shape), str(parameter.dtype))
            for path, parameter in model.named_parameters()
        ]
    for paths, captured in parts:
        if not all(map(_is_known, {node.target for node in captured.graph.calls})):
            return None
        # A program numbers its inputs and what it returns; plans and demands call them by name.
        names = [[*leaf_paths(each, "tensor")] for each in (captured.inputs, captured.outputs)]
        facts = (paths, captured.part, captured.repeats, dict(captured.aliases), names)
        rows += [repr(facts), *_text(captured.graph)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _is_known(target: str) -> bool:
    """Return whether the rule of an op is the project's, or one that is found for torch's op."""
    author = find_rule(target)
    if author is None:
        return target.startswith("aten.")
    return author.__module__.startswith("autoparallel.")


def _text(graph: Graph) -> list[str]:
    """Return a program as texts, with the sizes that it is planned for and its module calls."""
    hints: dict[str, int] = {}
    for node in graph.nodes:
        shapes = tuple(value.shape for value in node.results)
        for leaf in leaves((shapes, node.args, node.kwargs)):
            if isinstance(leaf, Sym):
                hints[str(leaf)] = leaf.hint
    scopes = repr([node.scope for node in graph.nodes])
    return [str(graph), scopes, repr(sorted(hints.items()))]


@cache
def _code() -> str:
    """Return a digest of the source files of this package and of the planners."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parents[1], Path(planners.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _path(key: str) -> Path:
    """Return the file of a key."""
    return default_cache_folder() / "plans" / f"{key[:32]}.json"


def _digest(text: str) -> str:
    """Return a digest of a plan's text: what was damaged may still be some plan of the model."""
    return hashlib.sha256(text.encode()).hexdigest()


def load(key: str, model: nn.Module, traced: Captured | GraphBreaks) -> Plan | None:
    """Return the plan that was stored under `key`, with its graphs; None if there is none.

    model: the one that is planned. traced: its trace, which the key was made of. A file whose plan
    is none by the rules of the model's ops is passed over.
    """
    try:
        rows = read_json(_path(key).read_text())
        if rows["key"] != key or rows["digest"] != _digest(rows["plan"]):
            return None
        plan = with_graphs(Plan.from_json(rows["plan"]), traced)
        require_sound(plan, model)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AutoParallelError):
        return None
    with suppress(OSError):
        os.utime(_path(key))  # it is in use, and not among the oldest
    _log.info("the plan of %s was made before, and is read from %s", plan.model, _path(key))
    return plan.checked()


def store(key: str, plan: Plan) -> None:
    """Keep a plan; a folder that cannot be written to is left alone.

    Where an op is left whole because it could not be tried this time, the plan may be another one
    the next time.

    Example: `store(key_of(model, traced, options, meshes), plan)`
    """
    if not all(map(is_lasting, {op.target for op in plan.ops})):
        return
    text = plan.to_json()
    rows = {"key": key, "digest": _digest(text), "plan": text}
    with suppress(OSError):
        path = _path(key)
        write_whole(path, json.dumps(rows).encode())
        kept = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_MOST_PLANS]:
            old.unlink(missing_ok=True)
