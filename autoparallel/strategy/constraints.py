"""Constraints of a user on the plan, as sentences. Each is a demand: it forbids states.

By the paths of parameters and modules, as in a shell (* for anything):

    "*.q_proj is column on tp"
    "blocks.*.feed_forward.*.weight on dp is whole"
    "lm_head.weight is not split 0"

After "is" or "is not" comes "column" or "row", which are Megatron's words for the split of a
product, "whole" or "replicated" (invariant or replicated), "split" (along any dim), "split 1"
(along that dim), or a placement as plans print it: "I", "R", "P", "S(0, blocks=3)". "on AXIS",
before or behind, says it of one axis; without, "whole" and "split" are meant of every axis, and
"column" and "row" of some.

By the dims of the model, whose names `autoparallel dims` prints, and by the layouts that
practitioners have names for:

    "heads on tp"                   where a product has heads, tp splits them
    "only heads, vocab on tp"       and tp splits nothing else
    "fsdp on dp"                    or ddp, zero-1, zero-2, megatron, context, ulysses
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.placement import Layout, layout_text
from autoparallel.strategy.asked_model import Allowed, AskedModel, Demand, axis_index
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.dimension_demands import DimensionDemand
from autoparallel.strategy.path_demands import PathDemand, placement_test, states_text
from autoparallel.strategy.role_demands import RoleDemand, role_of

__all__ = ["constrain", "parse_constraints"]

_PATHS = re.compile(r"\s*(\S+)(?:\s+on\s+(\w+))?\s+is(\s+not)?\s+(.+?)(?:\s+on\s+(\w+))?\s*")
_NAMES = re.compile(r"\s*(only\s+)?(\S.*?)\s+on\s+(\w+)\s*")


def parse_constraints(texts: tuple[str, ...], mesh: Mesh) -> tuple[Demand, ...]:
    """Return the demands that `texts` state.

    mesh: whose axes they may name. Raises PlanError for a text that is no constraint.

    >>> demand, = parse_constraints(("*.weight on tp is split 1",), Mesh(tp=2))
    >>> demand.matches("layers.0.weight"), demand.matches("layers.0.bias")
    (True, False)
    """
    axes = [name for name, _ in mesh.axes]
    return tuple(_parse(text, axes) for text in texts)


def _parse(text: str, axes: Sequence[str]) -> Demand:
    """Return the demand that one text states."""
    match = _PATHS.fullmatch(text)
    if match is not None:
        return _of_paths(text, match, axes)
    match = _NAMES.fullmatch(text)
    if match is None:
        raise PlanError(
            f"{text!r} is no constraint",
            fix='write "blocks.*.weight on dp is not split 0", "*.up is column on tp", '
            '"heads on tp" or "fsdp on dp"',
        )
    only, names, axis = match.groups()
    index = axis_index(text, axis, axes)
    role = None if only else role_of(names)
    if role is not None:
        return RoleDemand(text, role, index)
    return DimensionDemand(text, tuple(re.split(r"\s*,\s*", names)), index, bool(only))


def _of_paths(text: str, match: re.Match[str], axes: Sequence[str]) -> PathDemand:
    """Return the demand of a text that names paths."""
    pattern, before, negated, how, behind = match.groups()
    # Another word that people say; placements are told apart no further here.
    how = "whole" if how == "replicated" else how
    if before is not None and behind is not None:
        raise PlanError(
            f"constraint {text!r} names two axes", fix="write one constraint for each axis"
        )
    axis = before or behind
    # Micro-batches are no ranks, over which a user would want a tensor to lie in a certain way.
    numbers = tuple(index for index, name in enumerate(axes) if name != MICROBATCH)
    if axis is not None:
        numbers = (axis_index(text, axis, axes),)
    if how not in ("column", "row"):
        placement_test(text, how)
    return PathDemand(text, pattern, numbers, how, negated is not None)


def constrain(
    network: CostNetwork, captured: Captured, pins: Mapping[str, Layout] | None = None
) -> None:
    """Forbid the states of a network that its options' constraints do not allow.

    captured: its program. pins: the layouts that parameters, by node name, are to have as well; the
    network's problem heeds them by itself. Sets `network.allowed`.
    Raises PlanError for a constraint that is about nothing in the model, for one that nothing can
    fulfil, and for those that contradict each other.
    """
    demands = parse_constraints(network.options.constraints, network.mesh)
    if not demands:
        return
    model = AskedModel(network, captured)
    everywhere = tuple(range(len(network.mesh.axes)))
    asked: dict[str, list[_Row]] = {}
    for demand in demands:
        for name, states in demand.states(model).items():
            asked.setdefault(name, []).append(_Row(repr(demand.text), demand.about, states))
    for name, pin in (pins or {}).items():
        states = np.array([choice.storage == pin for choice in network.storages[name]])
        # A pin that the parameter cannot take by itself is told when it is laid on the problem.
        if name in asked and states.any():
            asked[name].append(_Row(f"the pin {layout_text(pin)}", everywhere, states))
    # Equal calls share their arrays, by which equal layers are recognized.
    known: dict[bytes, Allowed] = {}
    for name, rows in asked.items():
        together = np.logical_and.reduce([states for _, _, states in rows])
        if not together.any():
            raise _contradiction(model, name, rows)
        network.allowed[name] = known.setdefault(together.tobytes(), together)


class _Row(NamedTuple):
    """A demand on one variable: its text, the axes that it is about, the states that it allows."""

    text: str
    axes: tuple[int, ...]
    states: Allowed


def _contradiction(model: AskedModel, name: str, rows: Sequence[_Row]) -> PlanError:
    """Return the error for demands that leave one variable no state."""
    kept = list(rows)
    for row in rows:
        # What contradicts each other without this one does not need it.
        rest = [other for other in kept if other is not row]
        if rest and not np.logical_and.reduce([other.states for other in rest]).any():
            kept = rest
    network = model.network
    node = next(node for node in network.graph.nodes if node.name == name)
    layouts: list[tuple[Layout, ...]]
    if node.kind == "parameter":
        layouts = [(choice.storage,) for choice in network.storages[name]]
    else:
        layouts = [joint.results for joint in network.strategies[name]]
    label = next(iter(model.names(node)), name)
    # Of axes that only one of them is about, nothing is at odds.
    axes = sorted(set.intersection(*(set(row.axes) for row in kept)) or set(kept[0].axes))
    leaves = "\n".join(
        f"{row.text} leaves {states_text(list(compress(layouts, row.states)), axes)}"
        for row in kept
    )
    return PlanError(
        f"{label if node.kind == 'parameter' else f'{name} in {label}'} cannot be as "
        f"{' and '.join(row.text for row in kept)}",
        where=node.line,
        why=f"on {', '.join(network.mesh.axes[axis][0] for axis in axes)},\n{leaves}",
        fix="leave one of them out, or name a narrower pattern",
    )
