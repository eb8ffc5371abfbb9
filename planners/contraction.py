"""Min-sum contraction: the least of a sum of tables over some of its axes."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planners.tables import Table

_CHUNK_ENTRIES = 2**18  # the joint table is walked in pieces of this size, which stay in cache
# The fixed time of a block, in entries that could be walked meanwhile.
_ENTRIES_PER_BLOCK = 25_000
# An entry of a block's result is gathered and scattered by indices, which takes as long as to walk
# so many entries.
_ENTRIES_PER_RESULT = 4
# A result larger than a piece is computed in pieces of so many entries, for each state in turn.
_RESULT_ENTRIES = 2**15
# Smaller joint tables are not searched for finite blocks: walking them whole is quicker.
_SPARSE_ENTRIES = 2**17


def contract(arrays: list[Table], shape: tuple[int, ...], kept_axes: tuple[int, ...]) -> Table:
    """Return the least, over all axes not kept, of the sum of arrays over a joint table.

    arrays: each broadcasts to `shape`, the shape of the joint table. kept_axes: the axes of the
    result, ascending. Much of a joint table is +inf where a set of what is offered meets what each
    state needs: only the blocks that can be finite are walked.

    >>> contract([np.array([[0.0, 5.0], [5.0, 0.0]]), np.array([[1.0], [3.0]])], (2, 2), (1,))
    array([1., 3.])
    """
    if math.prod(shape) >= _SPARSE_ENTRIES and kept_axes == tuple(range(1, len(shape))):
        blocks = _blocks(arrays, shape)
        results = [math.prod(len(axis) for axis in block[1:]) for block in blocks]
        entries = sum(
            len(block[0]) * size + _ENTRIES_PER_RESULT * size + _ENTRIES_PER_BLOCK
            for block, size in zip(blocks, results, strict=True)
        )
        if entries <= math.prod(shape):
            return _by_blocks(arrays, shape, blocks)
    return _dense(arrays, shape, kept_axes)


def _blocks(arrays: list[Table], shape: tuple[int, ...]) -> list[list[NDArray[np.intp]]]:
    """Return blocks of the joint table, as indices per axis, outside of which all is +inf.

    States of axis 0 that are finite for the same states of all other axes go into one block.
    """
    supports = []
    for axis in range(1, len(shape)):
        support = np.ones((shape[0], shape[axis]), dtype=np.bool_)
        for array in arrays:
            if array.shape[axis] > 1 or array.shape[0] > 1:
                dropped = tuple(a for a in range(1, len(shape)) if a != axis)
                support &= np.logical_or.reduce(np.isfinite(array), axis=dropped)
        supports.append(support)
    together = np.concatenate(supports, axis=1) if supports else np.ones((shape[0], 0), np.bool_)
    # Equal rows are found by their bytes, packed to one bit per state.
    groups: dict[bytes, list[int]] = {}
    for state, row in enumerate(np.packbits(together, axis=1)):
        groups.setdefault(row.tobytes(), []).append(state)
    return [
        [np.array(states), *(np.flatnonzero(support[states[0]]) for support in supports)]
        for states in groups.values()
    ]


def _by_blocks(
    arrays: list[Table], shape: tuple[int, ...], blocks: list[list[NDArray[np.intp]]]
) -> Table:
    """Return the contraction over axis 0, computed on the given blocks alone."""
    result = np.full(shape[1:], np.inf)
    first = np.zeros(1, dtype=np.intp)
    for block in blocks:
        inner = tuple(len(axis) for axis in block)
        if not math.prod(inner):
            continue
        parts = [
            array[np.ix_(*(a if n > 1 else first for a, n in zip(block, array.shape, strict=True)))]
            for array in arrays
        ]
        least = _dense(parts, inner, tuple(range(1, len(shape))))
        place = np.ix_(*block[1:])
        result[place] = np.minimum(result[place], least)
    return result


def _dense(arrays: list[Table], shape: tuple[int, ...], kept_axes: tuple[int, ...]) -> Table:
    """Return the contraction over all entries, in pieces of the joint table.

    The joint table is never held whole: it may have a million times the entries of its parts.
    """
    # Small tables are summed first, while the total is still small. The sort is stable, so that the
    # order of the sum, and with it the rounding, depends on nothing but the operands.
    arrays = sorted(arrays, key=lambda array: array.size)
    if kept_axes == tuple(range(1, len(shape))) and math.prod(shape[1:]) >= _CHUNK_ENTRIES:
        return _over_first(arrays, shape)
    rows_per_chunk = max(1, _CHUNK_ENTRIES // math.prod(shape[1:]))
    dropped = tuple(axis for axis in range(1, len(shape)) if axis not in kept_axes)
    chunks: list[Table] = []
    for start in range(0, shape[0], rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        total = np.zeros([1] * len(shape))
        for array in arrays:
            part = array[rows] if len(array) > 1 else array
            if total.shape == np.broadcast_shapes(total.shape, part.shape):
                total += part
            else:
                total = total + part
        if dropped:
            total = total.min(axis=dropped, keepdims=True)
        height = len(range(*rows.indices(shape[0])))
        total = np.broadcast_to(total, _chunk_shape(shape, kept_axes, height))
        if 0 in kept_axes:
            chunks.append(total)
        elif chunks:
            np.minimum(chunks[0], total.min(axis=0), out=chunks[0])
        else:
            chunks.append(total.min(axis=0))
    result = np.concatenate(chunks) if 0 in kept_axes else chunks[0]
    return result.reshape([shape[axis] for axis in kept_axes])


def _over_first(arrays: list[Table], shape: tuple[int, ...]) -> Table:
    """Return the contraction over axis 0, for a piece of the result at a time: sums are written to
    the same memory for every state of that axis.

    arrays: in the order in which they are summed.
    """
    result = np.empty(shape[1:])
    height = max(1, _RESULT_ENTRIES // math.prod(shape[2:]))
    memory = np.empty((min(height, shape[1]), *shape[2:]))
    for start in range(0, shape[1], height):
        rows = slice(start, start + height)
        least = result[rows]
        sums = memory[: len(least)]
        parts = [array[:, rows] if array.shape[1] > 1 else array for array in arrays]
        for state in range(shape[0]):
            into = sums if state else least
            total, *rest = (part[state if len(part) > 1 else 0] for part in parts)
            for part in rest:
                whole = np.broadcast_shapes(total.shape, part.shape) == sums.shape
                total = np.add(total, part, out=into if whole else None)
            if state:
                np.minimum(least, total, out=least)
            elif total is not least:
                least[...] = total
    return result


def _chunk_shape(shape: tuple[int, ...], kept_axes: tuple[int, ...], height: int) -> list[int]:
    """Return the joint shape of one chunk, with the axes not kept reduced to size 1."""
    return [height] + [shape[axis] if axis in kept_axes else 1 for axis in range(1, len(shape))]


def along(vector: NDArray[Any], axis: int, ndim: int) -> NDArray[Any]:
    """Return the vector as a table of ndim axes, all of size 1 but for one.

    >>> along(np.arange(3), axis=1, ndim=3).shape
    (1, 3, 1)
    """
    return vector.reshape([-1 if at == axis else 1 for at in range(ndim)])


def others(axis: int, ndim: int) -> tuple[int, ...]:
    """Return all axes of a table but one.

    >>> others(1, 3)
    (0, 2)
    """
    return tuple(other for other in range(ndim) if other != axis)
