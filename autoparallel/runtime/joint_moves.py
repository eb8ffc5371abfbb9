"""Many tensors between layouts of a mesh: parameters are gathered, gradients reduced, together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    "ReductionSteps",
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
    exchanges, fine = _exchanges(fine, coarse, len(ranks.sizes))
    _exchange(results, exchanges, shapes, ranks)
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


# Parts of one axis that are exchanged: the axis, the tensors' places, and how each is split before
# and after.
_Exchange = tuple[int, list[int], list[Shard], list[Shard]]


def _exchanges(
    have: Sequence[Layout], want: Sequence[Layout], axes: int
) -> tuple[list[_Exchange], list[Layout]]:
    """Return the exchanges of parts that one axis alone cuts, before and after, but in other
    places; and the layouts then.

    Each rank is sent what it lacks: a gather would bring all of a dim to all of them.
    """
    layouts, exchanges = list(have), []
    for axis in range(axes):
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
            exchanges.append((axis, indices, sources, targets))
    return exchanges, layouts


def _exchange(
    results: list[torch.Tensor],
    exchanges: Sequence[_Exchange],
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
) -> None:
    """Exchange parts in place in the list `results`. Collective."""
    for axis, indices, sources, targets in exchanges:
        sizes = [shapes[i][shard.dim] for i, shard in zip(indices, sources, strict=True)]
        parts = [results[index] for index in indices]
        exchanged = exchange_together(parts, sources, targets, sizes, ranks.groups[axis])
        for index, part in zip(indices, exchanged, strict=True):
            results[index] = part


def _joined_layout(have: Layout, want: Layout) -> Layout:
    """Return `have`, unsplit on all axes on which a tensor must be gathered on its way to `want`.

    Those are the axes where `want` is not split, and all that cut a dim which an axis cuts in other
    places than before: an inner cut is made in the part that the outer ones leave.

    >>> from autoparallel.placement import layout_text
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

    >>> from autoparallel.placement import layout_text
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
    steps = ReductionSteps.between(layouts, wanted, len(ranks.sizes))
    return Reduction(tensors, steps, shapes, ranks).finish()


@dataclass(frozen=True)
class ReductionSteps:
    """The collectives and cuts that bring gradients from their layouts to others.

    They are found out once for gradients that are reduced together in every backward pass. Tensors
    are known by their places among the gradients. exchanges: see `_exchanges`. spreads: parts that
    are put amid zeros, each with the axis and its split. gathers: the layouts between which all are
    gathered, None where nothing is. scatters: of every axis that has some, the parts that are cut
    of what is whole, and then those that are reduced and scattered. sums: of every axis. cuts: of
    sums, at the end.

    >>> pending, whole = (Partial(),), (Invariant(),)
    >>> ReductionSteps.between([pending, whole], [whole, whole], 1).sums
    [(0, [0])]
    """

    exchanges: list[_Exchange]
    spreads: list[tuple[int, int, Shard]]
    gathers: tuple[list[Layout], list[Layout]] | None
    scatters: list[tuple[int, list[tuple[int, Shard]], list[int], list[Shard]]]
    sums: list[tuple[int, list[int]]]
    cuts: list[tuple[int, int, Shard]]

    @staticmethod
    def between(layouts: Sequence[Layout], wanted: Sequence[Layout], axes: int) -> ReductionSteps:
        """Return the steps from layouts to those that are wanted. axes: of the mesh."""
        exchanges, exchanged = _exchanges(layouts, wanted, axes)
        spreads, spread = _spreads(exchanged)
        # What several ranks are to hold is cut of the whole sum.
        last = list(wanted)
        wanted = [
            tuple(Invariant() if _is_shared(placement) else placement for placement in layout)
            for layout in last
        ]
        layouts = [_cut_anew(have, want) for have, want in zip(spread, wanted, strict=True)]
        pairs = list(zip(layouts, wanted, strict=True))
        scatters, sums = [], []
        for axis in range(axes):
            cuts, indices, shards = [], [], []
            for index, (have, want) in enumerate(pairs):
                cut = want[axis]
                if have[axis] == cut or not isinstance(cut, Shard):
                    continue
                if isinstance(have[axis], Partial):
                    indices.append(index)
                    shards.append(cut)
                else:
                    cuts.append((index, cut))
            if cuts or indices:
                scatters.append((axis, cuts, indices, shards))
        for axis in range(axes):
            pending = [
                index
                for index, (have, want) in enumerate(pairs)
                if isinstance(have[axis], Partial) and not isinstance(want[axis], (Partial, Shard))
            ]
            if pending:
                sums.append((axis, pending))
        shared = [
            (index, axis, placement)
            for index, layout in enumerate(last)
            for axis, placement in enumerate(layout)
            if isinstance(placement, Shard)
            and placement.repeat != 1
            and exchanged[index][axis] != placement
        ]
        gathers = (spread, layouts) if spread != layouts else None
        return ReductionSteps(exchanges, spreads, gathers, scatters, sums, shared)


class Reduction:
    """A Reduction does what `reduced` does, in two halves: it begins when made, `finish` waits.

    The first collective runs until then. Further ones, on other mesh axes, need what it brings, and
    are done by `finish`. tensors, shapes, ranks: as of `reduced`. steps: between the layouts.

    >>> from autoparallel.runtime.ranks import one_axis
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> steps = ReductionSteps.between([(Partial(),)], [(Invariant(),)], 1)
    >>> Reduction([torch.ones(2)], steps, [(2,)], one_axis(SingleGroup())).finish()
    [tensor([1., 1.])]
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        steps: ReductionSteps,
        shapes: Sequence[tuple[int, ...]],
        ranks: Ranks,
    ) -> None:
        self.results = list(tensors)
        self.rest = _reducing(self.results, steps, shapes, ranks)
        next(self.rest, None)

    def finish(self) -> list[torch.Tensor]:
        """Return the redistributed gradients."""
        for _ in self.rest:
            pass
        return self.results


def _reducing(
    results: list[torch.Tensor],
    steps: ReductionSteps,
    shapes: Sequence[tuple[int, ...]],
    ranks: Ranks,
) -> Iterator[None]:
    """Redistribute gradients in place in the list `results`; yield while a collective runs."""
    _exchange(results, steps.exchanges, shapes, ranks)
    for index, axis, shard in steps.spreads:
        # No other axis cuts the dim.
        part = results[index]
        shape = list(part.shape)
        shape[shard.dim] = shapes[index][shard.dim]
        whole = part.new_zeros(shape)
        put_part(whole, part, shard, ranks.sizes[axis], ranks.coordinates[axis])
        results[index] = whole
    if steps.gathers is not None:
        results[:] = gathered(results, *steps.gathers, shapes, ranks)
    for axis, cuts, indices, shards in steps.scatters:
        for index, shard in cuts:
            results[index] = _part_of(results[index], shard, axis, ranks)
        if indices:
            pending = [results[index] for index in indices]
            wait = start_reduce_scatter_together(pending, shards, ranks.groups[axis])
            # They are copied, and the backward pass needs the memory.
            del pending
            _let_go(results, indices)
            yield
            for index, part in zip(indices, wait(), strict=True):
                results[index] = part
    for axis, indices in steps.sums:
        wait = start_sum_together([results[index] for index in indices], ranks.groups[axis])
        _let_go(results, indices)
        yield
        for index, total in zip(indices, wait(), strict=True):
            results[index] = total
    for index, axis, shard in steps.cuts:
        results[index] = _part_of(results[index], shard, axis, ranks)


def _part_of(tensor: torch.Tensor, shard: Shard, axis: int, ranks: Ranks) -> torch.Tensor:
    """Return this rank's part of a tensor, in memory of its own."""
    part = take_part(tensor, shard, ranks.sizes[axis], ranks.coordinates[axis])
    return part.clone(memory_format=torch.contiguous_format)


def _is_shared(placement: Placement) -> bool:
    """Return whether several ranks hold the same part."""
    return isinstance(placement, Shard) and placement.repeat != 1


def _spreads(
    layouts: Sequence[Layout],
) -> tuple[list[tuple[int, int, Shard]], list[Layout]]:
    """Return the parts that are pending among the ranks that share them, which are put amid zeros,
    and the layouts then: a sum over all ranks.
    """
    spreads, after = [], list(layouts)
    for index, layout in enumerate(layouts):
        for axis, placement in enumerate(layout):
            if isinstance(placement, Shard) and placement.pending:
                spreads.append((index, axis, placement))
                after[index] = tuple(
                    Partial() if at == axis else other for at, other in enumerate(after[index])
                )
    return spreads, after


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
