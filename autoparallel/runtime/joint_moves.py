"""Many tensors between layouts of a mesh: parameters are gathered, gradients reduced, together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from autoparallel.placement import (
    Invariant,
    Layout,
    Partial,
    Placement,
    Shard,
    local_layout_size,
)
from autoparallel.runtime.axis_parts import put_part, take_part
from autoparallel.runtime.joint_collectives import (
    exchange_together,
    gather_together,
    start_reduce_scatter_together,
    start_sum_together,
)
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import take_layout_part

__all__ = [
    "Reduction",
    "bucket_nbytes",
    "gathered",
    "reduced",
]


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
