"""Cases of a sweep that `make test` leaves to `make broad`, where all of them run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["broad", "one_of_each", "share_of"]


def broad(*cases: Any) -> list[Any]:
    """Return cases for parametrize that run in `make broad` alone.

    A case of several values is a tuple, as for parametrize.

        @pytest.mark.parametrize("world_size", [*broad(2), 3])
    """
    return list(map(_broad, cases))


def one_of_each(cases: Iterable[Any], is_kept: Callable[[Any], bool]) -> list[Any]:
    """Return all cases in their order; those that are not kept run in `make broad` alone."""
    return [case if is_kept(case) else _broad(case) for case in cases]


def share_of(cases: Iterable[Any], every: int) -> list[Any]:
    """Return all cases in their order; but for the first of every so many, they run in `make broad`
    alone.

    It is for sweeps whose cases go one way through the code: each shows the same of another model.
    """
    return [case if number % every == 0 else _broad(case) for number, case in enumerate(cases)]


def _broad(case: Any) -> Any:
    if hasattr(case, "marks"):
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.broad], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.broad)
