"""The prices of paths in whatever order equal axes have their placements bound every path."""

from __future__ import annotations

import numpy as np
import pytest

from autoparallel.cost.hardware import find_hardware
from autoparallel.placement import Invariant, Partial, Replicate, Shard
from autoparallel.strategy.arranged_paths import ArrangedPaths
from autoparallel.strategy.equal_axes import arranged_layout, equal_axes
from autoparallel.strategy.mesh_strategies import is_nested
from autoparallel.strategy.redistribution_paths import RedistributionPaths

SHAPE, SIZES = (12, 8, 10), (2, 2, 2)
UNIVERSE = ((Invariant(), Replicate(), Shard(0), Shard(1), Partial()),) * 3


@pytest.mark.parametrize("machine", ["cpu", "dgx-a100"])
@pytest.mark.parametrize("together", [False, True])
def test_no_path_is_shorter(machine: str, together: bool) -> None:
    """Between any two layouts; together: I->R is cheaper at the beginning, in a bucket with those
    of other gradients, also where another order of the axes would have no I and R on the same one.
    """
    hardware = find_hardware(machine)
    links = hardware.links(SIZES)
    groups = equal_axes(SIZES, links)
    assert groups == ((0, 1, 2),)
    given = (SHAPE, 7680, True, UNIVERSE, SIZES, links, hardware, lambda _: True, together)
    every, some = RedistributionPaths(*given), ArrangedPaths(*given, groups)
    rows = [one for one in every.cells if is_nested(SHAPE, one, SIZES)]
    targets = tuple(rows[::3])
    arranged = tuple(arranged_layout(one, groups) for one in targets)
    cells = [every.cells[one] for one in rows]
    arranged_cells = [some.cells[arranged_layout(one, groups)] for one in rows]
    real, bound = every.seconds(targets)[cells], some.seconds(arranged)[arranged_cells]
    assert np.all(bound <= real * (1 + 1e-9))
    # Somewhere the order is of no use, and nothing is above the bound.
    assert np.any((bound > 0) & (bound >= real * (1 - 1e-9)))
    for way in ("forward_seconds", "backward_seconds"):
        passed = getattr(every, way)(targets)[cells]
        least = getattr(some, way)(arranged)[arranged_cells]
        assert np.all((least <= passed * (1 + 1e-9)) | np.isinf(real)), way
