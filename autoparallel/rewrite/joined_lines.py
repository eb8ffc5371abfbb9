"""A conversion and the products beside it, which become one statement of a program: one node."""

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
    """Return a body in which a conversion and the products that alone read what it makes are one
    line, and so are a product and the conversion right behind it that alone reads it.

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
    """Return the lines, joined. reads: how many lines read each name."""
    readers: dict[str, list[ProductLine]] = {}
    for item in body:
        if isinstance(item, ProductLine):
            readers.setdefault(item.x, []).append(item)
    result: list[Line | Block] = []
    taken: set[str] = set()
    for item in body:
        if isinstance(item, Line) and item.makes and item.makes[0] in taken:
            continue
        last = result[-1] if result else None
        if isinstance(item, MoveLine):
            products = readers.get(item.makes[0], [])
            if _fill(products, item) and reads[item.makes[0]] == len(products):
                result.append(_then_products(item, products))
                taken.update(product.makes[0] for product in products)
                continue
            if isinstance(last, ProductLine) and reads[last.makes[0]] == 1 and _ends(last, item):
                result[-1] = _then_moved(last, item)
                continue
        result.append(item)
    return result


def _fill(products: Sequence[ProductLine], move: MoveLine) -> bool:
    """Return whether products have the first places of a conversion's gap, in their order, and are
    of one kind. Their weights are parameters then, and at hand where the conversion is.
    """
    return bool(products and move.gap) and all(
        product.gap == move.gap
        and product.place == place
        and product.function == products[0].function
        and not product.pending
        for place, product in enumerate(products)
    )


def _then_products(move: MoveLine, products: Sequence[ProductLine]) -> Line:
    """Return one line in place of a conversion and the products that read what it makes."""
    weights = ", ".join(f"({pair})" for pair in move.weights)
    count = f", {len(products)}" if len(products) > 1 else ""
    gap = [move.gap] if len(move.weights) > len(products) else []
    made = [*(product.makes[0] for product in products), *(gap or ["_"])]
    text = f"{', '.join(made)} = overlap.convert_then_{products[0].function}"
    text += f"({move.reads[0]}, {move.ends}, [{weights}]{count})"
    inside = {*move.makes}
    read = dict.fromkeys([*move.reads, *(name for each in products for name in each.reads)])
    reads = tuple(name for name in read if name not in inside)
    return Line(text, reads, (*(product.makes[0] for product in products), *gap))


def _ends(product: ProductLine, move: MoveLine) -> bool:
    """Return whether a conversion makes the sum of a product without a bias, whose weight waits."""
    bias = product.weights.split(", ")[1]
    fits = move.reads[0] == product.makes[0] and product.pending == (move.group,)
    return bool(fits and product.gap and bias == "None")


def _then_moved(product: ProductLine, move: MoveLine) -> Line:
    """Return one line in place of a product and the conversion of its result."""
    weights = ", ".join(f"({pair})" for pair in move.weights)
    text = f"{move.makes[0]}, {move.gap or '_'} = overlap.{product.function}_then_convert"
    text += f"({product.x}, {product.weights.split(', ')[0]}, {move.ends}, [{weights}], "
    text += f"gap={product.gap}, place={product.place})"
    inside = {*product.makes}
    read = dict.fromkeys(name for name in (*product.reads, *move.reads) if name not in inside)
    return Line(text, tuple(read), (move.makes[0], *([move.gap] if move.gap else [])))
