"""Where the decompositions of ops are registered, by the op's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["DECOMPOSITIONS", "Decomposition", "Known", "decomposition"]


# Says of an op, by its name, whether it is traced as itself: anything true where it is.
Known = Callable[[str], object]


Decomposition = Callable[..., Any]


DECOMPOSITIONS: dict[str, Decomposition] = {}


def decomposition(*targets: str) -> Callable[[Decomposition], Decomposition]:
    """The function is what the ops stand for; it may return NotImplemented to keep a call."""

    def register(function: Decomposition) -> Decomposition:
        for target in targets:
            assert target not in DECOMPOSITIONS, target
            DECOMPOSITIONS[target] = function
        return function

    return register
