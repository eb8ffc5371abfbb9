"""A rule that was discovered: data alone, for every call of one shape pattern."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoparallel.discovery.shape_pattern import (
    Pattern,
    Term,
    Values,
    integers_of,
    replace_integers,
)
from autoparallel.graph.graph import Dim, Sym, hint, leaves
from autoparallel.placement import Collective, parse_placement
from autoparallel.rules.rule import Dims, Kernel, OpCall, Shapes, ShardingRule

__all__ = ["DiscoveredKernel", "DiscoveredRule", "Follows", "notation"]


@dataclass(frozen=True, slots=True)
class Follows:
    """An integer argument (counted among those of the call) that shrinks with a result's dim."""

    integer: int
    result: int
    dim: int


@dataclass(frozen=True, slots=True)
class DiscoveredKernel:
    """A generic kernel, told which operands and dims it is about.

    result: placement of every result. gathers: whether the results of all parts are gathered.
    """

    name: str
    result: str
    arguments: tuple[tuple[str, Any], ...] = ()
    gathers: bool = False


@dataclass(frozen=True)
class DiscoveredRule:
    """The loop nest of an op, found by trial, for calls that follow `pattern`.

    loops: their sizes; factor 0 where it is whatever the dim is. whole: loops that cannot be split,
    and why. linear: as in ShardingRule. follows: integers that follow a local size. kernels: per
    loop. takes_empty: as in ShardingRule. values, dtype: what the
    op was probed with. note: what else is worth knowing.
    """

    target: str
    pattern: Pattern
    loops: tuple[tuple[str, Term], ...]
    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    whole: tuple[tuple[str, str], ...] = ()
    linear: tuple[tuple[int, ...], ...] = ()
    follows: tuple[Follows, ...] = ()
    kernels: tuple[tuple[str, DiscoveredKernel], ...] = ()
    takes_empty: bool = False
    values: Values = field(default_factory=Values)
    dtype: str = "float64"
    note: str = ""

    def rule(self, call: OpCall) -> ShardingRule | None:
        """The rule of a call that follows the pattern; None for another."""
        atoms = self.pattern.solve(call)
        if atoms is None:
            return None
        tensors = (*call.operands, *call.results)
        rows = (*self.operands, *self.results)
        if len(call.results) != len(self.results) or any(
            len(dims) != len(tensor.shape) for dims, tensor in zip(rows, tensors, strict=True)
        ):
            return None
        sizes: dict[str, Dim] = {name: term.of(atoms) for name, term in self.loops if term.factor}
        for dims, tensor in zip(rows, tensors, strict=True):
            for names, size in zip(dims, tensor.shape, strict=True):
                if len(names) == 1:
                    sizes.setdefault(names[0], size)
        for dims, tensor in zip(rows, tensors, strict=True):
            for names, size in zip(dims, tensor.shape, strict=True):
                if not _is_product(names, sizes, size):
                    return None
        reasons = dict(self.whole)
        for name in self.stuck(call):
            reasons.setdefault(name, "an integer argument follows a size that is not known")
        made = ShardingRule(
            self.operands,
            self.results,
            sizes,
            whole=frozenset(reasons),
            linear=tuple(map(frozenset, self.linear)),
            kernels={loop: self.kernel(kernel, call) for loop, kernel in self.kernels},
            local_args=self.local_args if self.follows else None,
            takes_empty=self.takes_empty,
            reasons=reasons,
        )
        words = "; ".join(text for text in (notation(made), self.note) if text)
        return replace(made, discovered=words)

    def stuck(self, call: OpCall) -> list[str]:
        """Loops that cannot be split in this call: an integer is no multiple of a symbol."""
        integers = integers_of(call)
        found: list[str] = []
        for follows in self.follows:
            size = call.results[follows.result].shape[follows.dim]
            if isinstance(size, Sym) and integers[follows.integer] != size:
                found += self.results[follows.result][follows.dim]
        return found

    def kernel(self, kernel: DiscoveredKernel, call: OpCall) -> Kernel:
        nbytes = 0
        for result in call.results:
            count = result.dtype.itemsize
            for size in result.shape:
                count *= hint(size)
            nbytes += count
        collectives = ((Collective.ALL_GATHER, 2 * nbytes),) if kernel.gathers else ()
        return Kernel(
            kernel.name,
            parse_placement(kernel.result),
            collectives,
            (("operation", call.node.target), *kernel.arguments),
        )

    def local_args(self, call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
        """The args, with the integers that follow a size in proportion to its local part."""
        integers: list[Any] = list(integers_of(call))
        for follows in self.follows:
            whole: Dim = integers[follows.integer]
            size = call.results[follows.result].shape[follows.dim]
            local = shapes[follows.result][follows.dim]
            if whole == size:
                integers[follows.integer] = local
            elif not isinstance(whole, Sym) and isinstance(local, int):
                integers[follows.integer] = whole * local // hint(size)
        made: tuple[Any, ...] = replace_integers(call.node.args, iter(integers))
        return made

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return {
            "target": self.target,
            "pattern": [
                [[_row(term) for term in row] for row in self.pattern.operands],
                [_row(term) for term in self.pattern.integers],
            ],
            "loops": {name: _row(term) for name, term in self.loops},
            "operands": self.operands,
            "results": self.results,
            "whole": dict(self.whole),
            "linear": self.linear,
            "follows": [[each.integer, each.result, each.dim] for each in self.follows],
            "kernels": {
                loop: [kernel.name, kernel.result, kernel.arguments, kernel.gathers]
                for loop, kernel in self.kernels
            },
            "takes_empty": self.takes_empty,
            "values": [
                self.values.low,
                self.values.high,
                self.values.signs,
                [None if bound is None else _row(bound) for bound in self.values.bounds],
            ],
            "dtype": self.dtype,
            "note": self.note,
        }

    @staticmethod
    def from_json(rows: Mapping[str, Any]) -> DiscoveredRule:
        """The rule that was written. Raises KeyError, TypeError or ValueError for another text."""
        operands, integers = rows["pattern"]
        return DiscoveredRule(
            target=rows["target"],
            pattern=Pattern(
                tuple(tuple(_term(item) for item in row) for row in operands),
                tuple(_term(item) for item in integers),
            ),
            loops=tuple((name, _term(item)) for name, item in rows["loops"].items()),
            operands=_tuples(rows["operands"]),
            results=_tuples(rows["results"]),
            whole=tuple(rows["whole"].items()),
            linear=_tuples(rows["linear"]),
            follows=tuple(Follows(*item) for item in rows["follows"]),
            kernels=tuple(
                (loop, DiscoveredKernel(name, result, _tuples(arguments), gathers))
                for loop, (name, result, arguments, gathers) in rows["kernels"].items()
            ),
            takes_empty=bool(rows["takes_empty"]),
            values=_values(*rows["values"]),
            dtype=rows["dtype"],
            note=rows["note"],
        )

    def __str__(self) -> str:
        return json.dumps(self.to_json())


def _is_product(names: tuple[str, ...], sizes: Mapping[str, Dim], size: Dim) -> bool:
    product = 1
    for name in names:
        if name not in sizes:
            return False
        product *= hint(sizes[name])
    return product == hint(size)


def _row(term: Term) -> list[Any]:
    return [term.factor, list(term.atoms)]


def _term(item: Any) -> Term:
    factor, atoms = item
    return Term(int(factor), tuple(int(atom) for atom in atoms))


def _values(low: float, high: float, signs: bool, bounds: list[Any]) -> Values:
    terms = (None if bound is None else _term(bound) for bound in bounds)
    return Values(low, high, signs, tuple(terms))


def _tuples(item: Any) -> Any:
    return tuple(map(_tuples, item)) if isinstance(item, (list, tuple)) else item


def notation(rule: ShardingRule) -> str:
    """The rule in einsum-like words: "a b, c b -> a c; b summed".

    (a b) is a dim that merges loops, 1 a dim without one.
    """
    names = {loop: _letter(index) for index, loop in enumerate(rule.loops)}

    def word(loops: tuple[str, ...]) -> str:
        text = " ".join(names[loop] for loop in loops)
        return f"({text})" if len(loops) > 1 else text or "1"

    sides = (
        ", ".join(" ".join(map(word, dims)) or "()" for dims in tensors)
        for tensors in (rule.operands, rule.results)
    )
    in_results = set(leaves(rule.results))
    free = [loop for loop in rule.loops if loop not in rule.whole]
    summed = [names[loop] for loop in free if loop not in in_results and loop not in rule.kernels]
    parts = [" -> ".join(sides)]
    if summed:
        parts.append(f"{' '.join(summed)} summed")
    if rule.kernels:
        parts += [f"{names[loop]} by {kernel.name}" for loop, kernel in rule.kernels.items()]
    if rule.whole:
        parts.append(f"{' '.join(names[loop] for loop in rule.loops if loop in rule.whole)} whole")
    if rule.linear:
        groups = ["+".join(str(index) for index in sorted(group)) for group in rule.linear]
        parts.append(f"linear in {', '.join(groups)}")
    return "; ".join(parts)


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else f"a{index}"
