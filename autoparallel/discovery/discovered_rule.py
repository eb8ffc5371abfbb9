"""A discovered rule: data alone, for every call of one shape pattern, with JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autoparallel.discovery.shape_pattern import (
    Pattern,
    Term,
    Values,
    integers_of,
    replace_integers,
)
from autoparallel.graph.graph import Dim, Sym, hint, numel_hint
from autoparallel.placement import Collective, parse_placement
from autoparallel.rules.notation import notation
from autoparallel.rules.rule import Dims, Kernel, OpCall, Shapes, ShardingRule
from autoparallel.runtime import discovered_kernels
from autoparallel.runtime.kernels import kernel_arguments

__all__ = ["DiscoveredKernel", "DiscoveredRule", "Follows"]


@dataclass(frozen=True, slots=True)
class Follows:
    """An integer argument that shrinks with a result's dim when that
    dim is split (a number of groups, say).

    integer: counted among those of the call. result, dim: whose local size it follows.
    """

    integer: int
    result: int
    dim: int


@dataclass(frozen=True, slots=True)
class DiscoveredKernel:
    """A generic kernel (runtime/discovered_kernels.py), told which operands and dims it is about.

    name: of the function. result: placement of every result, as text. arguments: for the function,
    by name. gathers: whether the results of all parts are gathered.
    """

    name: str
    result: str
    arguments: tuple[tuple[str, Any], ...] = ()
    gathers: bool = False


@dataclass(frozen=True)
class DiscoveredRule:
    """The loop nest of an op, found by trial, for calls that follow `pattern`.

    target: the op. pattern: how the call's sizes follow from independent ones. loops: their sizes;
    factor 0 where a loop has whatever size the dim has. operands, results: as in ShardingRule.
    whole: loops that cannot be split, and why. linear: as in ShardingRule. follows: integers that
    follow a local size. kernels: per loop. takes_empty: as in ShardingRule. values, dtype: numbers
    and type that the op was probed with. note: words for the plan.
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
    replicates: bool = True
    takes_empty: bool = False
    values: Values = field(default_factory=Values)
    dtype: str = "float64"
    note: str = ""

    def rule(self, call: OpCall) -> ShardingRule | None:
        """Return the rule of a call that follows the pattern; None for another."""
        atoms = self.pattern.solve(call)
        if atoms is None:
            return None
        tensors = (*call.operands, *call.results)
        rows = (*self.operands, *self.results)
        if len(call.results) != len(self.results) or any(
            len(dims) != len(tensor.shape) for dims, tensor in zip(rows, tensors, strict=True)
        ):
            return None
        # Loops of factor 0 follow no size of the pattern: they are read off the dim below.
        sizes: dict[str, Dim] = {name: term.of(atoms) for name, term in self.loops if term.factor}
        for dims, tensor in zip(rows, tensors, strict=True):
            for names, size in zip(dims, tensor.shape, strict=True):
                if len(names) == 1:
                    sizes.setdefault(names[0], size)
        for dims, tensor in zip(rows, tensors, strict=True):
            for names, size in zip(dims, tensor.shape, strict=True):
                # The call follows the pattern by its operands; its results must agree.
                if not _is_product(names, sizes, size):
                    return None
        reasons = dict(self.whole)
        for name in self.stuck(call):
            reasons.setdefault(name, "an integer argument follows a size that is not known")
        rule_of_call = ShardingRule(
            self.operands,
            self.results,
            sizes,
            whole=frozenset(reasons),
            linear=tuple(map(frozenset, self.linear)),
            kernels={loop: self.kernel(kernel, call) for loop, kernel in self.kernels},
            local_args=self.local_args if self.follows else None,
            replicates=self.replicates,
            takes_empty=self.takes_empty,
            reasons=reasons,
        )
        bent = "" if self.replicates else "its backward takes no summands of a gradient"
        words = "; ".join(text for text in (notation(rule_of_call), bent, self.note) if text)
        return replace(rule_of_call, discovered=words)

    def stuck(self, call: OpCall) -> list[str]:
        """Return loops that cannot be split in this call,
        because an integer is no multiple of a symbolic size.
        """
        integers = integers_of(call)
        loops: list[str] = []
        for follows in self.follows:
            size = call.results[follows.result].shape[follows.dim]
            if isinstance(size, Sym) and integers[follows.integer] != size:
                loops += self.results[follows.result][follows.dim]
        return loops

    def kernel(self, kernel: DiscoveredKernel, call: OpCall) -> Kernel:
        """Return the kernel as a rule has it, with the bytes that it gathers in this call."""
        nbytes = 0
        for result in call.results:
            nbytes += result.dtype.itemsize * numel_hint(result.shape)
        # As many results are gathered as there are ranks, which a rule does not know: priced as
        # two.
        collectives = ((Collective.ALL_GATHER, 2 * nbytes),) if kernel.gathers else ()
        return Kernel(
            kernel.name,
            parse_placement(kernel.result),
            collectives,
            (("operation", call.node.target), *kernel.arguments),
        )

    def local_args(self, call: OpCall, shapes: Shapes) -> tuple[Any, ...]:
        """Return the args, with the integers that follow a size in proportion to its local part."""
        integers: list[Any] = list(integers_of(call))
        for follows in self.follows:
            whole: Dim = integers[follows.integer]
            size = call.results[follows.result].shape[follows.dim]
            local = shapes[follows.result][follows.dim]
            if whole == size:
                integers[follows.integer] = local
            elif not isinstance(whole, Sym) and isinstance(local, int):
                # In proportion: a number of groups shrinks with the channels.
                integers[follows.integer] = whole * local // hint(size)
        args: tuple[Any, ...] = replace_integers(call.node.args, iter(integers))
        return args

    def to_json(self) -> dict[str, Any]:
        """Return the rule as plain lists and dicts. Inverse of `from_json`."""
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
            "replicates": self.replicates,
            "takes_empty": self.takes_empty,
            "values": [
                self.values.low,
                self.values.high,
                self.values.signs,
                [None if bound is None else _row(bound) for bound in self.values.bounds],
                self.values.meanings,
            ],
            "dtype": self.dtype,
            "note": self.note,
        }

    @staticmethod
    def from_json(rows: Mapping[str, Any]) -> DiscoveredRule:
        """Return the rule that was written.

        Raises KeyError, TypeError or ValueError for another text. What it names must be known: the
        names of kernels and of their arguments reach the text of programs.
        """
        operands, integers = rows["pattern"]
        dtype = _text(rows["dtype"])
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{dtype!r:.60} is no dtype")
        return DiscoveredRule(
            target=_text(rows["target"]),
            pattern=Pattern(
                tuple(tuple(_term(item) for item in row) for row in operands),
                tuple(_term(item) for item in integers),
            ),
            loops=tuple((_text(name), _term(item)) for name, item in rows["loops"].items()),
            operands=_dims(rows["operands"]),
            results=_dims(rows["results"]),
            whole=tuple((_text(name), _text(why)) for name, why in rows["whole"].items()),
            linear=tuple(tuple(map(_count, group)) for group in rows["linear"]),
            follows=tuple(Follows(*map(_count, item)) for item in rows["follows"]),
            kernels=tuple((loop, _kernel(*item)) for loop, item in rows["kernels"].items()),
            replicates=bool(rows["replicates"]),
            takes_empty=bool(rows["takes_empty"]),
            values=_values(*rows["values"]),
            dtype=dtype,
            note=_text(rows["note"]),
        )

    def __str__(self) -> str:
        return json.dumps(self.to_json())


def _is_product(names: tuple[str, ...], sizes: Mapping[str, Dim], size: Dim) -> bool:
    """Return whether the loops' sizes multiply to the dim's, for the example inputs."""
    product = 1
    for name in names:
        if name not in sizes:
            return False
        product *= hint(sizes[name])
    return product == hint(size)


def _row(term: Term) -> list[Any]:
    """Return a size as JSON. Inverse of `_term`."""
    return [term.factor, list(term.atoms)]


def _term(item: Any) -> Term:
    """Return the size that was written as JSON.

    Raises TypeError or ValueError for anything else.
    """
    factor, atoms = item
    if type(factor) is not int:
        raise TypeError(f"{factor!r:.60} is no whole number")
    return Term(factor, tuple(map(_count, atoms)))


def _values(low: float, high: float, signs: bool, bounds: list[Any], meanings: list[str]) -> Values:
    """Return the numbers that an op was probed with, from JSON.

    Numbers that are all alike would prove any rule.
    """
    if not 0 <= low < high < 1e6:
        raise ValueError(f"no numbers lie between {low} and {high}")
    terms = (None if bound is None else _term(bound) for bound in bounds)
    return Values(low, high, bool(signs), tuple(terms), meanings=tuple(map(_text, meanings)))


def _kernel(name: str, result: str, arguments: Any, gathers: bool) -> DiscoveredKernel:
    """Return a kernel from JSON. Raises ValueError for one, or for an argument, that is unknown."""
    known = kernel_arguments(_text(name)) - {"operation"}
    if name not in discovered_kernels.__all__:
        raise ValueError(f"{name} is no kernel of ops without a rule")
    parse_placement(_text(result))
    pairs = tuple((_text(key), _numbers(value)) for key, value in arguments)
    if {key for key, _ in pairs} - known:
        raise ValueError(f"{name} has other arguments: {', '.join(sorted(known))}")
    return DiscoveredKernel(name, result, pairs, bool(gathers))


def _text(item: Any) -> str:
    """Return a text. Raises TypeError for anything else."""
    if not isinstance(item, str):
        raise TypeError(f"{item!r:.60} is no text")
    return item


def _count(item: Any) -> int:
    """Return a number that counts places. Raises ValueError for anything else."""
    if type(item) is not int or not 0 <= item < 1000:
        raise ValueError(f"{item!r:.60} counts nothing")
    return item


def _dims(item: Any) -> tuple[Dims, ...]:
    """Return the loops of each dim of several tensors."""
    return tuple(tuple(tuple(map(_text, names)) for names in dims) for dims in item)


def _numbers(item: Any) -> Any:
    """Return nested lists of numbers and words as nested tuples: a rule must be hashable."""
    if isinstance(item, (list, tuple)):
        return tuple(map(_numbers, item))
    if item is not None and not isinstance(item, (bool, int, float, str)):
        raise TypeError(f"{item!r:.60} is no argument of a kernel")
    return item
