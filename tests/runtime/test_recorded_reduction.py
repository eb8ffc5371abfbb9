"""A reduction that is recorded brings what `reduced` does, and its derivatives are conversions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Layout, Partial, Shard, gradient
from autoparallel.runtime.joint_moves import reduced
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.recorded_reduction import recorded_reduction
from autoparallel.runtime.tensor_parts import join_layout, take_layout_part

I, P = Invariant(), Partial()  # noqa: E741
SHAPE = (12, 6)
PAIRS = {
    "a sum": ((P, I), (I, I)),
    "a sum in parts": ((P, P), (Shard(0), I)),
    "units": ((Shard(0, unit=3), I), (Shard(0), I)),
    "unequal blocks, and a sum": ((P, Shard(0, blocks=(4, 1, 1))), (I, Shard(0))),
    "parts that are shared": ((Shard(0, repeat=2, pending=True), I), (Shard(0), I)),
    "shared, and pending no more": ((Shard(0, repeat=2, pending=True), P), (Shard(0, repeat=2), I)),
    "a dim cut twice, anew": ((Shard(0, blocks=2), Shard(0)), (Shard(0), Shard(0))),
    "parts of a part": ((Shard(0), P), (Shard(0), Shard(0))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_derivatives(name: str) -> None:
    have, want = PAIRS[name]
    every = thread_ranks(Mesh(outer=2, inner=2))
    generator = torch.Generator().manual_seed(1)
    locals_ = [_like(have, rank) for rank in every]
    incoming = torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    def work(ranks: Ranks) -> Any:
        part = locals_[ranks.rank].clone().requires_grad_()
        found = recorded_reduction(part * 1, have, want, SHAPE, ranks)
        (plain,) = reduced([part.detach()], [have], [want], [SHAPE], ranks)
        coming = take_layout_part(incoming, want, ranks.sizes, ranks.coordinates)
        (back,) = torch.autograd.grad(found, part, coming)
        return found.detach(), plain, back

    results = run_ranks(every, work)
    for found, plain, _ in results:
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    # The whole value is what it was, and so is the whole of what comes back.
    back_layout = tuple(map(gradient, have))
    if not any(isinstance(each, Shard) and each.repeat != 1 for each in (*have, *want)):
        back = join_layout([row[2] for row in results], back_layout, every[0].sizes)
        torch.testing.assert_close(back, incoming, rtol=1e-12, atol=1e-12)


def _like(layout: Layout, ranks: Ranks) -> torch.Tensor:
    """Return numbers of a rank in the shape of its part; the same where ranks hold the same."""
    cut = tuple(each if isinstance(each, Shard) else I for each in layout)
    part = take_layout_part(torch.zeros(SHAPE), cut, ranks.sizes, ranks.coordinates)
    differs = [isinstance(each, (Partial, Shard)) for each in layout]
    place = sum(
        (7 * axis + 1) * rank
        for axis, (rank, other) in enumerate(zip(ranks.coordinates, differs, strict=True))
        if other
    )
    return torch.randn(
        part.shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64
    )
