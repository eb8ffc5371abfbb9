"""A program's text with its repeated lines once: as a function that is called for each block.

Nothing is known here of models: lines repeat where they are equal but for the names of values and
whole numbers. What differs between the repetitions becomes an argument.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Folded", "fold_statements", "names_made", "names_read", "values_made"]

_LONGEST = 4000  # statements in one block
_TRIED = 30  # runs, before a program counts as one without repetitions


@dataclass(frozen=True)
class Folded:
    """A Folded is a run of equal groups of statements.

    start, length, count: the place of the first statement, the number of statements in a group, and
    the number of groups. arguments: names that a group takes, in the first group's words; results:
    those that it gives. numbers: how many whole numbers differ. calls: per group, the names of its
    arguments, of its results, and its numbers. body: of the first group, with the names n0, n1 for
    these numbers.
    """

    start: int
    length: int
    count: int
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    numbers: int
    calls: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]], ...]
    body: tuple[ast.stmt, ...]


def fold_statements(
    statements: Sequence[ast.stmt],
    variable: Iterable[str],
    prefer: Callable[[Folded], bool] = lambda folded: False,
    *,
    worth: Callable[[int, int], bool] = lambda lines, count: count > 1,
    kinds: Mapping[str, str] | None = None,
    numbers: Container[int] | None = None,
) -> Folded | None:
    """Return the run of equal groups that saves most lines, None where nothing repeats.

    variable: the names that may differ between groups; all others, such as functions and
    placements, must be the same. prefer: of the places at which the groups may be taken to begin,
    one that it accepts is taken where there is one, even if one group less is folded; else that
    with the fewest arguments and results. worth: whether groups of so many lines, of which there
    are so many, are folded. kinds: of names; one corresponds only to names of the
    same kind. numbers: those that may differ, None for all.

    >>> program = ast.parse("b = f(a, 1)\\nc = g(b)\\nd = f(c, 2)\\ne = g(d)\\nf(e)").body
    >>> folded = fold_statements(program, "abcde")
    >>> folded.count, folded.arguments, folded.results, folded.calls[1]
    (2, ('a',), ('c',), (('c',), ('e',), (2,)))
    """
    names = set(variable)
    tokens = [_tokens(statement, names, kinds or {}, numbers) for statement in statements]
    forms: dict[str, int] = {}
    rows = np.array([forms.setdefault(form, len(forms)) for form, _, _ in tokens], dtype=np.int64)
    # Within a function there are more.
    lines = [sum(isinstance(node, ast.stmt) for node in ast.walk(each)) for each in statements]
    last_read: dict[str, int] = {}
    for index, statement in enumerate(statements):
        last_read.update(dict.fromkeys(names_read(statement), index))
    for start, length, count, spare in _runs(rows)[:_TRIED]:
        groups = []
        # Within one period every place is tried; the last places leave one group less.
        for shift in range(length):
            number = count if shift <= spare else count - 1
            if worth(sum(lines[start + shift : start + shift + length]), number):
                folded = _folded(statements, tokens, start + shift, length, number, last_read)
                groups += [folded] if folded is not None else []
        if groups:
            return min(
                groups,
                key=lambda one: (
                    not prefer(one), -one.count, len(one.arguments) + len(one.results),
                ),
            )  # fmt: skip
    return None


def _runs(kinds: NDArray[np.int64]) -> list[tuple[int, int, int, int]]:
    """Return (start, length, count, spare) of every run of equal groups, those first that save
    most statements. spare: by how many statements the run may begin later.
    """
    runs = []
    for length in range(2, min(len(kinds) // 2, _LONGEST) + 1):
        same = kinds[:-length] == kinds[length:]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            count = int(end - begin) // length + 1
            if count > 1:
                runs.append((int(begin), length, count, int(end - begin) % length))
    # Among equals the shortest group comes first.
    return sorted(runs, key=lambda run: (-run[1] * (run[2] - 1), run[1]))


_Tokens = tuple[str, list[str], list[int]]


def _tokens(
    statement: ast.stmt,
    variable: set[str],
    kinds: Mapping[str, str],
    may_differ: Container[int] | None,
) -> _Tokens:
    """Return a statement's form, without its names and numbers, and these in order."""
    names: list[str] = []
    numbers: list[int] = []
    blank = copy.deepcopy(statement)
    for node in ast.walk(blank):
        if isinstance(node, ast.Name) and node.id in variable:
            names.append(node.id)
            node.id = kinds.get(node.id, "_")
        elif isinstance(node, ast.arg) and node.arg in variable:
            names.append(node.arg)
            node.arg = "_"
        elif isinstance(node, ast.FunctionDef):
            names.append(node.name)
            node.name = "_"
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            if may_differ is None or node.value in may_differ:
                node.value = 0
    return ast.dump(blank), names, numbers


def _folded(
    statements: Sequence[ast.stmt],
    tokens: Sequence[_Tokens],
    start: int,
    length: int,
    count: int,
    last_read: Mapping[str, int],
) -> Folded | None:
    """Return the groups from a start on, None where their names do not correspond."""
    groups = [range(start + k * length, start + (k + 1) * length) for k in range(count)]
    renamed = _renamings(tokens, groups)
    if renamed is None:
        return None
    first = [statements[index] for index in groups[0]]
    made = [name for statement in first for name in names_made(statement)]
    before: list[str] = []
    known: set[str] = set()
    for statement in first:
        before += [
            name for name in names_read(statement) if name in renamed[0] and name not in known
        ]
        known.update(names_made(statement))
    arguments = tuple(dict.fromkeys(before))
    results = tuple(
        name
        for name in dict.fromkeys(made)
        if any(
            last_read.get(new[name], -1) >= group.stop
            for new, group in zip(renamed, groups, strict=True)
        )
    )
    places = [
        (offset, at)
        for offset in range(length)
        for at in range(len(tokens[start + offset][2]))
        if len({tokens[group[offset]][2][at] for group in groups}) > 1
    ]
    # Numbers that change alike are one argument.
    columns = {
        place: tuple(tokens[group[place[0]]][2][place[1]] for group in groups) for place in places
    }
    distinct = list(dict.fromkeys(columns.values()))
    body = _numbered(first, {p: f"n{distinct.index(column)}" for p, column in columns.items()})
    calls = tuple(
        (
            tuple(new[name] for name in arguments),
            tuple(new[name] for name in results),
            tuple(column[k] for column in distinct),
        )
        for k, new in enumerate(renamed)
    )
    return Folded(start, length, count, arguments, results, len(distinct), calls, tuple(body))


def _renamings(
    tokens: Sequence[_Tokens], groups: Sequence[range]
) -> list[Mapping[str, str]] | None:
    """Return, per group, its names by those of the first; None where they do not correspond."""
    renamed: list[Mapping[str, str]] = []
    for group in groups:
        new: dict[str, str] = {}
        for index, first in zip(group, groups[0], strict=True):
            for name, old in zip(tokens[index][1], tokens[first][1], strict=True):
                if new.setdefault(old, name) != name:
                    return None
        if len(set(new.values())) != len(new):
            return None
        renamed.append(new)
    return renamed


def values_made(statements: Iterable[ast.stmt]) -> set[str]:
    """Return all names that statements give values to, also within functions, and of these."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    named = {node.id for node in nodes if isinstance(node, ast.Name) and _is_stored(node)}
    return named | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def names_made(statement: ast.stmt) -> list[str]:
    """Return the names that a statement gives values to."""
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    return [
        node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and _is_stored(node)
    ]


def _is_stored(node: ast.Name) -> bool:
    """Return whether a name is given a value."""
    return isinstance(node.ctx, ast.Store)


def names_read(statement: ast.stmt) -> list[str]:
    """Return the names that a statement reads; what a function has of its own is none of them."""
    own: set[str] = set()
    if isinstance(statement, ast.FunctionDef):
        own = {arg.arg for arg in statement.args.args}
        own |= {name for inner in statement.body for name in names_made(inner)}
    return [
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in own
    ]


def _numbered(
    statements: Sequence[ast.stmt], names: Mapping[tuple[int, int], str]
) -> list[ast.stmt]:
    """Return copies in which numbers are replaced by names. names: by statement and number."""
    copies = []
    for offset, statement in enumerate(statements):
        numbered = copy.deepcopy(statement)
        constants = [
            node
            for node in ast.walk(numbered)
            if isinstance(node, ast.Constant) and type(node.value) is int
        ]
        new = {
            id(node): names[offset, at]
            for at, node in enumerate(constants)
            if (offset, at) in names
        }
        copies.append(_Numbers(new).visit(numbered))
    return copies


class _Numbers(ast.NodeTransformer):
    """Puts names in the place of constants. names: by the constants' ids."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        """Return the name for a constant, or the constant."""
        name = self.names.get(id(node))
        return node if name is None else ast.Name(name, ast.Load())
