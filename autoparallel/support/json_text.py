"""JSON that comes from elsewhere: read with bounds, so that no text can do more than be refused."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["NUMBERS_BELOW", "read_json", "read_other_json"]

# Texts of the project nest less than ten deep. Whoever walks what was read may recurse so far.
_DEEPEST = 48
# Far above the plan of any model, and far below what would fill a machine's memory.
_MOST_CHARACTERS = 2**28
# Sizes, bytes and counts fit into 64 bits; arithmetic on wider integers takes as long as they are.
NUMBERS_BELOW = 2**63
_MOST_DIGITS = len(str(NUMBERS_BELOW))


def read_json(text: str, finite: bool = True) -> Any:
    """Return what a JSON text says.

    finite: whether numbers that are not finite are refused here, and not by who reads the entry.

    Raises ValueError for a text that is no JSON, or that has what no text of the project has:
    numbers that are not finite or do not fit into 64 bits, one key twice, nesting without end.

    >>> read_json('{"tp": [2, 4]}')
    {'tp': [2, 4]}
    >>> read_json('{"tp": Infinity}')
    Traceback (most recent call last):
    ValueError: Infinity is no number that can be used
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters, more than {_MOST_CHARACTERS}")
    try:
        content = json.loads(
            text,
            parse_constant=_refuse_number if finite else None,
            parse_int=_integer,
            parse_float=_float if finite else None,
            object_pairs_hook=_distinct,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _require_shallow(content)
    return content


def read_other_json(text: str) -> Any:
    """Return what a JSON text of another program says: a corpus, a configuration, an index.

    It may have any numbers. Raises ValueError for a text that is no JSON, nested without end, too.

    >>> read_other_json('{"loss": NaN, "loss": 1e999}')
    {'loss': inf}
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_number(text: str) -> Any:
    """Raise ValueError for NaN and infinity, which Python's reader takes and JSON does not have."""
    raise ValueError(f"{text[:40]} is no number that can be used")


def _integer(text: str) -> int:
    """Return a whole number of at most 64 bits."""
    # The length is looked at first: to read very many digits takes longer than all else.
    if len(text) > _MOST_DIGITS + 1 or abs(int(text)) >= NUMBERS_BELOW:
        _refuse_number(text)
    return int(text)


def _float(text: str) -> float:
    """Return a finite number: "1e999" reads as infinity."""
    number = float(text)
    if not math.isfinite(number):
        _refuse_number(text)
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a table of these entries, of which no two may have one key."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key is there twice")
    return table


def _require_shallow(content: Any) -> None:
    """Raise ValueError where lists and tables are nested deeper than any text of the project."""
    level: list[Any] = [[content]]
    for _ in range(_DEEPEST):
        level = [
            item
            for group in level
            for item in (group.values() if isinstance(group, dict) else group)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")
