"""Where rules are found: by the op's name alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = ["find_rule", "registered", "rule"]

Author = Callable[[OpCall], ShardingRule]
_RULES: dict[str, Author] = {}
_ROOMS = (
    "pointwise",
    "contraction",
    "shape",
    "reduction",
    "normalization",
    "attention",
    "indexing",
    "losses",
)


def rule(*targets: str) -> Callable[[Author], Author]:
    """Register the function as the rule of these ops ("aten.mm.default")."""

    def register(author: Author) -> Author:
        for target in targets:
            if target in _RULES:
                raise ValueError(f"{target} has a rule already: {_RULES[target].__module__}")
            _RULES[target] = author
        return author

    return register


def _load() -> None:
    for room in _ROOMS:
        import_module(f"autoparallel.rules.{room}")


def find_rule(target: str) -> Author | None:
    """The rule of an op, None where nobody wrote one."""
    _load()
    return _RULES.get(target)


def registered() -> tuple[str, ...]:
    """Every op that has a rule."""
    _load()
    return tuple(sorted(_RULES))
