"""Arguments of public functions that are something else than the function takes."""

from __future__ import annotations

from typing import Any

from autoparallel.errors import AutoParallelError

__all__ = ["MAKE_ONE", "require_kind"]

# How to get a plan, or the text of one back.
MAKE_ONE = "make a plan: autoparallel.make_plan(model, world_size); Plan.from_json(text) reads one"


def require_kind(value: Any, kind: type, fix: str) -> None:
    """Raise AutoParallelError where `value` is not of this kind. fix: how to get one."""
    if not isinstance(value, kind):
        raise AutoParallelError(
            f"a {type(value).__name__} is given in place of a {kind.__name__}", fix=fix
        )
