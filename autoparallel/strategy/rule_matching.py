"""Which rule every call of a graph follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoparallel.discovery.unknown_ops import find_unknown
from autoparallel.errors import UnsupportedOpError
from autoparallel.graph.graph import Graph, Node, Ref, map_leaves
from autoparallel.graph.operators import draws
from autoparallel.options import Options
from autoparallel.rules.registry import find_rule
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = ["MatchedCall", "match_rules"]


@dataclass(frozen=True)
class MatchedCall:
    """What all calls of one signature share: rule, and everything derived from it."""

    call: OpCall
    rule: ShardingRule | None


def match_rules(
    graph: Graph, inert: set[str], options: Options, world_size: int
) -> dict[str, MatchedCall]:
    """One rule per distinct call, by node name. inert: calls that every rank computes whole.

    Raises UnsupportedOpError that lists every op without a rule that needs one.
    """
    kinds: dict[str, MatchedCall] = {}
    known: dict[Any, MatchedCall] = {}
    missing: dict[str, list[Node]] = {}
    reasons: dict[str, str] = {}
    values = graph.values

    def shape_of(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            value = values[leaf.name]
            return (value.shape, value.dtype, value.requires_grad)
        return (type(leaf).__name__, leaf)

    for node in graph.calls:
        names = node.operands()
        twins = tuple(names.index(name) for name in names)
        key = (
            node.target,
            map_leaves(shape_of, node.args),
            map_leaves(shape_of, node.kwargs),
            tuple(result.shape for result in node.results),
            twins,
            node.name in inert,
        )
        if key not in known:
            call = OpCall.of(graph, node)
            made = None
            author = find_rule(node.target)
            if author is not None and node.name not in inert:
                made = author(call)
            if author is None and world_size > 1:
                made, why = _unwritten(call, inert, options)
                grad = any(result.requires_grad for result in node.results)
                if made is None and (grad or draws(node.target)):
                    missing.setdefault(node.target, []).append(node)
                    reasons.setdefault(node.target, why)
            known[key] = MatchedCall(call, made)
        elif node.target in missing:
            missing[node.target].append(node)
        kinds[node.name] = known[key]
    if options.unknown_ops == "replicate":
        missing = {target: nodes for target, nodes in missing.items() if draws(target)}
    if missing:
        raise _unsupported(missing, reasons)
    return kinds


def _unwritten(call: OpCall, inert: set[str], options: Options) -> tuple[ShardingRule | None, str]:
    """The rule of a call whose op has none, if it is to be discovered and can be."""
    if options.unknown_ops != "discover" or call.node.name in inert:
        return None, ""
    return find_unknown(call)


def _unsupported(
    missing: Mapping[str, list[Node]], reasons: Mapping[str, str]
) -> UnsupportedOpError:
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
    return UnsupportedOpError(
        f"no sharding rule for {', '.join(sorted(missing))}{discovered}",
        where="\n".join(rows),
        why="\n".join(why),
        fix="register a rule (autoparallel.rules.registry.rule), or pass unknown_ops='replicate' "
        "to keep their tensors whole",
    )
