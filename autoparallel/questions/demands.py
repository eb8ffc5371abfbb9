"""A choice that a user names, "row" or "S(1) on tp", as a test of the states of a cost network."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Node
from autoparallel.placement import Layout, Placement
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.path_demands import placement_test
from autoparallel.strategy.product_splits import split_word

__all__ = ["demanded", "names_product"]

_PRODUCTS = ("row", "column")
_ON = re.compile(r"\s*(.+?)(?:\s+on\s+(\w+))?\s*")


def demanded(network: CostNetwork, node: Node, text: str) -> NDArray[np.bool_]:
    """Return which states of an op or a parameter are as a text demands.

    text: of an op, "row" (its results are pending sums) or "column" (a weight is split, and with it
    the result); of an op's first result or a parameter's storage, "whole", "split", "split 1" or a
    placement, "S(0, blocks=3)". "on AXIS" says it of one mesh axis; without, "whole" is meant of
    all of them and the others of some. Raises PlanError for a text that is no choice.

    Example: `demanded(network, network.graph.calls[3], "row on tp")`
    """
    match = _ON.fullmatch(text)
    how, axis = match.groups() if match is not None else ("", None)
    names = [name for name, _ in network.mesh.axes]
    if axis is not None and axis not in names:
        raise PlanError(f"{text!r}: there is no axis {axis!r}", fix=f"say {', '.join(names)}")
    axes = [names.index(axis)] if axis is not None else list(range(len(names)))
    if how in _PRODUCTS and node.kind == "call":
        weights = [name in network.weights for name in node.operands()]
        return np.array(
            [
                any(
                    split_word(joint.operands, joint.results, weights, axis) == how for axis in axes
                )
                for joint in network.strategies[node.name]
            ]
        )
    layouts: Sequence[Layout]
    if node.kind == "parameter":
        layouts = [choice.storage for choice in network.storages[node.name]]
    else:
        layouts = [joint.results[0] for joint in network.strategies[node.name]]
    test = _placement(text, how)
    every = all if how == "whole" else any
    return np.array([every(test(layout[axis]) for axis in axes) for layout in layouts])


def names_product(text: str) -> bool:
    """Return whether a text says how a product runs: "row" or "column", of one axis or of any.

    >>> names_product("row on tp"), names_product("split 0")
    (True, False)
    """
    match = _ON.fullmatch(text)
    return match is not None and match[1] in _PRODUCTS


def _placement(text: str, how: str) -> Callable[[Placement], bool]:
    """Return the test of a placement. Raises PlanError where the words are no choice."""
    try:
        return placement_test(text, how)
    except PlanError:
        raise PlanError(
            f"{text!r} is no choice",
            fix='say "row" or "column" of a product, "whole", "split", "split 1", or a placement '
            'like "S(0, blocks=3)", and "on tp" for one axis',
        ) from None
