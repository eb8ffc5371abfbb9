"""The text of an emitted program, line by line, and the function that it becomes."""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from autoparallel.graph.graph import Dim
from autoparallel.placement import Layout, part_bounds
from autoparallel.runtime import collectives, flights, kernels, overlap
from autoparallel.runtime import random_ops as draws
from autoparallel.runtime import recompute as again
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import Ranks

__all__ = [
    "PROGRAM_FILES",
    "Block",
    "Line",
    "Program",
    "compiled",
    "drops_copies",
    "file_of",
    "lines_of",
    "names_of",
    "part",
]

# With this begin the names of the files that tracebacks show programs in.
PROGRAM_FILES = "<autoparallel "


@dataclass(frozen=True)
class Program:
    """One rank's program: its text, the function that it is, and what that takes and returns.

    source: the text. run(parameters, buffers, constants, inputs, device) returns the local outputs
    and the values to write back to buffers. parameters, buffers, constants: paths in the model, in
    the order in which run takes them. gradients: the layouts of the local gradients that the
    parameters then have. On an axis where a parameter is unsharded and every reader wants it as
    Replicate, the program reads it as it is, and its gradient is a pending sum, to be reduced over
    the ranks by whoever runs the program.
    outputs: (layout, shape) of what it returns; shape entries are ints or expressions in sizes.
    mutations: paths of the buffers that are written back, in the order of the values. names: the
    functions and objects that the text calls by name, besides its own values. draws: the keys of
    its random ops.
    """

    source: str
    run: Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]]
    parameters: tuple[str, ...]
    gradients: tuple[Layout, ...]
    buffers: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[tuple[Layout, tuple[Dim, ...]], ...]
    mutations: tuple[str, ...]
    names: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    draws: tuple[int, ...] = ()


@dataclass(frozen=True)
class Line:
    """One statement of a program.

    text: the statement. reads, makes: names of the tensors that it reads, and gives values to.
    """

    text: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass
class Block:
    """Lines that are recomputed in the backward pass, so that their activations are not saved.

    name: of the function that they become in the text. runner: of the function that runs it:
    "recomputed", or "remade" for a single op whose result is not saved either.
    """

    name: str
    lines: list[Line] = field(default_factory=list)
    runner: str = "recomputed"


def lines_of(body: Iterable[Line | Block], returned: Iterable[str]) -> list[str]:
    """Return the text of a body, line by line, without indentation.

    returned: names that the body's function returns. Every other name is deleted after its last
    use: Python frees a tensor when its name is gone, and not when it is not used again. A block
    becomes a function of its own, which takes what it reads and returns what is used after it.

    >>> lines_of([Line("y = f(x)", ("x",), ("y",)), Line("z = g(y)", ("y",), ("z",))], ["z"])
    ['y = f(x)', 'z = g(y)', 'del y']
    """
    items, wanted = list(body), set(returned)
    # Backwards, so that `wanted` has, at each item, the names that are used after it.
    flat: list[tuple[list[str], tuple[str, ...], tuple[str, ...]]] = []
    for item in reversed(items):
        if isinstance(item, Line):
            flat.append(([item.text], item.reads, item.makes))
            wanted.update(item.reads)
            continue
        inside = dict.fromkeys(name for line in item.lines for name in line.makes)
        reads = dict.fromkeys(name for line in item.lines for name in line.reads)
        inputs = tuple(name for name in reads if name not in inside)
        outputs = tuple(name for name in inside if name in wanted)
        inner = lines_of(item.lines, outputs)
        rows = [f"def {item.name}({', '.join(inputs)}):"]
        rows += [f"    {row}" for row in (*inner, f"return [{', '.join(outputs)}]")]
        call = ", ".join((item.name, *inputs))
        rows.append(f"[{', '.join(outputs)}] = {item.runner}({call})")
        flat.append((rows, inputs, outputs))
        wanted.update(inputs)
    flat.reverse()
    return _with_deletions(flat, set(returned))


def _with_deletions(
    rows: list[tuple[list[str], tuple[str, ...], tuple[str, ...]]], returned: set[str]
) -> list[str]:
    """Return the text of rows (text, reads, makes), with `del` after the last use of each name.

    The function's arguments are not deleted: whoever called it holds them anyway.
    """
    last: dict[str, int] = {}
    for index, (_, reads, _) in enumerate(rows):
        for name in reads:
            last[name] = index
    local = {name for _, _, names in rows for name in names}
    deleted: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in local and name not in returned:
            deleted.setdefault(index, []).append(name)
    text = []
    for index, (lines, _, _) in enumerate(rows):
        text += lines
        if index in deleted:
            text.append("del " + ", ".join(deleted[index]))
    return text


def part(size: int, group: Group) -> int:
    """Return how many of `size` elements this rank of the group has; others may have fewer."""
    start, stop = part_bounds(size, group.world_size, group.rank)
    return stop - start


def names_of(ranks: Ranks, axes: tuple[str, ...], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Return the functions and objects that a program's text calls by name.

    axes: the text's names of the mesh axes, whose groups they are bound to. constants: objects by
    names that the text has for them, such as placements and dtypes.
    """
    return {
        "torch": torch,
        "F": functional,
        "functools": functools,
        "kernels": kernels,
        "overlap": overlap,
        "rng": draws,
        "math": math,
        "convert": collectives.convert,
        "convert_again": again.convert_again,
        "begin": flights.begin,
        "end": flights.end,
        "end_again": again.end_again,
        "parts_are_alike": again.parts_are_alike,
        "recomputed": again.recomputed,
        "remade": again.remade,
        "move": collectives.convert_fixed,
        "pending_sum": collectives.pending_sum,
        "part": part,
        "ranks": ranks,
        **dict(zip(axes, ranks.groups, strict=True)),
        **constants,
    }


def file_of(source: str, name: str, ranks: Ranks) -> str:
    """Return the name under which tracebacks show a program. name: of the model."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"{PROGRAM_FILES}{name} rank {ranks.rank} of {ranks.world_size} {digest}>"


def drops_copies(source: str) -> bool:
    """Return whether a program makes something again in the backward pass that autograd would save.

    >>> drops_copies("y = convert_again(x, tp, S0, R)"), drops_copies("y = convert(x, tp, S0, R)")
    (True, False)
    """
    return any(call in source for call in ("convert_again(", "end_again(", "= remade("))


def compiled(source: str, name: str, ranks: Ranks, names: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function `forward` of a program's text, whose lines tracebacks show.

    source: the text. name: of the model. names: see names_of.
    Every text has a file name of its own: a model has one program for each mode and each structure
    of its inputs, and a traceback through one of them must not show the lines of another.
    """
    file = file_of(source, name, ranks)
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    namespace = dict(names)
    drops = drops_copies(source)
    if drops:
        namespace |= {"convert": again.convert_beside, "move": again.move_beside}
    exec(compile(source, file, "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    # Dropping copies costs a hook on every saved tensor: only programs that drop some pay for it.
    return again.dropping(forward) if drops else forward
