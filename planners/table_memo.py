"""Tables known by content, and every computation on them done once.

Layers of a model repeat, so their tables are equal, so the messages between them are equal: a
`Memo` gives equal tables one number and remembers every result by the numbers that went in.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from planners.contraction import along, contract, others
from planners.tables import Table

# Orders of elimination, by the number of states of all variables and the scopes of all tables.
Orders = dict[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], list[int]]

# A table's number and, for each of its axes, the axis of the joint table it lies along.
Operand = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """A table restricted to allowed states, taken apart: offset plus tables over some axes."""

    offset: float
    tables: tuple[Operand, ...]


class Memo:
    """Interned tables and remembered results; hand it to several solves to share their work.

    computed, reused: how many eliminations were done and how many were looked up. orders: in which
    variables were eliminated, for problems of the same form; `Memo(orders=memo.orders)` keeps these
    and drops all tables, which else stay in memory as long as the memo lives.
    """

    def __init__(self, orders: Orders | None = None) -> None:
        self.orders: Orders = {} if orders is None else orders
        self.tables: list[Table] = []
        self.has_infinity: list[bool] = []
        self.domains: list[NDArray[np.bool_]] = []
        self.computed = 0
        self.reused = 0
        self._alive: list[Table] = []
        self._by_object: dict[int, int] = {}
        self._by_content: dict[tuple[tuple[int, ...], bytes], int] = {}
        self._domain_by_content: dict[bytes, int] = {}
        self._finite_domain: dict[int, int] = {}
        self._revised: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}
        self._pieces: dict[tuple[int, tuple[int, ...]], Pieces] = {}
        self._contracted: dict[
            tuple[tuple[Operand, ...], tuple[int, ...], tuple[int, ...]], tuple[int, float]
        ] = {}

    def table(self, table: Table) -> int:
        """The number of the table; each array object is digested once."""
        number = self._by_object.get(id(table))
        if number is None:
            number = self._intern(table)
            self._by_object[id(table)] = number
            self._alive.append(table)  # so that its id is not given to another array
        return number

    def domain(self, allowed: NDArray[np.bool_]) -> int:
        """The number of a set of states."""
        content = allowed.tobytes()
        number = self._domain_by_content.get(content)
        if number is None:
            number = len(self.domains)
            self._domain_by_content[content] = number
            self.domains.append(allowed)
        return number

    def finite_domain(self, unary: int) -> int:
        """The number of the set of states that a unary table allows."""
        if unary not in self._finite_domain:
            allowed = cast(NDArray[np.bool_], np.isfinite(self.tables[unary]))
            self._finite_domain[unary] = self.domain(allowed)
        return self._finite_domain[unary]

    def revised(self, table: int, domains: tuple[int, ...]) -> tuple[int, ...]:
        """The domains (one per axis) without the states left without a finite entry."""
        key = (table, domains)
        if key not in self._revised:
            finite = np.isfinite(self.tables[table])
            for axis, domain in enumerate(domains):
                finite &= along(self.domains[domain], axis, finite.ndim)
            self._revised[key] = tuple(
                self.domain(np.logical_or.reduce(finite, axis=others(axis, finite.ndim)))
                for axis in range(finite.ndim)
            )
        return self._revised[key]

    def pieces(self, table: int, domains: tuple[int, ...]) -> Pieces:
        """The table restricted to the domains (one per axis), taken apart where that is exact.

        Axes with a single state vanish; an axis that only adds a vector becomes a unary table;
        what is constant goes into the offset.
        """
        key = (table, domains)
        known = self._pieces.get(key)
        if known is None:
            kept = [np.flatnonzero(self.domains[domain]) for domain in domains]
            part = self.tables[table][np.ix_(*kept)]
            axes = tuple(axis for axis, states in enumerate(kept) if len(states) > 1)
            known = self._take_apart(part.reshape([len(kept[axis]) for axis in axes]), axes)
            self._pieces[key] = known
        return known

    def contract(
        self, operands: tuple[Operand, ...], shape: tuple[int, ...], kept: tuple[int, ...]
    ) -> tuple[int, float]:
        """The least, over all axes not kept, of the sum of the operands over a joint table.

        kept: in the order of the result's axes. Returns the number of the result, whose smallest
        entry is 0, and what was subtracted for that (+inf when nothing is finite).
        """
        operands = tuple(sorted(operands))
        key = (operands, shape, kept)
        known = self._contracted.get(key)
        if known is not None:
            self.reused += 1
            return known
        self.computed += 1
        arrays = self.aligned(operands, len(shape))
        result = contract(arrays, shape, tuple(sorted(kept)))
        order = [sorted(kept).index(axis) for axis in kept]
        known = self._normalized(result.transpose(order))
        self._contracted[key] = known
        return known

    def aligned(self, operands: tuple[Operand, ...], ndim: int) -> list[Table]:
        """The operands' arrays, transposed and reshaped to broadcast over the joint table."""
        arrays = []
        for number, positions in operands:
            table = self.tables[number]
            if list(positions) != sorted(positions):
                table = table.transpose(np.argsort(positions))
            shape = [1] * ndim
            for position, size in zip(sorted(positions), table.shape, strict=True):
                shape[position] = size
            arrays.append(table.reshape(shape))
        return arrays

    def _intern(self, table: Table) -> int:
        table = np.ascontiguousarray(table)
        data = table.tobytes()
        # Small tables are their own digest.
        digest = data if len(data) <= 64 else hashlib.blake2b(data, digest_size=32).digest()
        key = (table.shape, digest)
        number = self._by_content.get(key)
        if number is None:
            number = len(self.tables)
            self._by_content[key] = number
            self.tables.append(table)
            self.has_infinity.append(bool(np.isinf(table).any()))
        return number

    def _normalized(self, table: Table) -> tuple[int, float]:
        """The table's number after its smallest entry was subtracted, and that entry."""
        offset = float(table.min())
        if math.isfinite(offset):
            table = table - offset
        return self._intern(table), offset

    def _take_apart(self, part: Table, axes: tuple[int, ...]) -> Pieces:
        if not axes:
            return Pieces(float(part), ())
        finite = len(axes) > 1 and np.isfinite(part).all()
        for axis in reversed(range(len(axes) if finite else 0)):
            rest: Table = part[tuple([0 if at == axis else slice(None) for at in range(part.ndim)])]
            vector = part[tuple([slice(None) if at == axis else 0 for at in range(part.ndim)])]
            vector = vector - vector[0]
            if np.array_equal(part, np.expand_dims(rest, axis) + along(vector, axis, part.ndim)):
                halves = [
                    self._take_apart(rest, axes[:axis] + axes[axis + 1 :]),
                    self._take_apart(vector, axes[axis : axis + 1]),
                ]
                return Pieces(
                    sum(half.offset for half in halves),
                    tuple(table for half in halves for table in half.tables),
                )
        number, offset = self._normalized(part)
        return Pieces(offset, ((number, axes),) if self.tables[number].any() else ())
