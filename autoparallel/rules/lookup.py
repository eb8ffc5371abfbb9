"""The rule of an op, or of one call, is looked up here, where all rules have been imported."""

from __future__ import annotations

# Importing the families of ops fills the table in registry.py. This file alone imports them, so
# that they can import the table's decorator.
from autoparallel.rules.ops import (  # noqa: F401
    attention,
    contraction,
    convolution,
    experts,
    indexing,
    losses,
    normalization,
    pointwise,
    random,
    recurrent,
    reduction,
    shape,
    slicing,
)
from autoparallel.rules.registry import Author, recalled_rule, written_rule, written_targets
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = ["find_rule", "known_rule", "registered", "rule_of_whole_tensors"]


def find_rule(target: str) -> Author | None:
    """Return the function that writes an op's rule, None where nobody wrote one.

    target: the op's name. The rules of the project are found as well as those of users.

    >>> find_rule("aten.mm.default").__name__, find_rule("aten.no_such_op.default")
    ('mm', None)
    """
    return written_rule(target)


def known_rule(call: OpCall) -> ShardingRule | None:
    """Return the rule of a call: the written one, else one that was discovered in this process.

    None means that nothing is known of the call, and discovery/ has to try it.
    """
    # A rule that is registered after the op was discovered takes its place.
    author = find_rule(call.node.target)
    return author(call) if author is not None else recalled_rule(call)


def rule_of_whole_tensors(call: OpCall) -> ShardingRule:
    """Return the rule of a call that every rank runs on whole tensors: it has no loop to split.

    Where nobody wrote a rule for the op, its backward pass may be anything, and gets no summands of
    a gradient.

    >>> from autoparallel.graph.graph import Node, Ref, Value
    >>> import torch
    >>> x, y = (Value(name, (4,), torch.float32) for name in "xy")
    >>> node = Node("y", "call", "mylib.op.default", (y,), (Ref("x"),))
    >>> rule_of_whole_tensors(OpCall(node, (x,))).replicates
    False
    """
    return ShardingRule(
        ((),) * len(call.operands),
        ((),) * len(call.results),
        {},
        replicates=find_rule(call.node.target) is not None,
    )


def registered() -> tuple[str, ...]:
    """Return the names of all ops for which a rule is written, sorted.

    >>> "aten.mm.default" in registered()
    True
    """
    return written_targets()
