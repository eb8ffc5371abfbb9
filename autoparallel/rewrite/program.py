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
from autoparallel.runtime import collectives, kernels
from autoparallel.runtime import random_ops as draws
from autoparallel.runtime import recompute as again
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import Ranks

__all__ = ["Block", "Line", "Program", "compiled", "lines_of", "names_of"]


@dataclass(frozen=True)
class Program:
    """One rank's program. source: its text.

    run(parameters, buffers, constants, inputs, device) returns the local outputs and the values
    to write back. parameters, buffers, constants: paths, in the order in which run takes them.
    gradients: how the local gradients lie that the parameters then have. On an axis where a
    parameter is whole and every reader wants it as Replicate, the program reads it as it is, and
    its gradient is a pending sum, to be added up over the ranks by whoever runs the program.
    outputs: (layout, shape) of what it returns; shape entries are ints or expressions.
    names: what the text calls by name besides its own values.
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


@dataclass(frozen=True)
class Line:
    """One statement, and the names of the tensors that it reads and makes."""

    text: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass
class Block:
    """Lines that are run again in the backward pass instead of keeping what they make."""

    name: str
    lines: list[Line] = field(default_factory=list)


def lines_of(body: Iterable[Line | Block], kept: Iterable[str]) -> list[str]:
    """The text, with each name deleted after its last use, to free its memory. kept: returned."""
    items, wanted = list(body), set(kept)
    flat: list[tuple[list[str], tuple[str, ...], tuple[str, ...]]] = []
    for item in reversed(items):
        if isinstance(item, Line):
            flat.append(([item.text], item.reads, item.makes))
            wanted.update(item.reads)
            continue
        made = dict.fromkeys(name for line in item.lines for name in line.makes)
        reads = dict.fromkeys(name for line in item.lines for name in line.reads)
        inputs = tuple(name for name in reads if name not in made)
        outputs = tuple(name for name in made if name in wanted)
        inner = lines_of(item.lines, outputs)
        rows = [f"def {item.name}({', '.join(inputs)}):"]
        rows += [f"    {row}" for row in (*inner, f"return [{', '.join(outputs)}]")]
        call = ", ".join((item.name, *inputs))
        rows.append(f"[{', '.join(outputs)}] = recomputed({call})")
        flat.append((rows, inputs, outputs))
        wanted.update(inputs)
    flat.reverse()
    return _with_deletions(flat, set(kept))


def _with_deletions(
    rows: list[tuple[list[str], tuple[str, ...], tuple[str, ...]]], kept: set[str]
) -> list[str]:
    last: dict[str, int] = {}
    for index, (_, reads, _) in enumerate(rows):
        for name in reads:
            last[name] = index
    made = {name for _, _, names in rows for name in names}
    done: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in made and name not in kept:
            done.setdefault(index, []).append(name)
    text = []
    for index, (own, _, _) in enumerate(rows):
        text += own
        if index in done:
            text.append("del " + ", ".join(done[index]))
    return text


def _part(size: int, group: Group) -> int:
    """Elements of `size` that this rank of the group has."""
    start, stop = part_bounds(size, group.world_size, group.rank)
    return stop - start


def names_of(ranks: Ranks, axes: tuple[str, ...], constants: Mapping[str, Any]) -> dict[str, Any]:
    """What a program calls by name. axes: what the text calls the mesh's."""
    return {
        "torch": torch,
        "F": functional,
        "functools": functools,
        "kernels": kernels,
        "rng": draws,
        "math": math,
        "convert": collectives.convert,
        "convert_again": again.convert_again,
        "parts_are_alike": again.parts_are_alike,
        "recomputed": again.recomputed,
        "move": collectives.convert_fixed,
        "pending_sum": collectives.pending_sum,
        "part": _part,
        "ranks": ranks,
        **dict(zip(axes, ranks.groups, strict=True)),
        **constants,
    }


def compiled(source: str, name: str, ranks: Ranks, names: Mapping[str, Any]) -> Callable[..., Any]:
    """The function, with its text known to tracebacks.

    Every text has a file name of its own: a model has one program for each mode and each structure
    of its inputs, and a traceback through one of them must not show the lines of another.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    file = f"<autoparallel {name} rank {ranks.rank} of {ranks.world_size} {digest}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    namespace = dict(names)
    exec(compile(source, file, "exec"), namespace)
    made: Callable[..., Any] = namespace["forward"]
    return again.dropping(made) if "convert_again(" in source else made
