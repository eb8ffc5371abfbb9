"""The loops of a view: how the dims of one shape are merged and divided into those of another."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import sympy

from autoparallel.graph.graph import Dim, Sym, hint, numel_hint, size_expression
from autoparallel.rules.rule import Dims, Loops

__all__ = ["view_loops"]


def _product(dims: list[Dim]) -> Any:
    """Return the product of sizes as a sympy expression."""
    result: Any = sympy.Integer(1)
    for dim in dims:
        result = result * size_expression(dim)
    return result


def view_loops(
    before: tuple[Dim, ...], after: tuple[Dim, ...]
) -> tuple[Dims, Dims, dict[str, Dim], frozenset[str]]:
    """Return the loops of a view from shape `before` to shape `after`.

    Both shapes are cut into the shortest runs of dims of equal product; inside a run, loops lie
    between the dims' boundaries, seen from the right: 1600 -> (25, 64) has loops of 25 and 64.
    Returns both sides' dims, the loops' sizes, and the loops that cannot be split.

    >>> view_loops((1600,), (25, 64))
    ((('l0_0', 'l0_1'),), (('l0_0',), ('l0_1',)), {'l0_0': 25, 'l0_1': 64}, frozenset())
    """
    sizes: dict[str, Dim] = {}
    whole: set[str] = set()
    left: list[Loops] = [()] * len(before)
    right: list[Loops] = [()] * len(after)
    i = j = 0
    while i < len(before) or j < len(after):
        run_i, run_j = [i], [j]
        # A dim of size 1 on one side alone has no counterpart, and no loop.
        if i >= len(before) or (j < len(after) and after[j] == 1 and before[i] != 1):
            j += 1
            continue
        if j >= len(after) or (before[i] == 1 and after[j] != 1):
            i += 1
            continue
        while True:
            one = _product([before[k] for k in run_i])
            two = _product([after[k] for k in run_j])
            # The shortest run whose products are equal, as expressions: it holds for all inputs.
            if one == two:
                break
            # The shorter side takes one more dim, until both products are equal.
            low = numel_hint(tuple([before[k] for k in run_i])) <= numel_hint(
                tuple([after[k] for k in run_j])
            )
            if low and run_i[-1] + 1 < len(before):
                run_i.append(run_i[-1] + 1)
            elif run_j[-1] + 1 < len(after):
                run_j.append(run_j[-1] + 1)
            elif run_i[-1] + 1 < len(before):
                run_i.append(run_i[-1] + 1)
            else:
                break
        i, j = run_i[-1] + 1, run_j[-1] + 1
        # Where the products of a run of symbolic sizes are equal but cannot be seen to be, such as
        # n and (n // 4) * 4, the run goes to the end. Its last dims are told apart from there.
        peeled = _equal_at_end(before, after, run_i, run_j) if one != two else 0
        for _ in range(peeled):
            _cut(before, after, [run_i.pop()], [run_j.pop()], left, right, sizes, whole)
        _cut(before, after, run_i, run_j, left, right, sizes, whole)
    return tuple(left), tuple(right), sizes, frozenset(whole)


def _equal_at_end(
    before: tuple[Dim, ...], after: tuple[Dim, ...], run_i: list[int], run_j: list[int]
) -> int:
    """Return how many dims at the end of both runs are of the same fixed size, one by one.

    The view keeps the number of elements, so that what lies before them is equal, too.
    """
    count = 0
    for k, m in zip(reversed(run_i[1:]), reversed(run_j[1:]), strict=False):
        if not isinstance(before[k], int) or before[k] != after[m] or not before[k]:
            break
        count += 1
    return count


def _cut(
    before: tuple[Dim, ...],
    after: tuple[Dim, ...],
    run_i: list[int],
    run_j: list[int],
    left: list[Loops],
    right: list[Loops],
    sizes: dict[str, Dim],
    whole: set[str],
) -> None:
    """Name the loops of one run of dims of equal product; left, right,
    sizes and whole are filled.
    """
    run_i = [k for k in run_i if before[k] != 1]
    run_j = [k for k in run_j if after[k] != 1]
    if not run_i or not run_j:
        return
    if len(run_i) == 1 and len(run_j) == 1:
        name = f"l{run_i[0]}"
        sizes[name] = before[run_i[0]]
        left[run_i[0]] = right[run_j[0]] = (name,)
        return
    if any(isinstance(before[k], Sym) for k in run_i) or any(
        isinstance(after[k], Sym) for k in run_j
    ):
        _opaque(before, run_i, left, sizes, whole)
        return
    cuts_i = _boundaries([hint(before[k]) for k in run_i])
    cuts_j = _boundaries([hint(after[k]) for k in run_j])
    cuts = sorted({*cuts_i, *cuts_j})
    # (4, 6) -> (6, 4): boundaries at 6 and at 4 do not nest. Of an empty tensor there are none.
    if 0 in cuts or any(high % low for low, high in pairwise(cuts)):
        _opaque(before, run_i, left, sizes, whole)
        return
    names: dict[tuple[int, int], str] = {}
    # Outermost first, so that names run from left to right.
    for low, high in reversed(list(pairwise(cuts))):
        name = f"l{run_i[0]}_{len(names)}"
        names[low, high] = name
        sizes[name] = high // low
    for run, bounds, dims in ((run_i, cuts_i, left), (run_j, cuts_j, right)):
        descending = bounds[::-1]
        for k, high, low in zip(run, descending, descending[1:], strict=False):
            dims[k] = tuple(
                name for (start, stop), name in names.items() if start >= low and stop <= high
            )


def _opaque(
    before: tuple[Dim, ...],
    run: list[int],
    left: list[Loops],
    sizes: dict[str, Dim],
    whole: set[str],
) -> None:
    """Leave the dims of a run whole: they mix so that no part of one is a part of the other."""
    for k in run:
        name = f"l{k}"
        left[k] = (name,)
        sizes[name] = before[k]
        whole.add(name)


def _boundaries(sizes: list[int]) -> list[int]:
    """Return the products of the dims from the right: [1, d_n, d_n d_(n-1), ...].

    >>> _boundaries([2, 3, 4])
    [1, 4, 12, 24]
    """
    bounds = [1]
    for size in reversed(sizes):
        bounds.append(bounds[-1] * size)
    return bounds
