"""The table of decompositions that are written out here, by the op's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["DECOMPOSITIONS", "Decomposition", "Known", "decomposition"]


# Says of an op, by its name, whether it is traced as itself: anything true where it is.
Known = Callable[[str], object]


# A function of the op's arguments that computes its result by simpler ops.
Decomposition = Callable[..., Any]

# By name and overload ("aten.addmm.default").
DECOMPOSITIONS: dict[str, Decomposition] = {}


def decomposition(*targets: str) -> Callable[[Decomposition], Decomposition]:
    """Register the decorated function as the decomposition of these ops.

    targets: names with overload, each of which has no decomposition yet. The function gets the
    arguments of a call and returns its result, or NotImplemented to have this call traced as it is.

    Example: see `addmm` in decompositions.py.
    """

    def register(function: Decomposition) -> Decomposition:
        """Enter the function for each target."""
        for target in targets:
            assert target not in DECOMPOSITIONS, target
            DECOMPOSITIONS[target] = function
        return function

    return register
