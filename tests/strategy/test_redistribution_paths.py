"""Every way between two layouts of a mesh of two axes, both directions, against parts of the whole.

The ways are those that plans take: the cheapest sequences of moves on single axes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from autoparallel.cost.hardware import Link, find_hardware
from autoparallel.mesh import Mesh
from autoparallel.placement import (
    Invariant,
    Layout,
    Movement,
    Partial,
    Replicate,
    Shard,
    Step,
    is_possible_step,
    layout_gradient,
    layout_text,
    local_layout_size,
)
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.strategy.mesh_strategies import is_nested
from autoparallel.strategy.redistribution_paths import RedistributionPaths

# Dim 0 can be cut by both axes; 7 divides by no axis, and 5 runs of 2 by neither.
SHAPE = (12, 7, 10)
SHARDS = (Shard(0), Shard(1), Shard(0, blocks=2), Shard(2, unit=2))
PLACEMENTS = (Invariant(), Replicate(), *SHARDS, Partial())
MESHES = ((2, 2), (2, 3))
Sizes = tuple[int, ...]


def routes(sizes: Sizes, inner_is_slow: bool = False) -> RedistributionPaths:
    """All ways of a tensor of SHAPE in float64, with a gradient; one axis is the faster one."""
    links = [Link.ring(1e9, 1e-5, 1e-5), Link.ring(1e10, 1e-6, 1e-6)]
    if inner_is_slow:
        links.reverse()
    nbytes = 8 * torch.Size(SHAPE).numel()
    universe = (PLACEMENTS, PLACEMENTS)
    return RedistributionPaths(
        SHAPE, nbytes, True, universe, sizes, tuple(links), find_hardware("cpu"), lambda _: True
    )


def layouts(sizes: Sizes) -> list[Layout]:
    """All that a tensor of SHAPE may have."""
    pairs = product(PLACEMENTS, PLACEMENTS)
    return [layout for layout in pairs if is_nested(SHAPE, layout, sizes)]


def spread(whole: torch.Tensor, layout: Layout, sizes: Sizes) -> list[torch.Tensor]:
    """What every rank holds; pending sums are uneven and of mixed signs."""
    weights = []
    for axis, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(axis)
        rows = torch.randn(size, *whole.shape, generator=generator, dtype=whole.dtype)
        rows[0] = 1 - rows[1:].sum(0)
        weights.append(rows)
    parts = []
    for place in product(*map(range, sizes)):
        own = whole
        for axis, placement in enumerate(layout):
            if isinstance(placement, Partial):
                own = own * weights[axis][place[axis]]
        parts.append(take_layout_part(own, layout, sizes, place).contiguous())
    return parts


def is_spread(parts: list[torch.Tensor], whole: torch.Tensor, layout: Layout, sizes: Sizes) -> bool:
    """Whether every rank holds what the layout says of `whole`, sums over pending axes."""
    places = list(product(*map(range, sizes)))
    pending = [isinstance(placement, Partial) for placement in layout]
    for place in places:
        alike = [
            part
            for part, other in zip(parts, places, strict=True)
            if all(p or a == b for p, a, b in zip(pending, place, other, strict=True))
        ]
        expected = take_layout_part(whole, layout, sizes, place)
        if any(part.shape != expected.shape for part in alike):
            return False
        if not torch.allclose(torch.stack(alike).sum(0), expected, rtol=1e-12, atol=1e-12):
            return False
    return True


def travel(x: torch.Tensor, ranks: Ranks, source: Layout, steps: tuple[Step, ...]) -> torch.Tensor:
    """One move after the other, as an emitted program makes them."""
    layout = source
    for step in steps:
        assert is_possible_step(layout, step)
        size = 0
        if isinstance(step.source, Shard):
            dim = step.source.dim
            others = (*layout[: step.axis], Invariant(), *layout[step.axis + 1 :])
            size = local_layout_size(SHAPE[dim], dim, others, ranks.sizes, ranks.coordinates)
        x = convert(x, ranks.groups[step.axis], step.source, step.target, size)
        layout = step.applied(layout)
    return x


@pytest.mark.parametrize(
    ("sizes", "inner_is_slow"),
    [
        ((2, 2), False),
        pytest.param((2, 3), False, marks=pytest.mark.broad),
        pytest.param((2, 2), True, marks=pytest.mark.broad),
        pytest.param((2, 3), True, marks=pytest.mark.broad),
    ],
)
def test_values_and_gradients_arrive(sizes: Sizes, inner_is_slow: bool) -> None:
    """For every pair of layouts between which there is a way, also of several moves."""
    known, forms = routes(sizes, inner_is_slow), layouts(sizes)
    table = known.seconds(tuple(forms))[[known.cells[form] for form in forms]]
    trips = [
        (forms[one], forms[two], known.steps(forms[one], forms[two]))
        for one, two in np.argwhere(np.isfinite(table))
        if one != two
    ]
    assert len(trips) == len(forms) * (len(forms) - 1)
    assert max(len(steps) for _, _, steps in trips) == 3
    generator = torch.Generator().manual_seed(0)
    whole, seed = (torch.randn(SHAPE, generator=generator).double() for _ in range(2))
    starts = {form: spread(whole, form, sizes) for form in forms}
    seeds = {form: spread(seed, layout_gradient(form), sizes) for form in forms}

    def work(ranks: Ranks) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        for source, target, steps in trips:
            mine = starts[source][ranks.rank].clone().requires_grad_()
            made = travel(mine, ranks, source, steps)
            made.backward(seeds[target][ranks.rank])
            assert mine.grad is not None
            found.append((made.detach(), mine.grad))
        return found

    by_rank = run_ranks(thread_ranks(Mesh(outer=sizes[0], inner=sizes[1])), work)
    for (source, target, steps), parts in zip(trips, zip(*by_rank, strict=True), strict=True):
        where = f"{layout_text(source)} -> {layout_text(target)} by {', '.join(map(str, steps))}"
        assert is_spread([value for value, _ in parts], whole, target, sizes), where
        back = layout_gradient(source)
        assert is_spread([grad for _, grad in parts], seed, back, sizes), where


@pytest.mark.parametrize("sizes", MESHES)
def test_seconds_are_those_of_the_moves(sizes: Sizes) -> None:
    """Of every way, in all its parts; and none over one more layout, of more moves, would save more
    than 1%.
    """
    known, forms = routes(sizes), tuple(layouts(sizes))
    cells = [known.cells[form] for form in forms]
    table = known.seconds(forms)[cells]
    parts = known.forward_seconds(forms), *known.copied_seconds(forms)
    for one, source in enumerate(forms):
        for two, target in enumerate(forms):
            seconds, layout = 0.0, source
            own = np.zeros(len(parts))
            for step in known.steps(source, target):
                place = (*(known.universe[a].index(p) for a, p in enumerate(layout)),)
                end = known.universe[step.axis].index(step.target)
                seconds += known.moves[step.axis][(*place, end)]
                moves = known.forwards, *known.copies
                own += [every[step.axis][(*place, end)] for every in moves]
                layout = step.applied(layout)
            assert layout == target
            assert own == pytest.approx([part[cells[one], two] for part in parts], rel=1e-9)
            assert seconds == pytest.approx(table[one, two], rel=1e-9)
    over = (table[:, :, None] + table[None]).min(axis=1)
    assert (table <= over * 1.01).all()


@pytest.mark.parametrize("sizes", MESHES)
def test_nothing_that_changes_the_meaning_is_free(sizes: Sizes) -> None:
    """A pending sum is added up or scattered, never taken for the value or for a mean; and what
    was added up becomes pending again on one rank alone. Parts become the whole by sending them.
    """
    known, forms = routes(sizes), tuple(layouts(sizes))
    table = known.seconds(forms)[[known.cells[form] for form in forms]]
    sends = {Movement.ALL_REDUCE, Movement.REDUCE_SCATTER}
    for one, source in enumerate(forms):
        for two, target in enumerate(forms):
            steps = known.steps(source, target)
            for axis in range(2):
                moves = {step.forward for step in steps if step.axis == axis}
                back = {step.backward for step in steps if step.axis == axis}
                if source[axis] == Partial() != target[axis]:
                    assert moves & sends
                    assert table[one, two] > 0
                if source[axis] != Partial() == target[axis]:
                    assert moves & {Movement.KEEP_ON_FIRST, Movement.PAD}
                if isinstance(source[axis], Shard) and source[axis] != target[axis]:
                    assert moves - {Movement.NONE}
                if source[axis] == Invariant() and target[axis] == Replicate():
                    assert back & sends


def bucketed(is_allowed: Callable[[Step], bool] = lambda _: True) -> RedistributionPaths:
    """The ways of a parameter of SHAPE, whose gradient may wait for those of others."""
    hardware, sizes = find_hardware("cpu"), (2, 2)
    universe = ((Invariant(), Replicate(), Shard(0), Partial()),) * 2
    links = hardware.links(sizes)
    return RedistributionPaths(SHAPE, 960, True, universe, sizes, links, hardware, is_allowed, True)


def test_only_first_steps_are_in_a_bucket() -> None:
    """A gather by a padded sum, and I->R after it, would have been the cheaper way."""
    known, source, target = bucketed(), (Shard(0), Invariant()), (Replicate(), Replicate())
    assert known.steps(source, target) == (
        Step(1, Invariant(), Replicate()),
        Step(0, Shard(0), Replicate()),
    )
    whole, first = (Invariant(), Invariant()), (Replicate(), Invariant())
    (seconds,) = known.seconds((first,))[known.cells[whole]]
    assert 0 < seconds < 1e-5
    # The same step later on the way is a collective of its own.
    late = known.moves[0][known.universe[0].index(Invariant()), 0, 1]
    assert late > 10 * seconds


def test_a_step_that_is_not_allowed_is_in_no_bucket() -> None:
    """It costs more than nothing: the way goes otherwise, or there is none."""
    known = bucketed(lambda step: (step.source, step.target) != (Invariant(), Replicate()))
    whole, first = (Invariant(), Invariant()), (Replicate(), Invariant())
    (seconds,) = known.seconds((first,))[known.cells[whole]]
    assert seconds > 1e-5
