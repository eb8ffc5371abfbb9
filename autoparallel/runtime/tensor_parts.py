"""Whole tensors and the parts of them that the ranks of a mesh of several axes hold.

Where two axes split the same dim, the outer one cuts first: parts are taken from the outermost axis
inwards, and put together from the innermost outwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from autoparallel.errors import PlanError
from autoparallel.placement import (
    Invariant,
    Layout,
    Partial,
    Placement,
    Shard,
    block_runs,
    layout_text,
    local_layout_size,
)
from autoparallel.runtime.axis_parts import join_parts, put_part, take_part
from autoparallel.runtime.collectives import (
    exchange_together,
    gather_together,
    start_reduce_scatter_together,
    start_sum_together,
)
from autoparallel.runtime.ranks import Ranks

__all__ = [
    "Reduction",
    "bucket_nbytes",
    "gathered",
    "join_layout",
    "layout_pieces",
    "reduced",
    "require_refined",
    "take_layout_part",
]


def take_layout_part(
    tensor: torch.Tensor, layout: Layout, sizes: tuple[int, ...], coordinates: tuple[int, ...]
) -> torch.Tensor:
    """Return the part of a whole tensor that one rank of a mesh holds. It may be a view.

    layout: a placement per mesh axis, outermost first. sizes: of the axes. coordinates: the rank's
    place along each axis. A pending sum counts as whole: every rank gets all of it.

    >>> take_layout_part(torch.arange(8), (Shard(0), Shard(0)), (2, 2), (1, 0))
    tensor([4, 5])
    """
    for placement, size, rank in zip(layout, sizes, coordinates, strict=True):
        if isinstance(placement, Shard):
            tensor = take_part(tensor, placement, size, rank)
    return tensor


def join_layout(
    parts: Sequence[torch.Tensor], layout: Layout, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Return the whole tensor of all ranks' parts, in the order of the ranks' numbers.

    layout, sizes: per mesh axis, outermost first. Pending sums are added; of equal copies the first
    counts. Inverse of `take_layout_part`.

    >>> parts = [torch.tensor([rank]) for rank in range(4)]
    >>> join_layout(parts, (Shard(0), Shard(0)), (2, 2))
    tensor([0, 1, 2, 3])
    >>> join_layout(parts, (Partial(), Shard(0)), (2, 2))
    tensor([2, 4])
    """
    # The last axis is innermost, so its ranks are neighbours in the list. Joining each run of them
    # leaves a list of the ranks of the outer axes.
    row = list(parts)
    for placement, size in reversed(list(zip(layout, sizes, strict=True))):
        lines = [row[at : at + size] for at in range(0, len(row), size)]
        if isinstance(placement, Shard):
            row = [join_parts(line, placement) for line in lines]
        elif isinstance(placement, Partial):
            row = [torch.stack(line).sum(0) for line in lines]
        else:
            row = [line[0] for line in lines]
    return row[0]


def layout_pieces(
    shape: torch.Size, layout: Layout, sizes: tuple[int, ...], coordinates: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return the rectangles of a whole tensor that one rank holds, none of them empty.

    Each is (its start in the whole, its start in the part, its lengths), a number per dim. layout,
    sizes, coordinates: as in `take_layout_part`. A split in blocks holds several rectangles.

    >>> layout_pieces(torch.Size([8]), (Shard(0, blocks=2),), (2,), (1,))
    [((2,), (0,), (2,)), ((6,), (2,), (2,))]
    """
    rows: list[list[tuple[int, int, int]]] = []
    for dim, size in enumerate(shape):
        runs = [(0, size)]
        for placement, count, rank in zip(layout, sizes, coordinates, strict=True):
            if isinstance(placement, Shard) and placement.dim == dim:
                runs = _cut(runs, placement, count, rank)
        row, local = [], 0
        for start, length in runs:
            row.append((start, local, length))
            local += length
        rows.append(row)
    return [
        (
            tuple(start for start, _, _ in piece),
            tuple(local for _, local, _ in piece),
            tuple(length for _, _, length in piece),
        )
        for piece in itertools.product(*rows)
    ]


def _cut(
    runs: list[tuple[int, int]], shard: Shard, world_size: int, rank: int
) -> list[tuple[int, int]]:
    """Return what one axis leaves of a dim: the runs (start in the whole, length) that this rank
    holds.

    runs: those that the outer axes left, which the cut sees laid end to end.
    """
    size = sum(length for _, length in runs)
    left: list[tuple[int, int]] = []
    for first, held in block_runs(size, shard, world_size, rank):
        low, high, local = first, first + held, 0
        # `local` is where the run begins among the runs laid end to end; what lies in [low, high)
        # of them is this rank's.
        for start, length in runs:
            begin, end = max(low, local), min(high, local + length)
            if begin < end:
                place = start + begin - local
                if left and sum(left[-1]) == place:
                    left[-1] = (left[-1][0], left[-1][1] + end - begin)
                else:
                    left.append((place, end - begin))
            local += length
    return left


def require_refined(coarse: Layout, fine: Layout, what: str) -> None:
    """Raise PlanError unless `fine` is `coarse` with more axes split, outer cuts first.

    what: the tensor, for the message. Each part that the optimizer updates must be a part of one
    that computes, so that gathering it needs no other exchange.

    >>> require_refined((Invariant(), Invariant()), (Shard(0), Invariant()), "weight")
    """
    for axis, (coarse_placement, fine_placement) in enumerate(zip(coarse, fine, strict=True)):
        if coarse_placement == fine_placement:
            continue
        # A cut by this axis, outer than others of the same dim, would cut before them, and so
        # elsewhere.
        inner = [later for later in coarse[axis + 1 :] if isinstance(later, Shard)]
        if (
            isinstance(coarse_placement, Shard)
            or not isinstance(fine_placement, Shard)
            or fine_placement.dim in {s.dim for s in inner}
        ):
            raise PlanError(
                f"{what} cannot be {layout_text(fine)} where {layout_text(coarse)} computes",
                why="every part that is updated must be cut from one part that computes",
            )


def gathered(
    parts: Sequence[torch.Tensor],
    fine: Sequence[Layout],
    coarse: Sequence[Layout],
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
) -> list[torch.Tensor]:
    """Gather parts that lie as `fine` on the axes where `coarse` is not split. Collective.

    parts: this rank's part of each tensor. fine, coarse: a layout per tensor, as `require_refined`
    has them; or both split a dim, but in other places (other blocks or units): then it is gathered
    and cut anew. shapes: of the wholes. One all-gather per mesh axis and element type.

    Example: the parameters that ZeRO updated in parts (arXiv:1910.02054) are gathered by it for the
    next step.
    """
    results = list(parts)
    fine = _exchanged(results, fine, coarse, shapes, ranks)
    joined = [_joined_layout(have, want) for have, want in zip(fine, coarse, strict=True)]
    # From the innermost axis outwards: where two axes cut a dim, the inner cut was made last.
    for axis in reversed(range(len(ranks.sizes))):
        indices, shards, sizes = [], [], []
        for index, (have, want) in enumerate(zip(fine, joined, strict=True)):
            cut = have[axis]
            if isinstance(cut, Shard) and want[axis] != cut:
                indices.append(index)
                shards.append(cut)
                outer = (*have[:axis], *(Invariant(),) * (len(have) - axis))
                size = shapes[index][cut.dim]
                sizes.append(
                    local_layout_size(size, cut.dim, outer, ranks.sizes, ranks.coordinates)
                )
        if indices:
            these_parts = [results[index] for index in indices]
            wholes = gather_together(these_parts, shards, sizes, ranks.groups[axis])
            for index, whole in zip(indices, wholes, strict=True):
                results[index] = whole
    for index, (have, want) in enumerate(zip(joined, coarse, strict=True)):
        again = tuple(
            late if isinstance(late, Shard) and late != early else Invariant()
            for early, late in zip(have, want, strict=True)
        )
        if any(isinstance(cut, Shard) for cut in again):
            part = take_layout_part(results[index], again, ranks.sizes, ranks.coordinates)
            # A part is a view, which would keep the whole in memory.
            results[index] = part.clone(memory_format=torch.contiguous_format)
    return results


def _exchanged(
    results: list[torch.Tensor],
    have: Sequence[Layout],
    want: Sequence[Layout],
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
) -> list[Layout]:
    """Exchange parts that one axis alone cuts, before and after, but in other places, in the list
    `results`; return the layouts then.

    Each rank is sent what it lacks: a gather would bring all of a dim to all of them.
    """
    layouts = list(have)
    for axis, group in enumerate(ranks.groups):
        indices, sources, targets = [], [], []
        for index, (early, late) in enumerate(zip(have, want, strict=True)):
            source, target = early[axis], late[axis]
            if (
                isinstance(source, Shard)
                and isinstance(target, Shard)
                and source != target
                and source.dim == target.dim
                and sum(isinstance(p, Shard) and p.dim == source.dim for p in early) == 1
                and sum(isinstance(p, Shard) and p.dim == source.dim for p in late) == 1
            ):
                indices.append(index)
                sources.append(source)
                targets.append(target)
                layouts[index] = tuple(
                    target if at == axis else other for at, other in enumerate(layouts[index])
                )
        if indices:
            sizes = [shapes[i][shard.dim] for i, shard in zip(indices, sources, strict=True)]
            parts = [results[index] for index in indices]
            exchanged = exchange_together(parts, sources, targets, sizes, group)
            for index, part in zip(indices, exchanged, strict=True):
                results[index] = part
    return layouts


def _joined_layout(have: Layout, want: Layout) -> Layout:
    """Return `have`, unsplit on all axes on which a tensor must be gathered on its way to `want`.

    Those are the axes where `want` is not split, and all that cut a dim which an axis cuts in other
    places than before: an inner cut is made in the part that the outer ones leave.

    >>> layout_text(_joined_layout((Shard(0), Shard(0)), (Shard(0, blocks=2), Shard(0))))
    'I | I'
    """
    cuts = list(zip(have, want, strict=True))
    anew = {
        early.dim
        for early, late in cuts
        if isinstance(early, Shard) and isinstance(late, Shard) and early != late
    }
    return tuple(
        Invariant()
        if isinstance(early, Shard) and (early.dim in anew or not isinstance(late, Shard))
        else early
        for early, late in cuts
    )


def _cut_anew(have: Layout, want: Layout) -> Layout:
    """Return `have`, unsplit on the axes that cut a dim which `want` cuts in other places.

    >>> layout_text(_cut_anew((Partial(), Shard(0, unit=4)), (Shard(1), Shard(0))))
    'P | I'
    """
    joined = _joined_layout(have, want)
    return tuple(
        early if not isinstance(early, Shard) or not isinstance(late, Shard) else meeting
        for early, late, meeting in zip(have, want, joined, strict=True)
    )


def reduced(
    tensors: Sequence[torch.Tensor],
    layouts: Sequence[Layout],
    wanted: Sequence[Layout],
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
) -> list[torch.Tensor]:
    """Redistribute gradients from `layouts` to the layouts `wanted`. Collective.

    tensors: this rank's gradients. shapes: of the wholes. A pending sum is added up, and cut where
    it is to be split; what is whole is cut; what is split in other places is gathered and cut anew.
    One reduce-scatter and one all-reduce per mesh axis and element type; the all-reduces come last,
    on the smallest tensors.

    Example: gradients of a ZeRO-2 parameter go from (Partial(),) to (Shard(0),) in one
    reduce-scatter.
    """
    return Reduction(tensors, layouts, wanted, shapes, ranks).finish()


class Reduction:
    """A Reduction does what `reduced` does, in two halves: it begins when made, `finish` waits.

    The first collective runs until then. Further ones, on other mesh axes, need what it brings, and
    are done by `finish`. The arguments are those of `reduced`.

    >>> from autoparallel.placement import Partial
    >>> from autoparallel.runtime.ranks import one_axis
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> ends = [(Partial(),)], [(Invariant(),)]
    >>> Reduction([torch.ones(2)], *ends, [(2,)], one_axis(SingleGroup())).finish()
    [tensor([1., 1.])]
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        layouts: Sequence[Layout],
        wanted: Sequence[Layout],
        shapes: Sequence[tuple[int, ...]],
        ranks: Ranks,
    ) -> None:
        self.results = list(tensors)
        self.rest = _reducing(self.results, layouts, wanted, shapes, ranks)
        next(self.rest, None)

    def finish(self) -> list[torch.Tensor]:
        """Return the redistributed gradients."""
        for _ in self.rest:
            pass
        return self.results


def _reducing(
    results: list[torch.Tensor],
    layouts: Sequence[Layout],
    wanted: Sequence[Layout],
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
) -> Iterator[None]:
    """Redistribute gradients in place in the list `results`; yield while a collective runs."""
    exchanged = _exchanged(results, layouts, wanted, shapes, ranks)
    layouts, last = _spread_out(results, exchanged, shapes, ranks), list(wanted)
    # What several ranks are to hold is cut of the whole sum.
    wanted = [
        tuple(Invariant() if _is_shared(placement) else placement for placement in layout)
        for layout in last
    ]
    anew = [_cut_anew(have, want) for have, want in zip(layouts, wanted, strict=True)]
    if any(have != joined for have, joined in zip(layouts, anew, strict=True)):
        results[:] = gathered(results, layouts, anew, shapes, ranks)
        layouts = anew
    for axis, group in enumerate(ranks.groups):
        indices, shards = [], []
        for index, (have, want) in enumerate(zip(layouts, wanted, strict=True)):
            cut = want[axis]
            if have[axis] == cut or not isinstance(cut, Shard):
                continue
            if isinstance(have[axis], Partial):
                indices.append(index)
                shards.append(cut)
            else:
                part = take_part(results[index], cut, group.world_size, group.rank)
                results[index] = part.clone(memory_format=torch.contiguous_format)
        if indices:
            pending = [results[index] for index in indices]
            wait = start_reduce_scatter_together(pending, shards, group)
            # They are copied, and the backward pass needs the memory.
            del pending
            _let_go(results, indices)
            yield
            for index, part in zip(indices, wait(), strict=True):
                results[index] = part
    for axis, group in enumerate(ranks.groups):
        indices = [
            index
            for index, (have, want) in enumerate(zip(layouts, wanted, strict=True))
            if isinstance(have[axis], Partial) and not isinstance(want[axis], (Partial, Shard))
        ]
        if indices:
            wait = start_sum_together([results[index] for index in indices], group)
            _let_go(results, indices)
            yield
            for index, total in zip(indices, wait(), strict=True):
                results[index] = total
    for index, layout in enumerate(last):
        for axis, placement in enumerate(layout):
            if exchanged[index][axis] == placement:
                continue
            if isinstance(placement, Shard) and placement.repeat != 1:
                count, rank = ranks.sizes[axis], ranks.coordinates[axis]
                part = take_part(results[index], placement, count, rank)
                results[index] = part.clone(memory_format=torch.contiguous_format)


def _is_shared(placement: Placement) -> bool:
    """Return whether several ranks hold the same part."""
    return isinstance(placement, Shard) and placement.repeat != 1


def _spread_out(
    results: list[torch.Tensor],
    layouts: Sequence[Layout],
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
) -> list[Layout]:
    """Put parts that are pending among the ranks that share them amid zeros, in the list `results`,
    and return the layouts then: a sum over all ranks.
    """
    spread_layouts = list(layouts)
    for index, layout in enumerate(layouts):
        for axis, placement in enumerate(layout):
            if isinstance(placement, Shard) and placement.pending:
                # No other axis cuts the dim.
                part, count = results[index], ranks.sizes[axis]
                shape = list(part.shape)
                shape[placement.dim] = shapes[index][placement.dim]
                whole = part.new_zeros(shape)
                put_part(whole, part, placement, count, ranks.coordinates[axis])
                results[index] = whole
                spread_layouts[index] = tuple(
                    Partial() if at == axis else other
                    for at, other in enumerate(spread_layouts[index])
                )
    return spread_layouts


def _let_go(results: list[torch.Tensor], indices: Sequence[int]) -> None:
    """Keep nothing at these places of a list until there is another tensor."""
    for index in indices:
        results[index] = _NOTHING


_NOTHING = torch.empty(0, device="meta")

# torch's DistributedDataParallel reduces so many bytes at a time (bucket_cap_mb=25), and at first
# fewer, so that the reduction begins early.
_MOST_IN_BUCKET, _LEAST_IN_BUCKET, _BUCKETS = 25 * 2**20, 2**20, 4


def bucket_nbytes(nbytes: int) -> int:
    """Return how many bytes of gradients are reduced in one call during the backward pass.

    nbytes: of all parameters. What is left at the end of the pass is reduced when nothing is
    computed any more: small models have several buckets, too.

    >>> bucket_nbytes(16 * 2**20) / 2**20, bucket_nbytes(2**40) / 2**20
    (4.0, 25.0)
    """
    return max(min(nbytes // _BUCKETS, _MOST_IN_BUCKET), _LEAST_IN_BUCKET)
