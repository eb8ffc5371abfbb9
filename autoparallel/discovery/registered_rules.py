"""Rules that were registered from outside are proven before a plan uses them.

The op is run at small sizes, as for an op without a rule, and every strategy that follows from the
rule is put on trial there. The rule must have the same loops at these sizes as at the call's own:
what was proven is then what is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from autoparallel.discovery.discover import ProbeError, require_probeable
from autoparallel.discovery.probe_processes import EndedError, in_fork
from autoparallel.discovery.probe_sizes import ProbeSizes, shrink
from autoparallel.discovery.shape_pattern import Probe
from autoparallel.discovery.strategy_validation import Example
from autoparallel.discovery.trial import Trial
from autoparallel.errors import RuleError
from autoparallel.graph.graph import Sym, hint, numel_hint
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.registry import signature
from autoparallel.rules.rule import Dims, OpCall, ShardingRule
from autoparallel.rules.user_rules import needs_proof, written_at

__all__ = ["require_proven", "why_unproven"]

# Up to so many elements of all operands, a rule is also proven at the sizes of the call itself.
_MOST_ELEMENTS = 1 << 17
# The reasons against rules, "" for proven ones, by the function that states the rule and the call's
# signature: a function that takes its place is proven anew.
_PROVEN: dict[Any, str] = {}


def require_proven(calls: Iterable[OpCall]) -> None:
    """Prove the rules that users registered for the ops of all calls.

    calls: those of a graph; each op is reported once. Rules of the project, and trusted ones, are
    not tried. Raises RuleError that lists every wrong rule, with where it is written.
    """
    wrong: dict[str, str] = {}
    for call in calls:
        target = call.node.target
        if needs_proof(target) and target not in wrong:
            why = why_unproven(call)
            if why:
                wrong[target] = f"{why}\nfor the call {call.node}"
    if wrong:
        several = len(wrong) > 1
        raise RuleError(
            f"the sharding rule{'s' if several else ''} of {', '.join(wrong)} cannot be used",
            where="\n".join(f"{target}: {written_at(target)}" for target in wrong),
            why="\n".join(f"{target}: {why}" for target, why in wrong.items()),
            fix="correct the rule (examples/custom_rule.py), or register none: "
            "unknown_ops='discover' finds one by trial",
        )


def why_unproven(call: OpCall) -> str:
    """Return the reason why the rule of a call must not be used; "" where every strategy is right.

    It is remembered: a call of the same shapes and types is not tried again.
    """
    key = (find_rule(call.node.target), signature(call))
    if key not in _PROVEN:
        try:
            # The rule may be wrong, and the op trust its numbers: a part may make it crash.
            reason, _ = in_fork(lambda _: _why_unproven(call).encode())
            _PROVEN[key] = reason.decode()
        except EndedError as error:
            _PROVEN[key] = f"the op {error}"
    return _PROVEN[key]


def _why_unproven(call: OpCall) -> str:
    """Return the reason, by trying the rule's strategies at several small sizes.

    One type and one kind of sizes at which all of them are right is a proof, and one wrong strategy
    is a refutation; what the op does not run on is neither.
    """
    author = find_rule(call.node.target)
    assert author is not None
    try:
        rule = author(call)
    except RuleError as error:
        return error.why or error.what
    why = _misfit(rule, call)
    if why:
        return why
    # These change which kernel runs or how a plan fuses; running the op alone shows nothing of it.
    claims = [name for name in ("takes_bias", "adds", "random") if getattr(rule, name)]
    if claims:
        return (
            f"{' and '.join(claims)} cannot be proven by running the op (trusted=True leaves "
            "the proof out)"
        )
    reasons: dict[str, None] = {}
    # In float64, rounding is far below what a wrong strategy changes; some ops take float32 alone.
    for dtype in (torch.float64, torch.float32):
        try:
            probe = Probe(call, dtype)
            require_probeable(probe)
            sizes = list(_sizes(probe))
        except ProbeError as error:
            reasons[f"the op {error}"] = None
            continue
        for small in sizes:
            try:
                why = _wrong_strategy(rule, Trial(probe, small))
            except _OtherFormError:
                reasons["at small sizes the rule has other loops than for this call"] = None
            except RuleError as error:
                reasons[error.why or error.what] = None
            except ProbeError as error:
                cause = error.__cause__
                reasons[cause.why if isinstance(cause, RuleError) else f"the op {error}"] = None
            else:
                return why
    return (
        "it cannot be proven on small tensors: "
        + "; ".join(reasons)
        + " (trusted=True leaves the proof out)"
    )


class _OtherFormError(Exception):
    """Raised where, at the sizes of a trial, the rule has another form than for the call."""


def _sizes(probe: Probe) -> Iterator[ProbeSizes]:
    """Yield the sizes to try: the freest, those tied as the call's are, the call's own if small.

    Free sizes are all different, so that a dim cannot pass for another one. Some ops run only where
    sizes are tied to each other as in the call.
    """
    shrunk = shrink(probe)
    yield shrunk
    if shrunk.tied is not None:
        yield shrunk.tied
    if sum(numel_hint(operand.shape) for operand in probe.call.operands) <= _MOST_ELEMENTS:
        yield ProbeSizes(probe.own(), (), (shrunk.tied or shrunk).values)


def _wrong_strategy(rule: ShardingRule, trial: Trial) -> str:
    """Return a sentence on the first wrong strategy, "" if all are right.

    Raises _OtherFormError where the rule has another form at the sizes of the trial, so that what
    is right there says nothing of the call.
    """
    for example, ranks in _cases(trial):
        author = find_rule(example.node.target)
        assert author is not None
        small = author(example.call)
        why = _misfit(small, example.call)
        if why or _form(small) != _form(rule):
            raise _OtherFormError
        for world_size in ranks:
            tiles = trial.tiles(small, world_size)
            for strategy in trial.strategies(example, small, tiles, world_size):
                wrong = trial.wrong(example, small, strategy, world_size, twice=True)
                if wrong:
                    split = f"split along {strategy.tile.loop!r}" if strategy.tile else "run"
                    return (
                        f"{split} as {strategy} on {world_size} ranks, the op does not give what "
                        f"it gives unsplit: {wrong}"
                    )
    return ""


def _cases(trial: Trial) -> Iterator[tuple[Example, tuple[int, ...]]]:
    """Yield calls, and the numbers of ranks to try them on.

    Sizes are small: of 4 ranks some have no elements, and 3 have parts of unequal sizes.
    """
    yield trial.cases[0], (2, 4)
    yield trial.cases[1], (3,)
    for case in trial.final():
        yield case.example, case.ranks


def _form(rule: ShardingRule) -> Any:
    """Return all of a rule that strategies follow from, except for the sizes."""
    # A kernel's arguments and bytes depend on the sizes, and its name does not.
    kernels = {loop: kernel.name for loop, kernel in rule.kernels.items()}
    loops = (rule.operands, rule.results, rule.whole, frozenset(rule.linear))
    return (*loops, kernels, rule.grain, rule.takes_empty, rule.local_args is None)


def _misfit(rule: ShardingRule, call: OpCall) -> str:
    """Return a sentence on how the rule's loops do not fit the call; "" where they do.

    Users' rules may be a ShardingRule made by hand, which nobody has checked.
    """
    for kind, rows, values in (
        ("operand", rule.operands, call.operands),
        ("result", rule.results, call.results),
    ):
        if len(rows) != len(values):
            return f"it has {len(rows)} {kind}s, and the call {len(values)}"
        for index, (dims, value) in enumerate(zip(rows, values, strict=True)):
            if not _fits(rule, dims, value.shape):
                return f"its loops for {kind} {index} do not make up {value}"
    unknown = [i for group in rule.linear for i in group if not 0 <= i < len(call.operands)]
    if unknown:
        return f"linear names operand {unknown[0]}, and there are {len(call.operands)}"
    loops = dict.fromkeys((*rule.whole, *rule.kernels, *rule.grain))
    strange = [name for name in loops if name not in rule.sizes]
    return f"it names a loop {strange[0]!r} that no tensor has" if strange else ""


def _fits(rule: ShardingRule, dims: Dims, shape: tuple[Any, ...]) -> bool:
    """Return whether each dim of a shape is the product of its loops.

    A symbolic dim that is one loop must be that symbol; as a product it is compared by its value
    for the example inputs.
    """
    if len(dims) != len(shape):
        return False
    for names, size in zip(dims, shape, strict=True):
        if any(name not in rule.sizes for name in names):
            return False
        if len(names) == 1 and isinstance(size, Sym):
            if rule.sizes[names[0]] != size:
                return False
            continue
        product = 1
        for name in names:
            product *= hint(rule.sizes[name])
        if product != hint(size):
            return False
    return True
