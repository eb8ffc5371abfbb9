"""Ways to store a parameter: each is one that a plan may have."""

from __future__ import annotations

import pytest
import torch

from autoparallel.graph.graph import Value
from autoparallel.placement import Shard
from autoparallel.strategy.parameter_storage import storage_choices


@pytest.mark.parametrize(
    ("shape", "dims"), [((0,), set()), ((0, 6), {1}), ((6, 0), {0}), ((6, 4), {0}), ((5, 4), {1})]
)
def test_a_dim_without_elements_is_not_split(shape: tuple[int, ...], dims: set[int]) -> None:
    """It divides by any number of ranks, but there is nothing to split."""
    value = Value("w", shape, torch.float32, True)
    choices = storage_choices(value, ((),), (2,), spread_state=True, scattered_gradients=True)
    layouts = [layout for stored in choices for layout in (stored.storage, stored.state)]
    split = {cut.dim for layout in layouts for cut in layout if isinstance(cut, Shard)}
    assert split == dims
