"""Calls of ops that nobody wrote a rule for: find one, or say why none is found."""

from __future__ import annotations

import warnings
from typing import Any

from autoparallel.discovery.discover import ProbeError, confirmed, discover
from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.disk_cache import key_of, load, store
from autoparallel.graph.graph import Graph
from autoparallel.rules.registry import find_rule, known_rule, remember, signature
from autoparallel.rules.rule import OpCall, ShardingRule

__all__ = ["find_unknown", "learn"]

_REASONS: dict[Any, str] = {}


def find_unknown(call: OpCall) -> tuple[ShardingRule | None, str]:
    """The rule of a call whose op has none, or None and why there is none: "the op ..."."""
    known = known_rule(call)
    if known is not None:
        return known, ""
    key = signature(call)
    if key not in _REASONS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = _cached(call).rule(call)
        except ProbeError as error:
            found, why = None, f"the op {error}"
        except Exception as error:  # run by the referee, ops may fail in any way: the plan says how
            found, why = None, f"the op cannot be probed: {type(error).__name__}: {error}"
        else:
            why = "the op's sizes follow no pattern that was found"
        if found is not None:
            remember(call, found)
            return found, ""
        _REASONS[key] = why
    return None, _REASONS[key]


def _cached(call: OpCall) -> DiscoveredRule:
    """The stored rule if it still holds; else a new one, which is stored. Raises ProbeError."""
    key = key_of(call)
    found = load(key)
    if found is None or not confirmed(found, call):
        found = discover(call)
        store(key, found)
    return found


def learn(graph: Graph) -> None:
    """Find the rules that a plan of this graph was made with, where it was made elsewhere."""
    for node in graph.calls:
        if find_rule(node.target) is None:
            find_unknown(OpCall.of(graph, node))
