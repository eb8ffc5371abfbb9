"""Discovered rules on disk, so that each op is probed once and not in every process.

There is one file per op and shape pattern in the common cache folder, and one per call for an op
that has no rule, with the reason: such an op may have ended its process. A file that cannot be
read, or is of another version of torch, of the op or of this program, is as good as none, and is
written anew; a folder that cannot be written to is left alone. Of what a file says, only the names
of known kernels reach the text of a program, and the rule is proven before it is used.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.probe_sizes import related_terms
from autoparallel.discovery.shape_pattern import Probe, integers_of
from autoparallel.graph.graph import Ref, Sym, map_leaves
from autoparallel.rules.rule import OpCall
from autoparallel.support.cache_files import default_cache_folder, write_whole
from autoparallel.support.json_text import read_json
from autoparallel.support.torch_private import (
    custom_op_functions,
    dispatch_registrations,
    schema_of,
)

__all__ = ["key_of", "load", "load_refusal", "refusal_key", "store", "store_refusal"]

# To be raised when a rule that is on disk would be found differently today.
VERSION = 7


def key_of(call: OpCall) -> str:
    """Return the key of a rule: the op as it is registered, and the pattern of the call's sizes,
    as JSON.

    Two calls with one key have one rule. The op's source counts, so that a changed op is probed
    again.
    """
    probe = Probe(call)
    operands = iter(call.operands)

    def word(leaf: Any) -> str:
        """Return one argument by its kind; numbers that are sizes are in the pattern."""
        if isinstance(leaf, Ref):
            value = next(operands)
            # One rule for all floating point types: what is split does not depend on their width.
            kind = "float" if value.dtype.is_floating_point else str(value.dtype)
            kind = "complex" if value.dtype.is_complex else kind
            return f"tensor {kind}{' grad' if value.requires_grad else ''}"
        if isinstance(leaf, Sym) or (isinstance(leaf, int) and not isinstance(leaf, bool)):
            return "integer"
        if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return "float dtype"
        return f"{type(leaf).__name__} {leaf}"

    results = [
        (len(value.shape), [size == 1 for size in value.shape], value.requires_grad)
        for value in call.results
    ]
    rows = {
        "version": VERSION,
        "torch": torch.__version__,
        "op": str(schema_of(probe.operation)),
        "source": _source(call.node.target),
        "args": map_leaves(word, (call.node.args, call.node.kwargs)),
        "sizes": related_terms(probe),
        "results": results,
    }
    return json.dumps(rows)


def refusal_key(call: OpCall) -> str:
    """Return the key of the reason why a call has no rule: that of the rule, and all sizes.

    An op may fail at some sizes of a pattern alone.
    """
    sizes = [str(tuple(value.shape)) for value in (*call.operands, *call.results)]
    return json.dumps({"refused": [key_of(call), sizes, str(integers_of(call))]})


def _source(target: str) -> str:
    """Return a digest of the op's implementation, as far as it is known; "" for torch's own."""
    space, name, overload = target.split(".")
    if space == "aten":
        return ""
    functions = custom_op_functions(f"{space}::{name}")
    # Not registered by torch.library.custom_op: the table of its registered kernels stands for it.
    if functions is None:
        suffix = "" if overload == "default" else f".{overload}"
        text = dispatch_registrations(f"{space}::{name}{suffix}")
    else:
        text = "\n".join(map(_text, functions))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(function: Any) -> str:
    """Return the source of a function; its bytecode where there is none,
    as in an interactive session.
    """
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return code.co_code.hex() if code is not None else str(type(function))


def _path(key: str) -> Path:
    """Return the file of a key. Keys are too long for names of files."""
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return default_cache_folder() / "rules" / f"{name}.json"


def load(key: str) -> DiscoveredRule | None:
    """Return the rule that was stored under `key`; None if there is none that can be read."""
    try:
        return DiscoveredRule.from_json(_stored(key, "found"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def load_refusal(key: str) -> tuple[str, bool] | None:
    """Return what `store_refusal` stored under `key`; None if there is nothing that can be read."""
    try:
        return str(_stored(key, "why")), bool(_stored(key, "ended"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _stored(key: str, part: str) -> Any:
    """Return a part of what is stored under `key`.

    Raises KeyError where another key has its file, and other errors where it cannot be read.
    """
    rows = read_json(_path(key).read_text())
    # The key is compared in full: file names are digests, and old versions are other keys.
    if rows["key"] != json.loads(key):
        raise KeyError(key)
    return rows[part]


def store(key: str, discovered: DiscoveredRule) -> None:
    """Write a rule, whole or not at all: other processes may read and write the same file."""
    _write(key, {"found": discovered.to_json()})


def store_refusal(key: str, why: str, ended: bool) -> None:
    """Write the reason why a call has no rule.

    why: the rest of a sentence that starts with the op. ended: whether the op ended the process
    that tried it.
    """
    _write(key, {"why": why, "ended": ended})


def _write(key: str, content: dict[str, Any]) -> None:
    """Write a file; a folder that cannot be written to is left alone."""
    text = json.dumps({"key": json.loads(key), **content}, indent=1) + "\n"
    with suppress(OSError):
        write_whole(_path(key), text.encode())
