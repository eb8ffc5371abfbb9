"""Rules for ops that have none: suggested by running the op on small tensors, then validated.

The op is run at small sizes that are as free of each other as it lets them be (`probe_sizes`).
Slices of its operands are changed to see which slices of its results change (`dependence`). That
proposes loops, and every strategy that follows from them is put on trial: split, run and join must
equal unsplit, forward and backward (`trial`). Strategies that fail are dropped; those that are left
are the rule.
"""

from __future__ import annotations

import torch

from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.probe_sizes import ProbeSizes, shrink
from autoparallel.discovery.rule_author import RuleAuthor
from autoparallel.discovery.shape_pattern import Probe, ProbeError
from autoparallel.discovery.size_choices import sorted_atoms
from autoparallel.discovery.trial import WRITES, Trial
from autoparallel.graph.operators import draws
from autoparallel.rules.rule import OpCall
from autoparallel.support.torch_private import schema_of

__all__ = [
    "COMMUNICATES",
    "DRAWS_RANDOM",
    "ProbeError",
    "confirmed",
    "discover",
    "require_probeable",
]

# Why an op is not probed, and may not be run by every rank on whole tensors either.
COMMUNICATES = "communicates by itself"
DRAWS_RANDOM = "draws random numbers, which every rank would draw differently"


def discover(call: OpCall, careful: bool = False) -> DiscoveredRule:
    """Return the rule of an op that has none, for every call of this shape pattern.

    call: one call of the op. It is run on the CPU, in float64 and, where it refuses that, in
    float32. careful: it is known to crash on some parts, which are tried in processes of their own.
    Raises ProbeError where the op cannot be probed: it fails, draws numbers, or writes.

    Example: `discover(OpCall.of(graph, node)).rule(other_call)`.
    """
    discovered = None
    errors = []
    # float64 tells wrong sums from rounding by ten more digits; some kernels have float32 alone.
    for dtype in (torch.float64, torch.float32):
        probe = Probe(call, dtype, careful)
        require_probeable(probe)
        try:
            discovered = _best(probe)
            break
        except ProbeError as error:
            errors.append(error)
            if not any(o.dtype.is_floating_point or o.dtype.is_complex for o in call.operands):
                break
    if discovered is None:
        raise errors[0]
    return discovered


def confirmed(discovered: DiscoveredRule, call: OpCall, careful: bool = False) -> bool:
    """Return whether a rule that was found before still holds, on one set of sizes.

    discovered: the rule, perhaps read from a file. call: the call that asks for it. careful: as in
    `discover`.
    """
    try:
        probe = Probe(call, getattr(torch, discovered.dtype), careful)
        shrunk = ProbeSizes(
            discovered.pattern, sorted_atoms(discovered.pattern, call), discovered.values
        )
        trial = Trial(probe, shrunk)
        rule = discovered.rule(trial.cases[0].call)
        if rule is None or discovered.rule(call) is None:
            return False
        choices = trial.strategies(trial.cases[0], rule, trial.tiles(rule, 2), 2)
        return not any(trial.wrong(trial.cases[0], rule, choice, 2) for choice in choices)
    except Exception:  # a file may say anything, and what it says may fit nothing
        return False


def require_probeable(probe: Probe) -> None:
    """Raise ProbeError for ops that no rule can help, by their schemas alone."""
    if draws(probe.call.node.target):
        raise ProbeError(DRAWS_RANDOM)
    if schema_of(probe.operation).is_mutable:
        raise ProbeError(WRITES)
    if "c10d" in probe.call.node.target.partition(".")[0]:
        raise ProbeError(COMMUNICATES)
    if not probe.call.operands:
        raise ProbeError("reads no tensors")


def _best(probe: Probe) -> DiscoveredRule:
    """Return the rule by the freest sizes or, where the op fails there or some loops stay whole,
    by tied ones.
    """
    shrunk = shrink(probe)
    try:
        freest = RuleAuthor(probe, shrunk).written()
    except ProbeError:
        if shrunk.tied is None:
            raise
        return RuleAuthor(probe, shrunk.tied).written()
    # Freed sizes may hide a loop that two dims share only where they are equal (a square product).
    if freest.whole and shrunk.tied is not None:
        tied_rule = RuleAuthor(probe, shrunk.tied).written()
        if _split_dims(tied_rule) > _split_dims(freest):
            return tied_rule
    return freest


def _split_dims(discovered: DiscoveredRule) -> int:
    """Return the number of dims that can be split: a measure of how much a rule allows."""
    whole = {name for name, _ in discovered.whole}
    rows = (*discovered.operands, *discovered.results)
    return sum(bool(set(names) - whole) for dims in rows for names in dims)
