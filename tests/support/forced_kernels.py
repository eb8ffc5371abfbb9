"""Plans in which ops are run by kernels that are asked for, whatever they cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import autoparallel.strategy.build_network as building
from autoparallel.rules.strategies import Strategy, strategies


@contextmanager
def only_by(*kernels: str, ranks: int) -> Iterator[None]:
    """Have ops that one of these kernels can run be run by it, on mesh axes of so many ranks."""

    def chosen(*arguments: Any) -> tuple[Strategy, ...]:
        every = strategies(*arguments)
        wanted = tuple(each for each in every if each.kernel and each.kernel.name in kernels)
        return wanted if wanted and arguments[-1] == ranks else every

    before = building.strategies
    building.strategies = chosen
    try:
        yield
    finally:
        building.strategies = before
