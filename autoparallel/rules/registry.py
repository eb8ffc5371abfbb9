"""Where rules are found: by the op's name alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib import import_module
from typing import Any

import torch

from autoparallel.graph.graph import Ref, map_leaves
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = ["find_rule", "known_rule", "registered", "remember", "rule", "signature"]

Author = Callable[[OpCall], ShardingRule]
_RULES: dict[str, Author] = {}
_REMEMBERED: dict[Any, ShardingRule] = {}
_ROOMS = (
    "pointwise",
    "random",
    "contraction",
    "shape",
    "reduction",
    "normalization",
    "attention",
    "indexing",
    "losses",
    "slicing",
    "convolution",
    "recurrent",
)


def _of_numbers(author: Author) -> Author:
    """The same rule without pending sums of truth values: `or` is not a sum."""

    @wraps(author)
    def made(call: OpCall) -> ShardingRule:
        found = author(call)
        truths = {i for i, value in enumerate(call.operands) if value.dtype == torch.bool}
        if not any(truths & group for group in found.linear):
            return found
        return replace(found, linear=tuple(g for g in found.linear if not truths & g))

    return made


def rule(*targets: str, takes_empty: bool = True) -> Callable[[Author], Author]:
    """Register the function as the rule of these ops ("aten.mm.default").

    takes_empty: see ShardingRule.
    """

    def register(author: Author) -> Author:
        def made(call: OpCall) -> ShardingRule:
            return replace(author(call), takes_empty=takes_empty)

        for target in targets:
            if target in _RULES:
                raise ValueError(f"{target} has a rule already: {_RULES[target].__module__}")
            _RULES[target] = _of_numbers(author if takes_empty else wraps(author)(made))
        return author

    return register


def _load() -> None:
    for room in _ROOMS:
        import_module(f"autoparallel.rules.ops.{room}")


def find_rule(target: str) -> Author | None:
    """The rule of an op, None where nobody wrote one."""
    _load()
    return _RULES.get(target)


def registered() -> tuple[str, ...]:
    """Every op that has a rule."""
    _load()
    return tuple(sorted(_RULES))


def signature(call: OpCall) -> Any:
    """What a rule of `call` may depend on: equal for calls that differ in names alone."""
    operands = iter(call.operands)

    def kind(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            value = next(operands)
            return (value.shape, value.dtype, value.requires_grad)
        return (type(leaf).__name__, leaf)

    return (
        call.node.target,
        map_leaves(kind, call.node.args),
        map_leaves(kind, call.node.kwargs),
        tuple((result.shape, result.dtype, result.requires_grad) for result in call.results),
    )


def remember(call: OpCall, made: ShardingRule) -> None:
    """Keep a rule that was found for this call, for as long as this process lives."""
    _REMEMBERED[signature(call)] = made


def known_rule(call: OpCall) -> ShardingRule | None:
    """The rule of this call: the written one, else one that was found, else None."""
    author = find_rule(call.node.target)
    return author(call) if author is not None else _REMEMBERED.get(signature(call))
