"""A plan's values as rows of JSON, and back: layouts become texts, tuples become lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autoparallel.errors import PlanError
from autoparallel.placement import Step, layout_text, parse_layout, parse_placement

__all__ = ["VERSION", "broken_plan", "read_rows", "row_of", "value_of"]

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


def value_of(kind: Any, row: Mapping[str, Any]) -> Any:
    """Return the frozen value of class `kind` that `row_of` has written as `row`.

    kind: a class of choices.py. Fields that the row lacks get their defaults. Raises TypeError for
    keys that are no fields and for missing fields without a default, and ValueError for texts that
    are no layouts.

    >>> from autoparallel.plan.choices import Break
    >>> value_of(Break, {"path": "head", "line": "", "reason": "a branch on a value"})
    Break(path='head', line='', reason='a branch on a value', flops=0.0)
    """
    types = {field.name: field.type for field in fields(kind)}
    contents: dict[str, Any] = {}
    for name, content in row.items():
        match types.get(name):
            case "Layout":
                contents[name] = parse_layout(content)
            case "tuple[Layout, ...]":
                contents[name] = tuple(map(parse_layout, content))
            case "tuple[Step, ...]":
                contents[name] = tuple(
                    Step(axis, parse_placement(source), parse_placement(target))
                    for axis, source, target in content
                )
            case _:
                contents[name] = tuple(content) if isinstance(content, list) else content
    return kind(**contents)


def read_rows(text: str) -> dict[str, Any]:
    """Return the rows of a plan's JSON text, of this version.

    Raises PlanError where the text is no JSON object with a version, and for another version.
    """
    try:
        rows: dict[str, Any] = json.loads(text)
        version = rows["version"]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise broken_plan("the text is not a plan's JSON") from None
    if version != VERSION:
        raise PlanError(f"a plan of version {version}", fix=f"plan again (version {VERSION})")
    return rows


def broken_plan(why: str) -> PlanError:
    """Return the error to raise for a text from which no plan can be read."""
    fix = "give the whole text that plan.to_json() wrote"
    return PlanError("not a plan", why=why, fix=fix)
