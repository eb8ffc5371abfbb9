"""Kernels of routed experts: the experts are split, and tokens reach them in one of two ways.

Either all ranks see all tokens, and add up what their experts make of them; or each rank has its
own tokens, and sends each to the ranks whose experts it chose (expert parallelism as in GShard,
arXiv:2006.16668, without a limit on what an expert takes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from autoparallel.graph.row_program import NOT_ALL, parts_met
from autoparallel.placement import Invariant, Partial, Replicate, Shard
from autoparallel.runtime.collectives import convert, pending_sum
from autoparallel.runtime.groups import Group
from autoparallel.runtime.moves import move

__all__ = ["experts_exchanged", "experts_inner", "experts_summed"]

Tensors = Sequence[torch.Tensor]
Run = Callable[..., torch.Tensor]


def _renumbered(
    experts: torch.Tensor, count: int, group: Group
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the rank that has each expert, its number among those of that rank, and how many
    these are at most.

    experts: among `count`, which the group's ranks have in equal parts. Negative ones, which nobody
    has, stay so.
    """
    part = -(-count // group.world_size)
    ranks = torch.div(experts, part, rounding_mode="floor")
    nobody = experts < 0
    return ranks.masked_fill(nobody, -1), (experts % part).masked_fill(nobody, -1), part


def _on_part(run: Run | None, *arguments: Any) -> torch.Tensor:
    """Run the op on a part: by the kernel of the next axis, or the op itself.

    arguments: those of a kernel, the last of which the op itself does not have.
    """
    if run is not None:
        return run(*arguments)
    fixed = torch.compiler.is_compiling()
    result: torch.Tensor = torch.ops.autoparallel.routed_experts(*arguments[:-1], fixed)
    return result


def experts_summed(
    rows: Tensors,
    experts: torch.Tensor,
    values: Tensors,
    tables: Tensors,
    plain: Tensors,
    program: str,
    dtype: torch.dtype | None = None,
    present: float = 1.0,
    left: int = 0,
    *,
    group: Group,
    size: int,
    count: int,
    run: Run | None = None,
) -> torch.Tensor:
    """Run all tokens through the experts that are here: a pending sum.

    tables: (e / n, ..) each, of this rank's experts. left: the experts that are left when axes
    further out have been cut, among which `experts` are; 0 for all of them. count: of all axes
    together. run: the op on its part, where an axis further in splits it too; by default the op
    itself. size is not needed. Other arguments: as of `routed_experts`.
    """
    with torch.no_grad():
        ranks, numbers, part = _renumbered(experts, left or count, group)
        here = numbers.masked_fill(ranks != group.rank, -1)
    arguments = (rows, here, values, tables, plain, program, dtype)
    return pending_sum(_on_part(run, *arguments, present / group.world_size, part), group)


def experts_inner(
    rows: Tensors,
    experts: torch.Tensor,
    values: Tensors,
    tables: Tensors,
    plain: Tensors,
    program: str,
    dtype: torch.dtype | None = None,
    present: float = 1.0,
    left: int = 0,
    *,
    group: Group,
    size: int,
    once: tuple[int, ...],
    run: Run | None = None,
) -> torch.Tensor:
    """Run tokens through a part of each expert's inner dim: a pending sum.

    once: the tables that are added behind the last product, which count on the first rank alone.
    Other arguments: as of `experts_summed`.
    """
    # Times 0 rather than left out: gradients come on every rank.
    factor = 1 if group.rank == 0 else 0
    counted = [table * factor if at in once else table for at, table in enumerate(tables)]
    arguments = (rows, experts, values, counted, plain, program, dtype)
    return pending_sum(_on_part(run, *arguments, present, left), group)


class _Exchange(torch.autograd.Function):
    """Rows sent to other ranks; in the backward pass, their gradients come back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Group
    ) -> torch.Tensor:
        """Send the first sent[0] rows to rank 0, and so on; return those that come."""
        ctx.sizes, ctx.group = (sent, received), group
        shape = rows.shape[1:]
        parts = list(rows.contiguous().split(sent))
        came = group.all_to_all(parts, [(count, *shape) for count in received])
        return torch.cat(came) if len(came) > 1 else came[0].clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Send the gradients back, by which derivatives of any order follow."""
        sent, received = ctx.sizes
        return _Exchange.apply(grad, received, sent, ctx.group), None, None, None

    @staticmethod
    def spmd_typecheck(
        *, rows: torch.Tensor, sent: list[int], received: list[int], group: Group
    ) -> Any:
        """Return the type of the result for the checker of `spmd_types`: rows of any rank stay
        rows of some rank.
        """
        import spmd_types
        from spmd_types import rules

        axis = group.process_group  # type: ignore[attr-defined]
        return rules.all_to_all(rows, axis, src=spmd_types.V, dst=spmd_types.V)


def experts_exchanged(
    rows: Tensors,
    experts: torch.Tensor,
    values: Tensors,
    tables: Tensors,
    plain: Tensors,
    program: str,
    dtype: torch.dtype | None = None,
    present: float = 1.0,
    left: int = 0,
    *,
    group: Group,
    size: int,
    count: int,
    dim: int = 0,
    extent: int = 0,
    run: Run | None = None,
) -> torch.Tensor:
    """Send each token that is here to the ranks whose experts it chose, and add up what returns.

    rows, experts, values: of this rank's tokens. A token is sent once to a rank, however many of
    that rank's experts it chose. Nothing is dropped, and a rank may get any number of tokens. Each
    rank waits for the numbers of tokens, which the host must know; a compiled program has sizes
    that do not depend on them, and gathers all tokens instead. dim, extent: of the batch that is
    split, and its whole size. Other arguments: as of `experts_summed`.
    """
    if torch.compiler.is_compiling():
        shard = Shard(dim)
        everyone = [convert(row, group, shard, Replicate(), extent) for row in rows]
        chosen = move(experts, group, shard, Invariant(), extent)
        weights = [convert(value, group, shard, Replicate(), extent) for value in values]
        total = experts_summed(
            *(everyone, chosen, weights, tables, plain, program, dtype, present, left),
            group=group,
            size=size,
            count=count,
            run=run,
        )
        return convert(total, group, Partial(), shard)
    batch, choices = experts.shape[:-1], experts.size(-1)
    leading, tokens_here = len(batch), math.prod(batch)
    with torch.no_grad():
        flat = experts.reshape(tokens_here, choices)
        ranks, numbers, part = _renumbered(flat, left or count, group)
        tokens, sent, received = _routes(ranks, group, present, left or count)
        chosen = torch.stack([ranks, numbers], 1).index_select(0, tokens)
        came = _Exchange.apply(chosen, sent, received, group)
        here = came[:, 1].masked_fill(came[:, 0] != group.rank, -1)
    rows_here, values_here = (
        [
            _Exchange.apply(
                tensor.reshape(tokens_here, *tensor.shape[leading:]).index_select(0, tokens),
                sent,
                received,
                group,
            )
            for tensor in tensors
        ]
        for tensors in (rows, values)
    )
    # Choices of other ranks' experts are nobody's here.
    share = present / parts_met(choices * present, left or count, group.world_size)
    arguments = (rows_here, here, values_here, tables, plain, program, dtype)
    made = _on_part(run, *arguments, min(share, NOT_ALL), part)
    back = _Exchange.apply(made, received, sent, group)
    total = back.new_zeros((tokens_here, *back.shape[1:])).index_add(0, tokens, back)
    return total.reshape(*batch, *back.shape[1:])


def _routes(
    ranks: torch.Tensor, group: Group, present: float, count: int
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Return the tokens to be sent, by the rank that they go to, and the numbers of those that are
    sent to each rank and come from it.

    ranks: (t, k), of every choice. Without data, so many as are expected of equal loads.
    """
    world_size = group.world_size
    if ranks.is_meta:
        met = parts_met(ranks.size(1) * present, count, world_size)
        each = [math.ceil(ranks.size(0) * met / world_size)] * world_size
        return ranks.new_zeros(sum(each)), each, each
    # One more column for the choices that are nobody's.
    goes = torch.zeros(ranks.size(0), world_size + 1, dtype=torch.bool, device=ranks.device)
    goes = goes.scatter(1, ranks % (world_size + 1), True)[:, :world_size]
    counts = goes.sum(0)
    tokens = goes.t().nonzero()[:, 1]
    came = group.all_to_all(list(counts.split(1)), [(1,)] * world_size)
    sent, received = torch.stack([counts, torch.cat(came)]).tolist()
    return tokens, sent, received
