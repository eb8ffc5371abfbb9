"""Cost tables known by content, so that every computation on equal tables is done once.

Layers of a model repeat, so their tables are equal, so the messages between them are equal: a
`Memo` gives equal tables one number and remembers every result by the numbers that went in.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from planners.contraction import along, contract, others
from planners.tables import Table

# A table's number and, for each of its axes, the axis of the joint table it lies along.
Operand = tuple[int, tuple[int, ...]]


# Larger tables are compared entry by entry with those that have about so many entries in common:
# most are new, and a digest of all of a table takes as long as to make it.
_SAMPLED_ENTRIES = 2**15
_SAMPLE = 512


class Form:
    """A Form is all that an order of elimination depends on. It compares by content, and is hashed
    once.

    sizes: each variable's number of states. scopes: of all tables.

    >>> Form((2, 3), ((0, 1),)) == Form((2, 3), ((0, 1),)), Form((2,), ()) == Form((3,), ())
    (True, False)
    """

    __slots__ = ("_hash", "scopes", "sizes")

    def __init__(self, sizes: tuple[int, ...], scopes: tuple[tuple[int, ...], ...]) -> None:
        self.sizes, self.scopes = sizes, scopes
        self._hash = hash((sizes, scopes))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Form) or self._hash != other._hash:
            return False
        return self is other or (self.sizes == other.sizes and self.scopes == other.scopes)


@dataclass(frozen=True, slots=True)
class Pieces:
    """A table restricted to allowed states, taken apart: offset plus tables over some axes.

    offset: a constant of the table's unit. tables: numbers of tables and the axes of the original
    that they lie along; their sum (broadcast) and the offset is the restricted table.
    """

    offset: float
    tables: tuple[Operand, ...]


class Memo:
    """Interned tables and remembered results; hand it to several solves to share their work.

    computed, reused: the numbers of eliminations that were done and that were looked up. orders:
    the orders of elimination, for problems of the same form; `memo.emptied()` keeps these, and what
    is known of forms, and drops all tables, which else stay in memory as long as the memo lives.
    heavy: forms of problems whose dominated states are worth dropping. compared: what is known of
    tables by the states that dominate others in them, and undominated: the states that are left of
    a variable, see `dominance`.

    >>> memo = Memo()
    >>> memo.table(np.zeros(3)), memo.table(np.ones(3)), memo.table(np.zeros(3))
    (0, 1, 0)
    """

    def __init__(self) -> None:
        # Of `schedules.Orders`, which this module knows nothing of.
        self.orders: dict[Any, Any] = {}
        self.heavy: dict[Form, None] = {}
        # Of `reduction`: what was found last for a problem of other tables.
        self.reduced: list[Any] = []
        self.compared: dict[tuple[int, int], Any] = {}
        self.undominated: dict[Any, NDArray[np.bool_]] = {}
        self.tables: list[Table] = []
        self.has_infinity: list[bool] = []
        self.domains: list[NDArray[np.bool_]] = []
        self.computed = 0
        self.reused = 0
        self._alive: list[Table] = []
        self._by_object: dict[int, int] = {}
        self._by_content: dict[tuple[tuple[int, ...], bytes], int] = {}
        self._large: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
        self._domain_by_content: dict[bytes, int] = {}
        self._finite_domain: dict[int, int] = {}
        self._revised: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}
        self._pieces: dict[tuple[int, tuple[int, ...]], Pieces] = {}
        self._contracted: dict[
            tuple[tuple[Operand, ...], tuple[int, ...], tuple[int, ...]], tuple[int, float]
        ] = {}

    def emptied(self) -> Memo:
        """Return a memo that knows what this one knows of the forms of problems, but no table."""
        memo = Memo()
        memo.orders, memo.heavy, memo.reduced = self.orders, self.heavy, self.reduced
        return memo

    def table(self, table: Table) -> int:
        """Return the number of the table; equal tables have equal numbers.

        Each array object is digested once, so it must not change afterwards.
        """
        number = self._by_object.get(id(table))
        if number is None:
            number = self._intern(table)
            self._by_object[id(table)] = number
            # The array is kept alive, so that its id is not given to another array.
            self._alive.append(table)
        return number

    def domain(self, allowed: NDArray[np.bool_]) -> int:
        """Return the number of a set of states, given as one bool per state."""
        content = allowed.tobytes()
        number = self._domain_by_content.get(content)
        if number is None:
            number = len(self.domains)
            self._domain_by_content[content] = number
            self.domains.append(allowed)
        return number

    def contents(self, domains: list[int]) -> tuple[bytes, ...]:
        """Return the states of sets, given by number: of each set once, in order."""
        return tuple([self.domains[domain].tobytes() for domain in dict.fromkeys(domains)])

    def finite_domain(self, unary: int) -> int:
        """Return the number of the set of states that a unary table allows (finite entries)."""
        if unary not in self._finite_domain:
            allowed = cast(NDArray[np.bool_], np.isfinite(self.tables[unary]))
            self._finite_domain[unary] = self.domain(allowed)
        return self._finite_domain[unary]

    def revised(self, table: int, domains: tuple[int, ...]) -> tuple[int, ...]:
        """Return the domains (one per axis) less the states that have no finite entry left.

        table: a table's number. domains: the numbers of the sets of states still possible per axis.
        """
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
        """Return the table restricted to the domains (one per axis), taken apart where exact.

        Axes with a single state vanish; an axis that only adds a vector becomes a unary table; a
        constant goes into the offset.
        """
        key = (table, domains)
        pieces = self._pieces.get(key)
        if pieces is None:
            states_left = [np.flatnonzero(self.domains[domain]) for domain in domains]
            part = self.tables[table][np.ix_(*states_left)]
            axes = tuple(axis for axis, states in enumerate(states_left) if len(states) > 1)
            pieces = self._take_apart(part.reshape([len(states_left[axis]) for axis in axes]), axes)
            self._pieces[key] = pieces
        return pieces

    def contract(
        self, operands: tuple[Operand, ...], shape: tuple[int, ...], kept_axes: tuple[int, ...]
    ) -> tuple[int, float]:
        """Return the least, over all axes not kept, of the sum of the operands over a joint table.

        operands: table numbers with their axes in the joint table. shape: of the joint table.
        kept_axes: in the order of the result's axes. Returns the number of the result, whose
        smallest entry is 0, and the constant that was subtracted for that (+inf when nothing is
        finite).
        """
        # The sum does not depend on the order of the operands: sorted, equal sums have equal keys.
        operands = tuple(sorted(operands))
        key = (operands, shape, kept_axes)
        numbered = self._contracted.get(key)
        if numbered is not None:
            self.reused += 1
            return numbered
        self.computed += 1
        arrays = self.aligned(operands, len(shape))
        result = contract(arrays, shape, tuple(sorted(kept_axes)))
        order = [sorted(kept_axes).index(axis) for axis in kept_axes]
        offset = float(result.min())
        if result.flags.writeable and math.isfinite(offset):
            result -= offset  # it is nobody else's, and may be large
            numbered = self._intern(result.transpose(order)), offset
        else:
            numbered = self._normalized(result.transpose(order))
        self._contracted[key] = numbered
        return numbered

    def aligned(self, operands: tuple[Operand, ...], ndim: int) -> list[Table]:
        """Return the operands' arrays, transposed and reshaped to broadcast over the joint table.

        ndim: the number of axes of the joint table.
        """
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
        """Return the number of the table's content, a new one if it was not seen before."""
        table = np.ascontiguousarray(table)
        if table.size > _SAMPLED_ENTRIES:
            return self._intern_large(table)
        data = table.tobytes()
        # Small tables are their own digest; 32 bytes of BLAKE2 make a collision implausible.
        digest = data if len(data) <= 64 else hashlib.blake2b(data, digest_size=32).digest()
        key = (table.shape, digest)
        number = self._by_content.get(key)
        if number is None:
            number = len(self.tables)
            self._by_content[key] = number
            self.tables.append(table)
            self.has_infinity.append(bool(np.isinf(table).any()))
        return number

    def _intern_large(self, table: Table) -> int:
        """Do the same for a large table, of which some entries tell what it may be equal to."""
        sample = table.reshape(-1)[:: table.size // _SAMPLE].tobytes()
        alike = self._large.setdefault((table.shape, sample), [])
        for number in alike:
            if np.array_equal(self.tables[number], table):
                return number
        alike.append(len(self.tables))
        self.tables.append(table)
        self.has_infinity.append(bool(np.isinf(table).any()))
        return alike[-1]

    def _normalized(self, table: Table) -> tuple[int, float]:
        """Return the table's number after its smallest entry was subtracted, and that entry.

        Normalized messages of equal layers are equal, whatever lies before these layers.
        """
        offset = float(table.min())
        if math.isfinite(offset):
            table = table - offset
        return self._intern(table), offset

    def _take_apart(self, part: Table, axes: tuple[int, ...]) -> Pieces:
        """Split off every axis that only adds a vector: part = rest + vector along that axis.

        axes: of the original table, one per axis of `part`. Equality is exact, not up to rounding,
        so that the pieces add up to the very table.
        """
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
