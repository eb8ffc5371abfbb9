"""Rematerialization: redistributed copies, results and blocks are recomputed in the backward pass.

A copy that a redistribution made is known by its memory. Wherever autograd would save that memory,
as a whole or as a view, it saves where the copy came from instead. So it is with what a cheap op
makes, such as a norm between two products: it is made again from what it was made of. A block is
recomputed as a whole by torch.utils.checkpoint (arXiv:1604.06174).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from autoparallel.placement import Movement, Placement, local_size, movement
from autoparallel.runtime import overlap
from autoparallel.runtime.collectives import convert, convert_fixed
from autoparallel.runtime.dropped_copies import (
    Copies,
)
from autoparallel.runtime.flights import Begun, end
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import drawing_from, generator
from autoparallel.support.torch_private import (
    saved_tensors_hooks_are_set,
)

__all__ = [
    "convert_again",
    "convert_beside",
    "cuts_are_alike",
    "dropping",
    "end_again",
    "move_beside",
    "parts_are_alike",
    "recomputed",
    "remade",
]


_current = threading.local()


def parts_are_alike(ranks: Ranks, *cuts: Any) -> bool:
    """Say whether all ranks recompute the same copies, for parts cut so.

    cuts: each is (size, (axis, shard), ..), a dim's whole size and the splits of it, outermost
    first. The answer is no where a rank is left with nothing, or with a single place where others
    have more: an op on nothing may save nothing, and of a dim of one place a reshape is a view that
    elsewhere is a copy. Then the ranks would not recompute the same copies in the same order, and
    their collectives would not meet.

    >>> from autoparallel.placement import Shard
    >>> from autoparallel.runtime.groups import thread_groups
    >>> from autoparallel.runtime.ranks import one_axis
    >>> ranks = one_axis(thread_groups(2)[0])
    >>> parts_are_alike(ranks, (4, (0, Shard(0)))), parts_are_alike(ranks, (3, (0, Shard(0))))
    (True, False)
    """
    return cuts_are_alike(ranks.sizes, cuts)


def cuts_are_alike(counts: Sequence[int], cuts: Iterable[Any]) -> bool:
    """Say what `parts_are_alike` does, of a mesh. counts: of ranks, per axis. cuts: as there.

    >>> from autoparallel.placement import Shard
    >>> cuts_are_alike((2,), [(4, (0, Shard(0)))]), cuts_are_alike((2,), [(1, (0, Shard(0)))])
    (True, False)
    """
    for size, *splits in cuts:
        sizes = {size}
        for axis, shard in splits:
            count = counts[axis]
            sizes = {local_size(n, shard, count, rank) for n in sizes for rank in range(count)}
        if 0 in sizes or (1 in sizes and len(sizes) > 1):
            return False
    return True


def convert_again(
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int = 0,
    drop: bool = True,
    gap: int = 0,
) -> torch.Tensor:
    """Redistribute as `convert` does, and save `x` for the backward pass, not the result, where
    `drop` says so.

    x, group, source, target, size: as in `convert`. drop: false where ranks would recompute
    different copies (`parts_are_alike`). gap: as of `overlap.convert`; 0 where the gradient is
    waited for at once. Takes effect inside of a program that `dropping` has wrapped; elsewhere it
    is `convert`.

    Example: a parameter that ZeRO-3 shards is gathered in the forward pass, dropped, and gathered
    again (arXiv:1910.02054).
    """
    if gap:
        copy = overlap.convert(x, group, source, target, size, gap)
    else:
        copy = convert_beside(x, group, source, target, size)
    copies: Copies | None = getattr(_current, "copies", None)
    if copies is not None and drop:
        copies.add(copy, x, group, (source, target), size)
    return copy


def end_again(begun: Begun, drop: bool = True, distance: int = 0) -> torch.Tensor:
    """Wait for a conversion that has begun, as `end` does, and save its source for the backward
    pass, not the result, where `drop` says so.

    begun: by `begin` of `runtime.flights`. drop: as of `convert_again`. distance: the backward pass
    starts to make the copy again when it takes another such copy that comes at most so many later
    in the program; 0 for where it is read.

    >>> from autoparallel.placement import Replicate, Shard
    >>> from autoparallel.runtime.flights import begin
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> end_again(begin(torch.ones(2), SingleGroup(), Shard(0), Replicate(), 2), True, 1)
    tensor([1., 1.])
    """
    copies: Copies | None = getattr(_current, "copies", None)
    if copies is None or not drop or isinstance(begun, torch.Tensor):
        return end(begun)
    flight = begun[1]
    source = flight.value
    copy = end(begun)
    ends = flight.group, (flight.source, flight.target), flight.size
    copies.add(copy, source, *ends, distance)
    return copy


def convert_beside(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """Redistribute as `convert` does, in a program in which other copies are dropped.

    Arguments: as in `convert`. Its result lies in memory of its own on every rank, or on none.

    Example: `convert_beside(x, group, Replicate(), Partial())`, where `x` is a copy.
    """
    return _own_memory(convert(x, group, source, target, size), group, source, target)


def move_beside(
    x: torch.Tensor, group: Group, source: Placement, target: Placement, size: int = 0
) -> torch.Tensor:
    """Redistribute a tensor without a gradient; see `convert_beside`, which is for others.

    Example: `move_beside(x, group, Replicate(), Partial())`
    """
    return _own_memory(convert_fixed(x, group, source, target, size), group, source, target)


def _own_memory(
    moved: torch.Tensor, group: Group, source: Placement, target: Placement
) -> torch.Tensor:
    """Return what the first rank keeps, where others make zeros, in memory of its own.

    It may lie in a copy that is dropped. The first rank alone would make that copy again for it,
    and the ranks would not communicate in the same order. So it is in the second run of a block,
    which must save what the first one did.
    """
    is_kept = movement(source, target) is Movement.KEEP_ON_FIRST and group.rank == 0
    is_recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return moved.clone() if is_kept and is_recorded else moved


def dropping(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the program, wrapped so that copies of `convert_again` are dropped after the forward
    pass.

    run: the emitted program of one rank. Inside somebody else's hooks on what autograd saves, those
    decide: torch.utils.checkpoint recomputes everything. Nothing is dropped where no gradient is
    recorded, nor while torch.compile traces.

    Example: `forward = dropping(forward)`
    """

    @functools.wraps(run)
    def wrapped(*args: Any) -> Any:
        """Run the program with hooks on what autograd saves."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return run(*args)
        if saved_tensors_hooks_are_set():
            return run(*args)
        before = getattr(_current, "copies", None)
        copies = _current.copies = Copies()
        try:
            with torch.autograd.graph.saved_tensors_hooks(copies.pack, copies.unpack):
                return run(*args)
        finally:
            _current.copies = before

    return wrapped


class _Anchor(torch.autograd.Function):
    """The end of a block: where its backward begins, all of the block is recomputed, on every rank.

    Without it, recomputing starts at the first saved tensor that is asked for; but the block's last
    op may save nothing on a rank where it has nothing to work on, and that rank would communicate
    later than the others.
    """

    @staticmethod
    def forward(ctx: Any, *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the results as new tensors on the same memory, and save them."""
        ctx.set_materialize_grads(False)
        ends = tuple(torch.ops.aten.alias(result) for result in results)
        ctx.save_for_backward(*ends)
        return ends

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """Ask for a saved tensor, which recomputes the block; gradients pass as they are."""
        # Reading this attribute unpacks what was saved.
        _ = ctx.saved_tensors
        return grads


def _anchored(results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return a block's results with those that need a gradient anchored."""
    indices = [index for index, result in enumerate(results) if result.requires_grad]
    anchored = list(results)
    if indices:
        ends = _Anchor.apply(*(results[index] for index in indices))
        for index, end in zip(indices, ends, strict=True):
            anchored[index] = end
    return anchored


def recomputed(block: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """Run a block, saving its inputs alone: the backward pass runs it once more for the rest.

    block: takes tensors, and returns a list of tensors. inputs: all that it reads. Random ops draw
    again the numbers that they drew, and the ranks communicate again in the same order.

    >>> x = torch.ones(2, requires_grad=True)
    >>> (y,) = recomputed(lambda x: [x.exp().sin()], x)
    >>> y.sum().backward()
    >>> torch.equal(x.grad, x.exp().cos() * x.exp())
    True
    """
    if torch.compiler.is_compiling():
        # The compiler traces both runs, with the same words for random numbers.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    # The states before the block ran: "fast" streams are set back to them for the second run.
    source = generator()
    states = source.stream_states()
    gaps = overlap.gaps_so_far()
    steps: list[int | None] = []

    def run(*tensors: torch.Tensor) -> Any:
        """Run the block; at the second call, with a generator that draws what it drew at the
        first.
        """
        if steps:
            with drawing_from(source.repeated(steps[0], states)), overlap.with_gaps(gaps):
                return _anchored(block(*tensors))
        results = _anchored(block(*tensors))
        steps.append(source.drawing)
        return results

    # The generator is set back by `run` itself, so that checkpoint need not copy torch's state.
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


def remade(block: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """Run a block of one cheap op, whose result is not saved: where the backward pass needs it, it
    is made again from the inputs, which are saved instead, or are made again themselves.

    block: takes tensors, and returns a list of one tensor. inputs: all that it reads. Takes effect
    inside of a program that `dropping` has wrapped.

    >>> x = torch.ones(2, requires_grad=True)
    >>> run = dropping(lambda: remade(lambda x: [x * 3.0], x)[0].square().sum())
    >>> run().backward()
    >>> x.grad
    tensor([18., 18.])
    """
    results = block(*inputs)
    copies: Copies | None = getattr(_current, "copies", None)
    if copies is not None:
        copies.add_made(results[0], block, inputs)
    return results
