"""Constraints of a user on the plan: which parameters and modules may lie how, on which axis.

    "blocks.*.feed_forward.*.weight on dp is whole"
    "lm_head.weight is not split 0"
    "encoder.* on tp is not split 1"

First comes a pattern of parameter paths or of module paths (as in a shell: * for anything). A
parameter's path stands for the parameter, a module's for the results of all ops in it. Then, for
one axis alone, "on AXIS". Then "is" or "is not", and a layout: "whole" (invariant or replicated),
"split" (along any dim), "split 1" (along that dim), or a placement as plans print it: "I", "R",
"P", "S(0, blocks=3)".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from autoparallel.errors import PlanError
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.placement import (
    Invariant,
    Layout,
    Placement,
    Replicate,
    Shard,
    layout_text,
    parse_placement,
)
from autoparallel.strategy.cost_network import CostNetwork

__all__ = ["Constraint", "constrain", "parse_constraints", "placement_test"]

_FORM = re.compile(r"\s*(\S+)(?:\s+on\s+(\w+))?\s+is(\s+not)?\s+(.+?)\s*")


@dataclass(frozen=True)
class Constraint:
    """One constraint on the layouts of parameters or of modules' results.

    text: as the user wrote it. pattern: of paths. axes: indices of the mesh axes that it is about.
    accepts: says of one placement on such an axis whether it is as demanded.
    """

    text: str
    pattern: str
    axes: tuple[int, ...]
    accepts: Callable[[Placement], bool]

    def matches(self, path: str) -> bool:
        """Say whether it is about the parameter or module at `path`, or about one it is part of."""
        # Every prefix of the path is a module that contains it.
        parts = path.split(".")
        return any(
            fnmatchcase(".".join(parts[:count]), self.pattern) for count in range(len(parts), 0, -1)
        )

    def allows(self, layout: Layout) -> bool:
        """Say whether a layout is as demanded on all axes that it is about."""
        return all(self.accepts(layout[axis]) for axis in self.axes)


def parse_constraints(texts: tuple[str, ...], mesh: Mesh) -> tuple[Constraint, ...]:
    """Return the constraints that `texts` state.

    mesh: whose axes they may name. Raises PlanError for a text that is no constraint.

    >>> constraint, = parse_constraints(("*.weight on tp is split 1",), Mesh(tp=2))
    >>> constraint.matches("layers.0.weight"), constraint.matches("layers.0.bias")
    (True, False)
    """
    return tuple(_parse(text, mesh) for text in texts)


def _parse(text: str, mesh: Mesh) -> Constraint:
    """Return the constraint that one text states."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise PlanError(
            f"{text!r} is no constraint", fix='write "blocks.*.weight on dp is not split 0"'
        )
    pattern, axis, negated, how = match.groups()
    names = [name for name, _ in mesh.axes]
    if axis is not None and axis not in names:
        raise PlanError(
            f"constraint {text!r}: the mesh has no axis {axis!r}",
            fix=f"its axes are {', '.join(names)}",
        )
    accepts = placement_test(text, how)
    # Micro-batches are no ranks, over which a user would want a tensor to lie in a certain way.
    axes = tuple(
        index for index, name in enumerate(names) if axis in (None, name) and name != MICROBATCH
    )
    if negated:
        return Constraint(text, pattern, axes, lambda placement: not accepts(placement))
    return Constraint(text, pattern, axes, accepts)


def placement_test(text: str, how: str) -> Callable[[Placement], bool]:
    """Return the test of a placement that the words after "is" stand for.

    text: the whole demand, which errors show. how: "whole", "split", "split 1" or a placement.
    Raises PlanError where it is none of these.

    >>> placement_test("fc1: split 1", "split 1")(Shard(1))
    True
    """
    if how == "whole":
        return lambda placement: isinstance(placement, Invariant | Replicate)
    if how == "split":
        return lambda placement: isinstance(placement, Shard)
    match = re.fullmatch(r"split\s+(\d+)", how)
    if match is not None:
        dim = int(match[1])
        return lambda placement: isinstance(placement, Shard) and placement.dim == dim
    try:
        wanted = parse_placement(how)
    except ValueError:
        raise PlanError(
            f"constraint {text!r}: {how!r} says not how",
            fix='write "whole", "split", "split 1", or a placement like "S(0, blocks=3)"',
        ) from None
    return lambda placement: placement == wanted


def constrain(network: CostNetwork, aliases: Mapping[str, str]) -> None:
    """Forbid the states of a network that its options' constraints do not allow.

    aliases: for every path of a parameter, the one that the graph knows it by (tied weights have
    several). Sets `network.allowed`.
    Raises PlanError for a constraint that is about nothing in the model, or that no state fulfils.
    """
    constraints = parse_constraints(network.options.constraints, network.mesh)
    if not constraints:
        return
    graph = network.graph
    paths: dict[str, list[str]] = {}
    for path, graph_path in aliases.items():
        paths.setdefault(graph_path, []).append(path)
    used: set[str] = set()
    for node in graph.nodes:
        if node.kind == "parameter":
            names = paths.get(node.target, [node.target])
            layouts: list[tuple[Layout, ...]] = [
                (choice.storage,) for choice in network.storages[node.name]
            ]
        # All results must be as demanded, whichever of them leaves the module.
        elif node.kind == "call" and node.where:
            names = [node.where]
            layouts = [joint.results for joint in network.strategies[node.name]]
        else:
            continue
        wanted = [c for c in constraints if any(c.matches(name) for name in names)]
        used.update(constraint.text for constraint in wanted)
        if wanted:
            network.allowed[node.name] = np.array(
                [all(c.allows(layout) for c in wanted for layout in state) for state in layouts]
            )
            if not network.allowed[node.name].any():
                raise PlanError(
                    f"{names[0]} cannot be as {' and '.join(repr(c.text) for c in wanted)}",
                    where=node.line,
                    why=f"it can be {_able(layouts)}",
                    fix="allow one of these, name a narrower pattern, or leave the constraint out",
                )
    for constraint in constraints:
        # A pattern with a typing error must not pass for a constraint that holds.
        if constraint.text not in used:
            all_paths = [*aliases, *dict.fromkeys(node.where for node in graph.calls if node.where)]
            near = get_close_matches(constraint.pattern, all_paths, 3)
            raise PlanError(
                f"constraint {constraint.text!r} is about nothing: no parameter and no module is "
                f"called {constraint.pattern!r}",
                fix=f"did you mean {', '.join(near)}?" if near else "see model.named_modules()",
            )


def _able(layouts: list[tuple[Layout, ...]]) -> str:
    """Return the possible states in words."""
    texts = dict.fromkeys(", ".join(map(layout_text, state)) for state in layouts)
    return "; ".join(texts)
