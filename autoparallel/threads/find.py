"""Follows every dim of every value of a graph through the loops of its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from autoparallel.graph.graph import Graph, Node
from autoparallel.placement import Partial
from autoparallel.rules.lookup import known_rule
from autoparallel.rules.registry import signature
from autoparallel.rules.rule import Dims, Kernel, OpCall, ShardingRule
from autoparallel.threads.all_threads import Threads
from autoparallel.threads.factors import Factors
from autoparallel.threads.thread import Birth, Passage, Place, Thread, Treatment
from autoparallel.threads.thread_names import InputNames, Namer

__all__ = ["find_threads"]

RuleOf = Callable[[OpCall], ShardingRule | None]


def find_threads(
    graph: Graph,
    inputs: InputNames | None = None,
    rule_of: RuleOf = known_rule,
) -> Threads:
    """Return the threads of a graph whose passes have run.

    inputs: the user's name of each input, by its node, which threads that come from inputs are
    called by. rule_of: what finds the rule of a call; by default the written rules, and those that
    were discovered in this process. A call without a rule ends what it reads and begins what it
    makes.

    Example: `find_threads(plan.captured.graph)`; see also `Plan.threads`.
    """
    return _Search(graph, rule_of).threads(inputs or {})


class _Search:
    """A search for the threads of one graph.

    dims: the factor of each dim of each value; None for a dim of size 1. loops: by call and loop
    the loop's factor.
    """

    def __init__(self, graph: Graph, rule_of: RuleOf) -> None:
        self.graph = graph
        self.factors = Factors()
        self.dims: dict[str, tuple[int | None, ...]] = {
            name: tuple(None if size == 1 else self.factors.new(size) for size in value.shape)
            for name, value in graph.values.items()
        }
        self.calls = {node.name: OpCall.of(graph, node) for node in graph.calls}
        self.rules = _rules(self.calls.values(), rule_of)
        self.loops: dict[str, dict[str, int]] = {}
        for name, call in self.calls.items():
            rule = self.rules[name]
            if rule is not None:
                self.loops[name] = self.connect(call, rule)

    def connect(self, call: OpCall, rule: ShardingRule) -> dict[str, int]:
        """Make each dim of the call's tensors the product of its loops; return the loops."""
        loops = {loop: self.factors.new(rule.sizes[loop]) for loop in rule.loops}
        tensors = (*call.operands, *call.results)
        for value, dims in zip(tensors, (*rule.operands, *rule.results), strict=True):
            for factor, names in zip(self.dims[value.name], dims, strict=False):
                if factor is not None and names:
                    self.factors.unify([factor], [loops[loop] for loop in names])
        return loops

    def threads(self, inputs: InputNames) -> Threads:
        """Return the threads, when every call has been connected."""
        numbers: dict[int, int] = {}

        def numbered(factors: Iterable[int]) -> tuple[int, ...]:
            """Return the numbers of the threads in a product; new ones for new threads."""
            return tuple(
                numbers.setdefault(leaf, len(numbers)) for leaf in self.factors.leaves(factors)
            )

        dims = {
            name: tuple(numbered([factor] if factor is not None else []) for factor in factors)
            for name, factors in self.dims.items()
        }
        passages: dict[str, tuple[Passage, ...]] = {}
        of_thread: dict[int, list[Passage]] = {}
        for name, call in self.calls.items():
            passages[name] = tuple(self.passages(call, dims, numbered))
            for passage in passages[name]:
                for number in dict.fromkeys(passage.threads):
                    of_thread.setdefault(number, []).append(passage)
        places: dict[int, list[Place]] = {number: [] for number in numbers.values()}
        for name, rows in dims.items():
            for dim, row in enumerate(rows):
                for inner, number in enumerate(row):
                    places[number].append(Place(name, dim, inner))
        births = self.births(dims)
        nodes = {node.name: node for node in self.graph.nodes}
        unnamed = tuple(
            Thread(
                number,
                "",
                self.factors.sizes[leaf],
                _common(nodes[passage.call] for passage in of_thread.get(number, ())),
                tuple(births.get(number, ())),
                tuple(places[number]),
                tuple(of_thread.get(number, ())),
            )
            for leaf, number in numbers.items()
        )
        threads = Namer(self.graph, unnamed, self.rules, inputs).named()
        return Threads(self.graph, threads, dims, passages)

    def passages(
        self,
        call: OpCall,
        dims: Mapping[str, tuple[tuple[int, ...], ...]],
        numbered: Callable[[Iterable[int]], tuple[int, ...]],
    ) -> Iterable[Passage]:
        """Yield what a call does with its loops, then the dims of its operands without a loop."""
        name, rule = call.node.name, self.rules[call.node.name]
        if rule is not None:
            for loop, factor in self.loops[name].items():
                operands, results = _where(rule.operands, loop), _where(rule.results, loop)
                kernel = rule.kernels.get(loop) or _together(rule, loop)
                if loop in rule.whole and kernel is None:
                    treatment = Treatment.WHOLE
                elif kernel is not None:
                    treatment = Treatment.KERNEL
                else:
                    treatment = Treatment.FREE if results else Treatment.SUMMED
                having = {position for position, _ in operands}
                summed = (
                    value.name
                    for position, value in enumerate(call.operands)
                    if value.requires_grad and position not in having and loop not in rule.whole
                )
                yield Passage(
                    name,
                    loop,
                    numbered([factor]),
                    treatment,
                    operands,
                    results,
                    tuple(dict.fromkeys(summed)),
                    kernel is None or isinstance(kernel.result, Partial),
                    kernel.name if kernel else "",
                    tuple(kind for kind, _ in kernel.collectives) if kernel else (),
                    rule.reasons.get(loop, ""),
                )
        reason = "" if rule is not None else "the call has no rule"
        for position, value in enumerate(call.operands):
            for dim, numbers in enumerate(dims[value.name]):
                if numbers and (rule is None or not rule.operands[position][dim]):
                    at = ((position, dim),)
                    yield Passage(name, "", numbers, Treatment.WHOLE, at, (), reason=reason)

    def births(self, dims: Mapping[str, tuple[tuple[int, ...], ...]]) -> dict[int, list[Birth]]:
        """Return where each thread begins, by its number."""
        births: dict[int, list[Birth]] = {}
        for node in self.graph.nodes:
            brought: set[int] = set()
            if node.kind == "call":
                for name in node.operands():
                    brought.update(number for row in dims[name] for number in row)
            for value in node.results:
                for dim, row in enumerate(dims[value.name]):
                    for number in row:
                        if number not in brought:
                            path = node.target if node.kind in _STORED else node.name
                            birth = Birth(node.kind, node.name, path, dim)
                            births.setdefault(number, []).append(birth)
        return births


def _together(rule: ShardingRule, loop: str) -> Kernel | None:
    """Return the kernel that splits a loop with another one, and not by itself; None for none."""
    if loop not in rule.whole:
        return None
    exchanges = rule.exchanges.values()
    return next((each.kernel for each in exchanges if loop in each.loops), None)


_STORED = ("parameter", "buffer")


def _rules(calls: Iterable[OpCall], rule_of: RuleOf) -> dict[str, ShardingRule | None]:
    """Return the rule of every call, found once for all that are alike."""
    known: dict[Any, ShardingRule | None] = {}
    rules: dict[str, ShardingRule | None] = {}
    for call in calls:
        key = signature(call)
        if key not in known:
            known[key] = rule_of(call)
        rules[call.node.name] = known[key]
    return rules


def _where(tensors: Sequence[Dims], loop: str) -> tuple[tuple[int, int], ...]:
    """Return the (tensor, dim) of each dim that has the loop."""
    return tuple(
        (position, dim)
        for position, dims in enumerate(tensors)
        for dim, names in enumerate(dims)
        if loop in names
    )


def _common(nodes: Iterable[Node]) -> str:
    """Return the path of the innermost module that all nodes are in."""
    common: list[str] | None = None
    for node in nodes:
        parts = node.where.split(".") if node.where else []
        if common is None:
            common = parts
        else:
            same = 0
            while same < min(len(common), len(parts)) and common[same] == parts[same]:
                same += 1
            common = common[:same]
    return ".".join(common or ())
