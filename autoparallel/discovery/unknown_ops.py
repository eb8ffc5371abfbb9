"""Calls of ops that nobody wrote a rule for: one is found, or it is said why none is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoparallel.discovery.discover import (
    COMMUNICATES,
    DRAWS_RANDOM,
    ProbeError,
    require_probeable,
)
from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.disk_cache import (
    key_of,
    load,
    load_refusal,
    refusal_key,
    store,
    store_refusal,
)
from autoparallel.discovery.probe_processes import EndedError, is_only_here, rule_of
from autoparallel.discovery.shape_pattern import Probe
from autoparallel.discovery.trial import DRAWS, WRITES
from autoparallel.graph.graph import Dim
from autoparallel.graph.operators import draws
from autoparallel.rules.lookup import known_rule
from autoparallel.rules.registry import remember, signature
from autoparallel.rules.rule import Dims, OpCall, ShardingRule

__all__ = ["find_unknown", "is_lasting", "may_stay_whole", "whole_rule"]

# Why no rule was found, by the call's signature: an op is not probed twice.
_REASONS: dict[Any, str] = {}
# Ops that could not be tried in this process, and may be in the next one.
_NOT_TRIED: set[str] = set()


def find_unknown(call: OpCall) -> tuple[ShardingRule | None, str]:
    """Return the rule of a call whose op has none, and ""; or None, and why there is none:
    "the op ...".

    A written rule is returned as it is. A rule that was found is remembered for this process, and
    stored on disk for others.
    """
    known = known_rule(call)
    if known is not None:
        return known, ""
    key = signature(call)
    if key not in _REASONS:
        try:
            found, remark = _cached(call)
            discovered = found.rule(call)
            if discovered is not None and remark:
                discovered = replace(discovered, discovered=f"{discovered.discovered}; {remark}")
        except EndedError as error:
            # What the op does on parts cannot be known; whole, it runs as it does unsplit.
            discovered, why = whole_rule(call, f"the op {error}"), ""
            if not error.lasting:
                _NOT_TRIED.add(call.node.target)
        except ProbeError as error:
            discovered, why = None, f"the op {error}"
        except Exception as error:  # run by the referee, ops may fail in any way: the plan says how
            discovered, why = None, f"the op cannot be probed: {type(error).__name__}: {error}"
            _NOT_TRIED.add(call.node.target)
        else:
            why = "the op's sizes follow no pattern that was found"
        if discovered is not None:
            remember(call, discovered)
            return discovered, ""
        _REASONS[key] = why
    return None, _REASONS[key]


def is_lasting(target: str) -> bool:
    """Return whether another process would find out the same of an op as this one has.

    target: the op's name. A process that probes an op may be ended by the machine it is on.

    >>> is_lasting("aten.mm.default")
    True
    """
    return target not in _NOT_TRIED


def may_stay_whole(call: OpCall, why: str) -> bool:
    """Return whether every rank may run an op on whole tensors, which is right for any op that
    gives the same results wherever it is run, and does nothing else.

    why: why no rule of it was found, "" where none was looked for.
    """
    forbidden = (DRAWS, WRITES, DRAWS_RANDOM, COMMUNICATES)
    return not draws(call.node.target) and not any(reason in why for reason in forbidden)


def whole_rule(call: OpCall, why: str) -> ShardingRule:
    """Return the rule of a call of which every tensor stays whole.

    why: the reason, for the plan.
    """
    rows: list[Dims] = []
    sizes: dict[str, Dim] = {}
    for number, tensor in enumerate((*call.operands, *call.results)):
        names = [f"{number}.{dim}" for dim in range(len(tensor.shape))]
        sizes.update(zip(names, tensor.shape, strict=True))
        rows.append(tuple((name,) for name in names))
    count = len(call.operands)
    return ShardingRule(
        tuple(rows[:count]),
        tuple(rows[count:]),
        sizes,
        whole=frozenset(sizes),
        replicates=False,
        reasons=dict.fromkeys(sizes, why),
        discovered=f"whole: {why}",
    )


def _cached(call: OpCall) -> tuple[DiscoveredRule, str]:
    """Return the stored rule if it still holds; else a new one, which is stored.

    Also returns a remark for the plan, which is about this process alone. Raises ProbeError.
    """
    # By its schema alone, an op may be refused without a look at any file.
    require_probeable(Probe(call))
    key = key_of(call)
    stored = load(key)
    refusal = load_refusal(refusal_key(call)) if stored is None else None
    if refusal is not None:
        why, ended = refusal
        raise EndedError(why, lasting=True) if ended else ProbeError(why)
    try:
        discovered, remark = rule_of(call, stored)
    except ProbeError as error:
        ended = isinstance(error, EndedError)
        # A function of the user's may fail for reasons that no key knows of.
        if not is_only_here(call.node.target) and getattr(error, "lasting", True):
            store_refusal(refusal_key(call), str(error), ended)
        raise
    if discovered != stored:
        store(key, discovered)
    return discovered, remark
