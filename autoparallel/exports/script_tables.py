"""The tables of an emitted script: how its parameters lie, its buffers, constants and inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from autoparallel.errors import PlanError
from autoparallel.placement import layout_text
from autoparallel.plan import Plan
from autoparallel.rewrite.emitted_program import require_graph
from autoparallel.rewrite.program import Program
from autoparallel.runtime.groups import Group

__all__ = ["literal", "script_tables"]

_MOST_NUMBERS = 10_000  # of a tensor that is written into the file
_INDEXED = re.compile(r"(.*?)\.(\d+)\.(.+)")  # of a path: before, at and after its first index


def script_tables(
    plan: Plan, program: Program, model: nn.Module, constants: Mapping[str, torch.Tensor]
) -> list[str]:
    """Return the tables that ShardedProgram reads, and those for a run with random weights."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    stored = plan.storage
    axes = [name for name, value in program.names.items() if isinstance(value, Group)]
    lines = [f"MESH = {dict(plan.mesh.axes)!r}"]
    lines += ["# What the program calls the groups of ranks along these axes.", f"AXES = {axes!r}"]
    lines += [
        "# Of each parameter: how it lies on the ranks, how its gradient lies after the backward"
    ]
    lines += ["# pass, its whole shape, and its dtype."]
    rows = [
        (
            path,
            f"({layout_text(stored[path])!r}, {layout_text(gradient)!r}, "
            f"{tuple(named[path].shape)!r}, {named[path].dtype!r})",
        )
        for path, gradient in zip(program.parameters, program.gradients, strict=True)
    ]
    lines += ["PARAMETERS = {", *_folded_rows(rows), "}"]
    lines += [f"BUFFERS = {list(program.buffers)!r}"]
    lines += [f"WRITTEN = {list(program.mutations)!r}"]
    lines += [f"OUTPUTS = {[layout_text(layout) for layout, _ in program.outputs]!r}"]
    values = [literal(path, constants[path]) for path in program.constants]
    lines += [f"CONSTANTS = [{', '.join(values)}]"]
    kept = model.state_dict()
    lines += ["# Buffers that a state_dict does not have.", "EMBEDDED = {"]
    lines += [
        f"    {path!r}: {literal(path, buffers[path])},"
        for path in program.buffers
        if path not in kept
    ]
    whole = {path: buffers[path] for path in program.buffers if path in kept}
    lines += ["}", "# Shape and dtype of the buffers that it has.", "BUFFER_SHAPES = {"]
    lines += [f"    {p!r}: ({tuple(t.shape)!r}, {t.dtype!r})," for p, t in whole.items()]
    lines += ["}", f"INPUTS = [{', '.join(_input_rows(plan))}]"]
    return lines


def _folded_rows(rows: list[tuple[str, str]]) -> list[str]:
    """Return the lines of a table by paths, those of repeated blocks once.

    >>> _folded_rows([("a.0.b", "1"), ("a.1.b", "1"), ("c", "2")])[0]
    "    **{f'a.{index}.{name}': row for index in range(0, 2) for name, row in {"
    """
    lines: list[str] = []
    at = 0
    while at < len(rows):
        match = _INDEXED.fullmatch(rows[at][0])
        blocks: dict[int, list[tuple[str, str]]] = {}
        end = at
        while match and end < len(rows):
            other = _INDEXED.fullmatch(rows[end][0])
            if other is None or other[1] != match[1]:
                break
            blocks.setdefault(int(other[2]), []).append((other[3], rows[end][1]))
            end += 1
        first, count = next(iter(blocks), 0), len(blocks)
        alike = list(blocks) == list(range(first, first + count)) and all(
            block == blocks[first] for block in blocks.values()
        )
        if match is None or count < 2 or not alike:
            end = max(end, at + 1)
            lines += [f"    {path!r}: {row}," for path, row in rows[at:end]]
        else:
            key = f"f'{match[1]}.{{index}}.{{name}}'"
            span = f"range({first}, {first + count})"
            lines.append(f"    **{{{key}: row for index in {span} for name, row in {{")
            lines += [f"        {name!r}: {row}," for name, row in blocks[first]]
            lines.append("    }.items()},")
        at = end
    return lines


def _input_rows(plan: Plan) -> list[str]:
    """Return shape and dtype of each input that a run with zeros makes."""
    graph = require_graph(plan).graph
    nodes = [node for node in graph.nodes if node.kind == "input"]
    return [
        f"({item.given!r}, {node.result.dtype!r})"
        for item, node in zip(plan.inputs, nodes, strict=True)
    ]


def literal(path: str, tensor: torch.Tensor) -> str:
    """Return Python for a tensor. Raises PlanError for one that is too large, or has no values."""
    if tensor.is_meta or tensor.numel() > _MOST_NUMBERS:
        raise PlanError(
            f"{path} has "
            + ("no values" if tensor.is_meta else f"{tensor.numel()} elements")
            + ", and would have to be written into the file",
            why="it is neither in the model's state_dict nor computed by the program",
            fix="give a model with weights, in place of one on the meta device"
            if tensor.is_meta
            else "register it as a persistent buffer of the model",
        )
    # What is not finite prints as a name that Python does not have.
    numbers = re.sub(r"-?\b(?:inf|nan)\b", r"float('\g<0>')", repr(tensor.tolist()))
    return f"torch.tensor({numbers}, dtype={tensor.dtype!r})"
