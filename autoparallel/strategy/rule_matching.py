"""The sharding rule of every call of a graph, found once per signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autoparallel.discovery.registered_rules import require_proven
from autoparallel.discovery.trial import DRAWS
from autoparallel.discovery.unknown_ops import find_unknown, may_stay_whole, whole_rule
from autoparallel.errors import UnsupportedOpError
from autoparallel.graph.graph import Graph, Node, Ref, map_leaves
from autoparallel.graph.operators import draws
from autoparallel.options import Options
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = ["MatchedCall", "match_rules"]


@dataclass(frozen=True)
class MatchedCall:
    """A signature of calls: the op with shapes and constants, and its rule.

    call: the first call of that signature. rule: None where there is none, and all tensors stay
    whole.
    """

    call: OpCall
    rule: ShardingRule | None


def match_rules(
    graph: Graph, inert: set[str], options: Options, world_size: int
) -> dict[str, MatchedCall]:
    """Return the matched signature of every call, by node name.

    inert: calls that every rank computes whole; they need no rule. options: `unknown_ops` says
    whether ops without a rule are to be discovered, refused or kept whole. world_size: of 1, where
    nothing is discovered.
    An op of which no rule is found stays whole, and its rule says why. Raises UnsupportedOpError
    that lists every op for which that is not right, because it draws random numbers, writes or
    communicates, or that is not asked for, and RuleError that lists every registered rule that is
    wrong.
    """
    require_proven(OpCall.of(graph, node) for node in graph.calls if node.name not in inert)
    matched: dict[str, MatchedCall] = {}
    by_signature: dict[Any, MatchedCall] = {}
    missing: dict[str, list[Node]] = {}
    reasons: dict[str, str] = {}
    values = graph.values
    read = {name for name, readers in graph.readers.items() if readers}
    read.update(graph.outputs, (name for _, name in graph.mutations))

    def shape_of(leaf: Any) -> Any:
        """Return what a rule may depend on: a tensor's shape and dtype, a constant's value."""
        if isinstance(leaf, Ref):
            value = values[leaf.name]
            return (value.shape, value.dtype, value.requires_grad)
        return (type(leaf).__name__, leaf)

    for node in graph.calls:
        names = node.operands()
        # Operands that are the same value must lie alike, so mul(x, x) is not mul(x, y).
        twins = tuple(names.index(name) for name in names)
        key = (
            node.target,
            map_leaves(shape_of, node.args),
            map_leaves(shape_of, node.kwargs),
            tuple(result.shape for result in node.results),
            twins,
            node.name in inert,
        )
        if key not in by_signature:
            call = OpCall.of(graph, node)
            rule = None
            write_rule = find_rule(node.target)
            if write_rule is not None and node.name not in inert:
                rule = write_rule(call)
                _require_dims(call, rule, read)
            # On one rank nothing is split, so that no rule is needed.
            if write_rule is None and world_size > 1:
                rule, why = _unwritten(call, inert, options)
                # One op is no reason to refuse a model: the others are split around it.
                if rule is None and why and may_stay_whole(call, why):
                    rule = whole_rule(call, why)
                grad = any(result.requires_grad for result in node.results)
                if rule is None and (grad or draws(node.target) or DRAWS in why):
                    missing.setdefault(node.target, []).append(node)
                    reasons.setdefault(node.target, why)
            by_signature[key] = MatchedCall(call, rule)
        elif node.target in missing:
            missing[node.target].append(node)
        matched[node.name] = by_signature[key]
    # Whole tensors are right for any op but a random one, whose ranks would draw differently.
    if options.unknown_ops == "replicate":
        missing = {target: nodes for target, nodes in missing.items() if draws(target)}
    if missing:
        raise _unsupported(missing, reasons)
    return matched


def _require_dims(call: OpCall, rule: ShardingRule, read: set[str]) -> None:
    """Raise UnsupportedOpError where the tracer gives a result another number of dims than its op.

    That is an error of torch: its kernel for tensors without data and the real one disagree, as for
    the last state of an LSTM in torch 2.11. The shapes that follow from it in the graph would be
    wrong, too. read: the names of values that something reads.
    """
    for value, dims in zip(call.results, rule.results, strict=True):
        shape = value.shape
        if len(shape) != len(dims) and value.name in read:
            raise UnsupportedOpError(
                f"{call.node.target} with a tensor of {len(shape)} dims in place of {len(dims)}",
                where=", ".join(text for text in (call.node.where, call.node.line) if text),
                why=f"torch {torch.__version__} gives the traced tensor the shape {shape}",
                fix="use a later release of torch, or keep this in a submodule that stays Python",
            )


def _unwritten(call: OpCall, inert: set[str], options: Options) -> tuple[ShardingRule | None, str]:
    """Return the rule of a call whose op has none, if it is to be discovered and can be.

    Also returns why none was discovered, "" where discovery was not asked for.
    """
    if options.unknown_ops != "discover" or call.node.name in inert:
        return None, ""
    return find_unknown(call)


def _unsupported(
    missing: Mapping[str, list[Node]], reasons: Mapping[str, str]
) -> UnsupportedOpError:
    """Return the error that names all ops without a rule, their first places and reasons."""
    rows = []
    for target, nodes in sorted(missing.items()):
        first = nodes[0]
        place_text = ", ".join(text for text in (first.where, first.line) if text)
        rows.append(f"{target}, {len(nodes)} calls, first in {place_text or 'the model'}")
    why = [f"{target}: {reasons[target]}" for target in sorted(missing) if reasons[target]]
    if len(why) < len(missing):
        why.append(
            "a gradient flows through these ops, or they draw random numbers, and how they may be "
            "split, or drawn alike on all ranks, is not known"
        )
    discovered = ", and none could be discovered" if any(reasons.values()) else ""
    whole = ", or pass unknown_ops='replicate' to keep their tensors whole"
    return UnsupportedOpError(
        f"no sharding rule for {', '.join(sorted(missing))}{discovered}",
        where="\n".join(rows),
        why="\n".join(why),
        fix="write a rule (autoparallel.register_rule, see examples/custom_rule.py)"
        # Ops for which no rule was looked for may be right on whole tensors; the others are not.
        + ("" if any(reasons.values()) else whole),
    )
