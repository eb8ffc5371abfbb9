"""Where rules are found: by the op's name alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch

from autoparallel.errors import RuleError
from autoparallel.graph.graph import Ref, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = [
    "find_rule",
    "known_rule",
    "needs_proof",
    "register_rule",
    "registered",
    "remember",
    "rule",
    "signature",
    "written_at",
]

Author = Callable[[OpCall], ShardingRule]
_RULES: dict[str, Author] = {}
# Where the rules are written that were registered from outside, and those of them to be proven.
_WRITTEN_AT: dict[str, str] = {}
_TO_PROVE: set[str] = set()
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
        return dataclasses.replace(found, linear=tuple(g for g in found.linear if not truths & g))

    return made


def rule(*targets: str, takes_empty: bool = True) -> Callable[[Author], Author]:
    """Register the function as the rule of these ops ("aten.mm.default").

    takes_empty: see ShardingRule.
    """

    def register(author: Author) -> Author:
        def made(call: OpCall) -> ShardingRule:
            return dataclasses.replace(author(call), takes_empty=takes_empty)

        for target in targets:
            if target in _RULES:
                raise ValueError(f"{target} has a rule already: {_RULES[target].__module__}")
            _RULES[target] = _of_numbers(author if takes_empty else wraps(author)(made))
        return author

    return register


def register_rule(
    *targets: str, replace: bool = False, trusted: bool = False, takes_empty: bool = True
) -> Callable[[Author], Author]:
    """Register the function as the sharding rule of these ops ("examples.scale.default").

    The function gets an OpCall, which has the operands' and results' shapes and the arguments, and
    returns a ShardingRule: the loops that the op is made of, of which every strategy is derived.
    Before a plan uses the rule, all strategies are proven on small tensors: split, run and joined
    they must equal the unsplit op, forward and backward; otherwise planning raises RuleError.

        >>> import autoparallel, torch
        >>> @torch.library.custom_op("docs::scale", mutates_args=())
        ... def scale(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        ...     return x * by
        >>> _ = scale.register_fake(lambda x, by: torch.empty_like(x))
        >>> @autoparallel.register_rule("docs.scale.default")
        ... def scale_rule(call):
        ...     return autoparallel.ShardingRule.parse("b c, c -> b c", call, linear=[{0}, {1}])

    replace: take the place of a rule that the op has. trusted: do without the proof, where the op
    does not run on small tensors of the CPU; wrong numbers are then the author's.
    takes_empty: whether the op runs on tensors without elements, which ranks are left with where a
    dim is shorter than they are many.
    Raises RuleError for a target that is no op, and for one that has a rule already.
    """
    _load()
    for target in targets:
        _require_op(target)
        if target in _RULES and not replace:
            raise RuleError(
                f"{target} has a sharding rule already",
                where=_WRITTEN_AT.get(target, _RULES[target].__module__),
                fix="pass replace=True to take its place",
            )

    def register(author: Author) -> Author:
        code = getattr(author, "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(author)

        @wraps(author)
        def guarded(call: OpCall) -> ShardingRule:
            return _returned(author, call, where)

        for target in targets:
            _RULES.pop(target, None)
            _WRITTEN_AT[target] = where
            (_TO_PROVE.discard if trusted else _TO_PROVE.add)(target)
        rule(*targets, takes_empty=takes_empty)(guarded)
        return author

    return register


def _require_op(target: str) -> None:
    """Raises RuleError where there is no op of that name, or where it leaves open which."""
    op = operator_of(target)
    if getattr(op, "_schema", None) is not None:
        return
    overloads = op.overloads() if target.count(".") == 1 and op is not None else []
    raise RuleError(
        f"{target!r} is no op",
        why="an op is named by namespace, name and overload" if overloads else "torch.ops has none",
        fix=f'"{target}.{overloads[0]}"'
        if overloads
        else 'define it first (torch.library.custom_op), and name it "namespace.name.default"',
    )


def _returned(author: Author, call: OpCall, where: str) -> ShardingRule:
    """The rule that a function from outside returns. Raises RuleError where it returns none."""
    try:
        made = author(call)
    except Exception as error:  # anyone's code may fail in any way
        raise RuleError(
            f"the sharding rule of {call.node.target} failed",
            where=where,
            why=f"{type(error).__name__}: {error}\nfor the call {call.node}",
            fix="correct the rule",
        ) from error
    if not isinstance(made, ShardingRule):
        raise RuleError(
            f"the sharding rule of {call.node.target} returned {type(made).__name__}",
            where=where,
            fix='return ShardingRule.parse("b c, c -> b c", call), or a ShardingRule',
        )
    return made


def needs_proof(target: str) -> bool:
    """Whether the op's rule was registered from outside, and nobody vouches for it."""
    return target in _TO_PROVE


def written_at(target: str) -> str:
    """The file and line of a rule that was registered from outside; "" for others."""
    return _WRITTEN_AT.get(target, "")


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
