"""Sharding rules that users register for ops, their own or torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from autoparallel.errors import RuleError
from autoparallel.graph.operators import operator_of
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.registry import Author, rule
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.support.torch_private import schema_of

__all__ = ["needs_proof", "register_rule", "written_at"]

# The file and line of every rule of a user, by the op's name, and the ops whose rule is to be
# proven before a plan uses it.
_WRITTEN_AT: dict[str, str] = {}
_TO_PROVE: set[str] = set()


def register_rule(
    *targets: str, replace: bool = False, trusted: bool = False, takes_empty: bool = True
) -> Callable[[Author], Author]:
    """Return a decorator that registers a function as the sharding rule of these ops.

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

    targets: names of ops, with namespace and overload. replace: take the place of a rule that the
    op has. trusted: do without the proof, where the op does not run on small tensors of the CPU;
    wrong numbers are then the author's. takes_empty: whether the op runs on tensors without
    elements, which some ranks are left with where a dim is shorter than the mesh axis.
    Raises RuleError for a target that is no op, and for one that has a rule already; then none of
    the targets is registered.
    """
    for target in targets:
        _require_op(target)
        present = find_rule(target)
        if present is not None and not replace:
            raise RuleError(
                f"{target} has a sharding rule already",
                where=_WRITTEN_AT.get(target, present.__module__),
                fix="pass replace=True to take its place",
            )

    def register(author: Author) -> Author:
        # Objects with __call__, such as functools.partial, have no code of their own to point to.
        code = getattr(author, "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(author)

        # Whatever calls the rule gets a ShardingRule, or the error that says whose rule it is.
        @wraps(author)
        def guarded(call: OpCall) -> ShardingRule:
            return _returned(author, call, where)

        for target in targets:
            _WRITTEN_AT[target] = where
            # Trust goes with the rule: a replacement of a trusted rule is proven again.
            (_TO_PROVE.discard if trusted else _TO_PROVE.add)(target)
        rule(*targets, takes_empty=takes_empty, replace=True)(guarded)
        return author

    return register


def _require_op(target: str) -> None:
    """Raise RuleError where there is no op of that name, or where the name leaves open which."""
    op = operator_of(target)
    if schema_of(op) is not None:
        return
    # "aten.mm" names all overloads of an op at once, and each of them may need another rule.
    overloads = op.overloads() if target.count(".") == 1 and op is not None else []
    raise RuleError(
        f"{target!r} is no op",
        why="an op is named by namespace, name and overload" if overloads else "torch.ops has none",
        fix=f'"{target}.{overloads[0]}"'
        if overloads
        else 'define it first (torch.library.custom_op), and name it "namespace.name.default"',
    )


def _returned(author: Author, call: OpCall, where: str) -> ShardingRule:
    """Return the rule that a user's function writes for a call.

    where: the file and line of the function. Raises RuleError where it fails or returns no rule.
    """
    try:
        sharding_rule = author(call)
    except Exception as error:  # anyone's code may fail in any way
        raise RuleError(
            f"the sharding rule of {call.node.target} failed",
            where=where,
            why=f"{type(error).__name__}: {error}\nfor the call {call.node}",
            fix="correct the rule",
        ) from error
    if not isinstance(sharding_rule, ShardingRule):
        raise RuleError(
            f"the sharding rule of {call.node.target} returned {type(sharding_rule).__name__}",
            where=where,
            fix='return ShardingRule.parse("b c, c -> b c", call), or a ShardingRule',
        )
    return sharding_rule


def needs_proof(target: str) -> bool:
    """Return whether the op's rule is a user's who does not vouch for it.

    Rules of the project itself are proven by its tests, once and for all.
    """
    return target in _TO_PROVE


def written_at(target: str) -> str:
    """Return the file and line of a user's rule, as "rules.py:7"; "" for ops without one."""
    return _WRITTEN_AT.get(target, "")
