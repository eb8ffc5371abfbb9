"""A plan's values as rows of JSON, and back: layouts become texts, tuples become lists."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from autoparallel.errors import PlanError
from autoparallel.placement import Layout, Step, layout_text, parse_layout, parse_placement
from autoparallel.support.json_text import NUMBERS_BELOW, read_json

__all__ = ["VERSION", "broken_plan", "read_rows", "row_of", "typed", "value_of"]

# Version 2 has grown: what is new since its first texts may be absent, and then has a default.
VERSION = 2


def row_of(value: Any) -> dict[str, Any]:
    """Return one of a plan's frozen values as a row: a dict that JSON can write.

    value: an instance of a class of choices.py. The keys are its fields, in their order.

    >>> from autoparallel.plan.choices import Break
    >>> row_of(Break("head", "", "a branch on a value"))
    {'path': 'head', 'line': '', 'reason': 'a branch on a value', 'flops': 0.0}
    """
    row: dict[str, Any] = {}
    for field in fields(value):
        content = getattr(value, field.name)
        # The annotation decides, because an empty tuple does not show what it is a tuple of.
        match field.type:
            case "Layout":
                row[field.name] = layout_text(content)
            case "tuple[Layout, ...]":
                row[field.name] = [layout_text(layout) for layout in content]
            case "tuple[Step, ...]":
                row[field.name] = [[s.axis, str(s.source), str(s.target)] for s in content]
            case _:
                row[field.name] = list(content) if isinstance(content, tuple) else content
    return row


def value_of(kind: Any, row: Any) -> Any:
    """Return the frozen value of class `kind` that `row_of` has written as `row`.

    kind: a class of choices.py. Fields that the row lacks get their defaults. Raises TypeError for
    keys that are no fields, for missing fields without a default and for contents of another type
    than the field's, and ValueError for texts that are no layouts.

    >>> from autoparallel.plan.choices import Break
    >>> value_of(Break, {"path": "head", "line": "", "reason": "a branch on a value"})
    Break(path='head', line='', reason='a branch on a value', flops=0.0)
    >>> value_of(Break, {"path": "head", "line": "", "reason": 7})
    Traceback (most recent call last):
    TypeError: reason of Break is 7, and no str
    """
    if not isinstance(row, dict):
        raise TypeError(f"{kind.__name__} is {_short(row)}, and no table")
    types = _types(kind)
    unknown = [name for name in row if name not in types]
    if unknown:
        raise TypeError(f"{kind.__name__} has no {_short(unknown[0])}")
    contents = {
        name: typed(types[name], content, f"{name} of {kind.__name__}")
        for name, content in row.items()
    }
    return kind(**contents)


def typed(kind: str, content: Any, what: str) -> Any:
    """Return the content of a JSON row as a value of a type; lists become tuples.

    kind: the type as it is annotated, one of those that plans have. what: is named in errors.
    Raises TypeError for a content of another type, and ValueError for one out of range.

    >>> typed("tuple[int, ...]", [3, 4], "shape"), str(typed("Layout", "P", "storage")[0])
    ((3, 4), 'P')
    """
    if kind.startswith("tuple["):
        if not isinstance(content, list):
            raise TypeError(f"{what} is {_short(content)}, and no list")
        inner = kind.removeprefix("tuple[").removesuffix("]").removesuffix(", ...")
        return tuple([typed(inner, item, what) for item in content])
    return _READERS[kind](content, what)


@cache
def _types(kind: Any) -> dict[str, str]:
    """Return the types of a class's fields, as they are annotated, by name."""
    return {field.name: str(field.type) for field in fields(kind)}


# Halves of letters cannot be printed, and nothing behind the end of a text is looked at.
_HIDING = re.compile("[\0\ud800-\udfff]")


def _text(content: Any, what: str) -> str:
    """Return a text. One that no file can hold, or that hides what it says, is none."""
    if not isinstance(content, str):
        raise TypeError(f"{what} is {_short(content)}, and no str")
    if _HIDING.search(content):
        raise ValueError(f"{what} has characters that are none")
    return content


def _integer(content: Any, what: str) -> int:
    """Return a whole number that is not negative; True is none."""
    if type(content) is not int:
        raise TypeError(f"{what} is {_short(content)}, and no int")
    if not 0 <= content < NUMBERS_BELOW:
        raise ValueError(f"{what} is {_short(content)}")
    return content


def _number(content: Any, what: str) -> float:
    """Return a finite number, whole or not."""
    if type(content) not in (int, float):
        raise TypeError(f"{what} is {_short(content)}, and no float")
    if not math.isfinite(content):
        raise ValueError(f"{what} is {_short(content)}")
    number: float = content
    return number


def _truth(content: Any, what: str) -> bool:
    """Return a truth value."""
    if not isinstance(content, bool):
        raise TypeError(f"{what} is {_short(content)}, and no bool")
    return content


def _layout(content: Any, what: str) -> Layout:
    """Return a layout."""
    return parse_layout(_text(content, what))


def _step(content: Any, what: str) -> Step:
    """Return one step of a conversion."""
    if not isinstance(content, list) or len(content) != 3:
        raise TypeError(f"{what} has {_short(content)}, and no axis and two placements")
    axis, source, target = content
    ends = (parse_placement(_text(end, what)) for end in (source, target))
    return Step(_integer(axis, what), *ends)


_READERS: Mapping[str, Callable[[Any, str], Any]] = {
    "str": _text,
    "int": _integer,
    "float": _number,
    "bool": _truth,
    "Layout": _layout,
    "Step": _step,
}


def _short(content: Any) -> str:
    """Return what an error shows of a content."""
    text = repr(content)
    return text if len(text) < 60 else f"{text[:60]}..."


def read_rows(text: str) -> dict[str, Any]:
    """Return the rows of a plan's JSON text, of this version.

    Raises PlanError where the text is no JSON object with a version, and for another version.
    """
    if not isinstance(text, str):
        raise broken_plan(f"a {type(text).__name__}, and no text")
    try:
        rows: Any = read_json(text)
    except ValueError as error:
        raise broken_plan(f"the text is not a plan's JSON: {error}") from None
    if not isinstance(rows, dict) or "version" not in rows:
        raise broken_plan("the text is not a plan's JSON")
    version = rows["version"]
    if type(version) is not int or version != VERSION:
        raise PlanError(
            f"a plan of version {_short(version)}", fix=f"plan again (version {VERSION})"
        )
    return rows


def broken_plan(why: str) -> PlanError:
    """Return the error to raise for a text from which no plan can be read."""
    fix = "give the whole text that plan.to_json() wrote"
    return PlanError("not a plan", why=why, fix=fix)
