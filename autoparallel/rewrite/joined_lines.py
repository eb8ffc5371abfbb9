"""A conversion and the product beside it, which become one statement of a program: one node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoparallel.rewrite.program import Block, Line

__all__ = ["MoveLine", "ProductLine", "with_joined_lines"]


@dataclass(frozen=True)
class MoveLine(Line):
    """The statement of a conversion.

    ends: the group, both placements and the size, as text. group: the first of these. weights: of
    the products that fill its gap, each with its bias. gap: its name, "" for none.
    """

    group: str = ""
    ends: str = ""
    weights: tuple[str, ...] = ()
    gap: str = ""


@dataclass(frozen=True)
class ProductLine(Line):
    """The statement of a product, the gradient of whose weight is late.

    function: "linear" or "mm". x, weights: its factors, the second one with its bias. gap, place:
    where its gradient is computed. pending: the groups over which the result is a pending sum.
    """

    function: str = ""
    x: str = ""
    weights: str = ""
    gap: str = ""
    place: int = 0
    pending: tuple[str, ...] = ()


def with_joined_lines(body: list[Line | Block], returned: Iterable[str]) -> list[Line | Block]:
    """Return a body in which a conversion and a product, one right behind the other, are joined
    where nothing else reads what the first one makes.

    returned: names that the body's function returns.
    """
    reads = Counter(returned)
    for item in body:
        for line in item.lines if isinstance(item, Block) else [item]:
            reads.update(set(line.reads))
    for item in body:
        if isinstance(item, Block):
            item.lines = [line for line in _joined(item.lines, reads) if isinstance(line, Line)]
    return _joined(body, reads)


def _joined(body: Sequence[Line | Block], reads: Counter[str]) -> list[Line | Block]:
    """Return the lines with neighbours joined. reads: how many lines read each name."""
    result: list[Line | Block] = []
    for item in body:
        line = _pair(result[-1], item, reads) if result else None
        if line is not None:
            result[-1] = line
        else:
            result.append(item)
    return result


def _pair(first: Line | Block, second: Line | Block, reads: Counter[str]) -> Line | None:
    """Return one line in place of two, or None where they stay two."""
    if isinstance(first, Block) or isinstance(second, Block) or reads[first.makes[0]] != 1:
        return None
    function, arguments, own = "", "", ""
    if isinstance(first, MoveLine) and isinstance(second, ProductLine):
        filled = first.gap and first.gap == second.gap and not second.place
        if filled and second.x == first.makes[0] and not second.pending:
            weights = ", ".join(f"({pair})" for pair in first.weights)
            function = f"convert_then_{second.function}"
            arguments = f"{first.reads[0]}, {first.ends}, [{weights}]"
            own = first.gap if len(first.weights) > 1 else ""
    elif isinstance(first, ProductLine) and isinstance(second, MoveLine):
        weight, bias = first.weights.split(", ")
        fits = second.reads[0] == first.makes[0] and first.pending == (second.group,)
        if fits and first.gap and bias == "None":
            weights = ", ".join(f"({pair})" for pair in second.weights)
            function = f"{first.function}_then_convert"
            arguments = f"{first.x}, {weight}, {second.ends}, [{weights}], "
            arguments += f"gap={first.gap}, place={first.place}"
            own = second.gap
    if not function:
        return None
    names = [second.makes[0], *([own] if own else [])]
    text = f"{names[0]}, {own or '_'} = overlap.{function}({arguments})"
    inside = {*first.makes} - {own}
    read = dict.fromkeys(name for name in (*first.reads, *second.reads) if name not in inside)
    return Line(text, tuple(read), tuple(names))
