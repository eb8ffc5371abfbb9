"""Parts of tensors on meshes of several axes: taken, joined, gathered, reduced, described."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.parallel.parameters import ParameterLayouts
from autoparallel.placement import (
    Invariant,
    Layout,
    Partial,
    Placement,
    Shard,
    local_layout_size,
    whole_layout,
)
from autoparallel.runtime.joint_moves import gathered, reduced
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.tensor_parts import (
    join_layout,
    layout_pieces,
    require_refined,
    take_layout_part,
)

SHAPE = (24, 5)
MESHES = (Mesh(a=2, b=3), Mesh(a=3, b=1, c=2))
CUTS: tuple[Placement, ...] = (Invariant(), Shard(0), Shard(1), Shard(0, blocks=2))


def layouts(axes: int) -> Iterator[Layout]:
    """All ways to cut; a dim is cut twice in the same way only."""
    for layout in itertools.product(CUTS, repeat=axes):
        first = {p.dim: p for p in layout if isinstance(p, Shard)}
        if all(first[p.dim] == p for p in layout if isinstance(p, Shard)):
            yield layout


def sizes_of(mesh: Mesh) -> tuple[int, ...]:
    return tuple(size for _, size in mesh.axes)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_parts_make_up_the_whole(mesh: Mesh) -> None:
    """Joined they are; their pieces are where they say; their sizes are those predicted."""
    whole, sizes = torch.arange(math.prod(SHAPE)).view(SHAPE), sizes_of(mesh)
    for layout in layouts(len(sizes)):
        places = list(itertools.product(*map(range, sizes)))
        parts = [take_layout_part(whole, layout, sizes, place) for place in places]
        assert torch.equal(join_layout(parts, layout, sizes), whole), layout
        for place, part in zip(places, parts, strict=True):
            predicted = [
                local_layout_size(size, dim, layout, sizes, place) for dim, size in enumerate(SHAPE)
            ]
            assert list(part.shape) == predicted
            seen = torch.zeros_like(part)
            for start, at, lengths in layout_pieces(whole.shape, layout, sizes, place):
                here = tuple(slice(a, a + n) for a, n in zip(at, lengths, strict=True))
                there = tuple(slice(a, a + n) for a, n in zip(start, lengths, strict=True))
                assert torch.equal(part[here], whole[there])
                seen[here] += 1
            assert (seen == 1).all()


def test_pieces_that_touch_are_one() -> None:
    """Two axes that cut the same dim leave one rectangle, unless blocks lie apart."""
    shape = torch.Size((24,))
    assert layout_pieces(shape, (Shard(0), Shard(0)), (2, 2), (1, 0)) == [((12,), (0,), (6,))]
    blocks = Shard(0, blocks=2)
    assert layout_pieces(shape, (blocks, blocks), (2, 2), (1, 0)) == [
        ((6,), (0,), (3,)),
        ((18,), (3,), (3,)),
    ]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_gathering_and_reducing(mesh: Mesh) -> None:
    """All at once, from parts to wholes, and from every rank's own gradient to parts of the sum."""
    sizes = sizes_of(mesh)
    generator = torch.Generator().manual_seed(0)
    found = list(layouts(len(sizes)))
    wholes = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in found]
    addends = torch.randn((mesh.world_size, len(found), *SHAPE), generator=generator)
    addends = addends.double()

    def work(ranks: Ranks) -> None:
        parts = [
            take_layout_part(whole, layout, sizes, ranks.coordinates)
            for whole, layout in zip(wholes, found, strict=True)
        ]
        coarse = [whole_layout(len(sizes))] * len(found)
        made = gathered(parts, found, coarse, [SHAPE] * len(found), ranks)
        assert all(map(torch.equal, made, wholes))
        assert ranks.counts["all_gather"] <= len(sizes)
        given: list[Layout] = [(Partial(),) * len(sizes)] * len(found)
        shapes = [SHAPE] * len(found)
        sums = reduced(list(addends[ranks.rank]), given, found, shapes, ranks)
        for own, total, layout in zip(sums, addends.sum(0), found, strict=True):
            expected = take_layout_part(total, layout, sizes, ranks.coordinates)
            assert own.is_contiguous()
            torch.testing.assert_close(own, expected)
        counts = ranks.counts
        assert counts["reduce_scatter"] <= len(sizes)
        assert counts["all_reduce"] <= len(sizes)
        same = reduced(wholes, [whole_layout(len(sizes))] * len(found), found, shapes, ranks)
        assert all(map(torch.equal, same, parts))
        assert ranks.counts == counts

    run_ranks(thread_ranks(mesh), work)


def test_what_is_split_in_other_places_is_cut_anew() -> None:
    """From every layout to every other that splits the same dims, values and pending sums."""
    shape, sizes, ranks_of_mesh = (36, 5), (2, 3), thread_ranks(Mesh(a=2, b=3))
    generator = torch.Generator().manual_seed(0)
    # Three runs of twelve are no equal parts for two ranks.
    cuts = (Invariant(), Shard(0), Shard(1), Shard(0, blocks=3), Shard(0, unit=12))
    usual = [
        (outer, inner)
        for outer, inner in itertools.product(cuts, repeat=2)
        if getattr(outer, "dim", 2) != getattr(inner, "dim", 3) or inner == Shard(0)
    ]
    dims = {layout: tuple(getattr(cut, "dim", -1) for cut in layout) for layout in usual}
    pairs = [(have, want) for have in usual for want in usual if dims[have] == dims[want]]
    assert len(pairs) > 2 * len(usual)
    wholes = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in pairs]

    def work(ranks: Ranks) -> None:
        expected = [
            take_layout_part(whole, want, sizes, ranks.coordinates)
            for whole, (_, want) in zip(wholes, pairs, strict=True)
        ]
        held = [
            take_layout_part(whole, have, sizes, ranks.coordinates)
            for whole, (have, _) in zip(wholes, pairs, strict=True)
        ]
        had, wanted = zip(*pairs, strict=True)
        shapes = [shape] * len(pairs)
        assert all(map(torch.equal, gathered(held, had, wanted, shapes, ranks), expected))
        assert ranks.counts["all_gather"] <= len(sizes)
        assert all(map(torch.equal, reduced(held, had, wanted, shapes, ranks), expected))
        # A pending sum on the outer axis: every rank there has another addend.
        share = (ranks.coordinates[0] + 1.5) / sum(n + 1.5 for n in range(sizes[0]))
        given = [(Partial(), *have[1:]) for have in had]
        wished = [(Invariant(), *want[1:]) for want in wanted]
        addends = [
            take_layout_part(whole, have, sizes, ranks.coordinates) * share
            for whole, have in zip(wholes, given, strict=True)
        ]
        sums = reduced(addends, given, wished, shapes, ranks)
        for total, whole, want in zip(sums, wholes, wished, strict=True):
            part = take_layout_part(whole, want, sizes, ranks.coordinates)
            torch.testing.assert_close(total, part)

    run_ranks(ranks_of_mesh, work)


def test_what_is_updated_is_cut_from_what_computes() -> None:
    """An outer cut of a dim that an inner axis cuts already would not be."""
    split, whole = Shard(0), Invariant()
    require_refined((whole, whole), (split, split), "w")
    require_refined((whole, split), (Shard(1), split), "w")
    require_refined((split, whole), (split, split), "w")
    for coarse, fine in (
        ((whole, split), (split, split)),
        ((split, whole), (whole, whole)),
        ((split, whole), (Shard(1), whole)),
    ):
        with pytest.raises(PlanError, match="w cannot be"):
            require_refined(coarse, fine, "w")


def test_a_gradient_is_cut_at_once_where_it_is_held_so() -> None:
    """But not inside a cut of the same dim that comes later."""
    whole, split, pending = Invariant(), Shard(0), Partial()
    late = ParameterLayouts((4, 4), (whole, whole), (whole, whole), (split, split))
    assert late.reduced_first((pending, pending)) == (pending, pending)
    early = ParameterLayouts((4, 4), (whole, whole), (split, split), (split, split))
    assert early.reduced_first((pending, whole)) == (split, split)
    inner = ParameterLayouts((4, 4), (whole, whole), (whole, split), (split, split))
    assert inner.reduced_first((pending, pending)) == (pending, pending)
    apart = ParameterLayouts((4, 4), (whole, whole), (whole, Shard(1)), (split, Shard(1)))
    assert apart.reduced_first((pending, pending)) == (pending, Shard(1))
