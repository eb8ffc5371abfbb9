"""The table of written rules, the decorator that fills it, and rules remembered call by call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from autoparallel.graph.graph import Ref, map_leaves
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = [
    "Author",
    "recalled_rule",
    "remember",
    "rule",
    "signature",
    "written_rule",
    "written_targets",
]

# A function that writes the rule of a call; it is the rule of an op, for calls of all shapes.
Author = Callable[[OpCall], ShardingRule]
# By the op's name. Rules of torch's ops are in it once rules/lookup.py has been imported.
_RULES: dict[str, Author] = {}
# Rules that were discovered in this process, each by the signature of the calls that it is right
# for. They are kept apart from `_RULES` because what was tried for some shapes says nothing of
# others.
_REMEMBERED: dict[Any, ShardingRule] = {}


def _without_sums_of_truths(author: Author) -> Author:
    """Return the same rule, through which no pending sum of truth values passes.

    An all-reduce adds up what the ranks hold of a pending sum. Truth values are joined by `or`,
    which is no sum: cast to numbers rank by rank, one that is true on two ranks would count twice.
    """

    # A function is wrapped, rather than its rule changed, because a rule is made call by call.
    @wraps(author)
    def written(call: OpCall) -> ShardingRule:
        sharding_rule = author(call)
        truths = {i for i, value in enumerate(call.operands) if value.dtype == torch.bool}
        if not any(truths & group for group in sharding_rule.linear):
            return sharding_rule
        linear = tuple(group for group in sharding_rule.linear if not truths & group)
        return dataclasses.replace(sharding_rule, linear=linear)

    return written


def rule(
    *targets: str, takes_empty: bool = True, replace: bool = False
) -> Callable[[Author], Author]:
    """Return a decorator that enters a function into the table, as the rule of these ops.

    targets: names of ops, as "aten.mm.default". takes_empty: see ShardingRule. replace: the rule
    takes the place of one that the op has. Raises ValueError where an op has a rule and replace is
    False, which is a mistake in rules/ops.

    Example: the functions in rules/ops, `@rule("aten.mm.default")`.
    """

    def register(author: Author) -> Author:
        @wraps(author)
        def refuses_empty(call: OpCall) -> ShardingRule:
            return dataclasses.replace(author(call), takes_empty=False)

        for target in targets:
            if target in _RULES and not replace:
                raise ValueError(f"{target} has a rule already: {_RULES[target].__module__}")
            _RULES[target] = _without_sums_of_truths(author if takes_empty else refuses_empty)
        return author

    return register


def written_rule(target: str) -> Author | None:
    """Return the function in the table that writes an op's rule, None where there is none.

    Only rules/lookup.py knows that the table is full; call its `find_rule` instead.
    """
    return _RULES.get(target)


def written_targets() -> tuple[str, ...]:
    """Return the names of all ops in the table, sorted."""
    return tuple(sorted(_RULES))


def signature(call: OpCall) -> Any:
    """Return all that a rule may depend on, hashable: equal for calls that differ in names alone.

    That is the op, every argument that is no tensor, and shape, type and need of a gradient of
    every operand and result.
    """
    operands = iter(call.operands)

    def without_name(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            value = next(operands)
            return (value.shape, value.dtype, value.requires_grad)
        # 1, 1.0 and True are equal and have one hash, but an op tells them apart.
        return (type(leaf).__name__, leaf)

    return (
        call.node.target,
        map_leaves(without_name, call.node.args),
        map_leaves(without_name, call.node.kwargs),
        tuple((result.shape, result.dtype, result.requires_grad) for result in call.results),
    )


def remember(call: OpCall, sharding_rule: ShardingRule) -> None:
    """Keep a rule that was discovered for this call, for as long as this process lives."""
    _REMEMBERED[signature(call)] = sharding_rule


def recalled_rule(call: OpCall) -> ShardingRule | None:
    """Return the rule that was remembered for calls like this one, None where there is none."""
    return _REMEMBERED.get(signature(call))
