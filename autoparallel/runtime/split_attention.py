"""Kernels of attention whose queries are split along the sequence.

Keys and values are whole on every rank, or split as the queries are and passed round: each rank
computes with what it has, while the next part is on its way (ring attention, arXiv:2310.01889).
Nothing is gathered, forward or backward, where the gradients of keys and values travel with them.

Under a causal mask the last queries see most keys. Parts are contiguous outside, as a Shard is; in
here, the sequence is cut into twice as many pieces as there are ranks, and a rank works on one from
the front and one from the back, which is the same work for all (zigzag; as in arXiv:2407.21783,
section 3.3.2). Queries, and keys and values that are passed round, are dealt so, and the result is
dealt back.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from autoparallel.placement import Invariant, Replicate, Shard
from autoparallel.runtime.attention_blocks import (
    Total,
    block,
    block_gradients,
    broadcast,
    hidden_queries,
    levelled,
    precise,
)
from autoparallel.runtime.attention_work import SEQUENCE, Travelling, Work, deal_of_sequence
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.dealt_pieces import collected, dealt
from autoparallel.runtime.groups import Group
from autoparallel.runtime.moves import move

__all__ = ["attention_queries", "attention_ring"]

_KEYS = "keys"


def attention_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    group: Group,
    size: int,
) -> torch.Tensor:
    """Return the attention of this rank's queries to all keys.

    query: (.., n, s / p, d). key, value: whole. attn_mask: of this rank's queries. size: s, the
    queries of all ranks. Nothing is dropped out. The other arguments are torch's.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> x = torch.ones(1, 1, 2, 4)
    >>> attention_queries(x, x, x, is_causal=True, group=SingleGroup(), size=2)[0, 0, 0]
    tensor([1., 1., 1., 1.])
    """
    lengths = (size, key.size(-2))
    return _split_attention(
        (query, key, value), attn_mask, is_causal, scale, group, lengths, passes=False
    )


def attention_ring(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    group: Group,
    size: int,
    masked: str = "",
    dim: int = 0,
    extent: int = 0,
) -> torch.Tensor:
    """Return the attention of this rank's queries to the keys of all ranks, which are passed round.

    query: (.., n, s / p, d). key, value: (.., g, t / p, d), (.., g, t / p, e). attn_mask: of this
    rank's queries and all keys, or, if masked is "keys", the same for all queries, and of this
    rank's keys. size: s. extent: t, by default that of equal parts. Nothing is dropped out. dim is
    not needed. The other arguments are torch's.

    >>> from autoparallel.runtime.groups import SingleGroup
    >>> x = torch.ones(1, 1, 2, 4)
    >>> attention_ring(x, x, x, group=SingleGroup(), size=2)[0, 0, 0]
    tensor([1., 1., 1., 1.])
    """
    lengths = (size, extent or key.size(-2) * group.world_size)
    if attn_mask is not None and masked == _KEYS:
        shard = Shard(attn_mask.dim() - 1)
        attn_mask = move(attn_mask, group, shard, Invariant(), lengths[1])
    return _split_attention(
        (query, key, value), attn_mask, is_causal, scale, group, lengths, passes=True
    )


def _split_attention(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    group: Group,
    lengths: tuple[int, int],
    passes: bool,
) -> torch.Tensor:
    """Return the attention of this rank's queries. lengths: of all queries and of all keys."""
    tensors = broadcast(*tensors)
    query = tensors[0]
    shape = (*query.shape[:-1], tensors[2].size(-1))
    mask = _like_batches(mask, query)
    tensors = tuple(map(_batches, tensors))  # type: ignore[assignment]
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    deals = tuple(deal_of_sequence(length, group.world_size, causal) for length in lengths)
    work = Work(group, causal, scale, deals[0], deals[1], passes)
    if causal:
        split = (True, passes, passes)
        tensors = tuple(  # type: ignore[assignment]
            dealt(tensor, group, deal) if is_split else tensor
            for tensor, deal, is_split in zip(
                tensors, (deals[0], deals[1], deals[1]), split, strict=True
            )
        )
    result: torch.Tensor = _Attention.apply(*tensors, mask, work)
    if causal:
        result = collected(result, group, deals[0])
    return result.reshape(shape)


def _batches(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of any rank as (b, n, s, d)."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, -4)


def _like_batches(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """Return a mask as (b or 1, n or 1, s or 1, t or 1), for queries that `_batches` flattens."""
    if mask is None or query.dim() <= 4:
        while mask is not None and mask.dim() < 4:
            mask = mask.unsqueeze(0)
        return mask
    while mask.dim() < query.dim():
        mask = mask.unsqueeze(0)
    batch = query.shape[:-3]
    if mask.shape[:-3].numel() > 1:
        mask = mask.expand(*batch, *mask.shape[-3:])
    return mask.flatten(0, -4)


class _Attention(torch.autograd.Function):
    """Attention block by block. Saved are this rank's tensors, its result and its sums alone."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        work: Work,
    ) -> torch.Tensor:
        """Compute with what is here while the next part is on its way."""
        level, added = levelled(query, mask)
        totals = [Total() for _ in work.pieces_of_queries()]
        way = Travelling(work, (key, value))
        here = (key, value)
        for step in range(work.steps):
            last = step == work.steps - 1
            coming = None if last else way.start(here, step)
            for number, rows, columns, sight in work.blocks(step, added, query.device):
                tensors = (level[..., rows, :], here[0][..., columns, :], here[1][..., columns, :])
                totals[number].add(*block(*tensors, sight, work.scale))
            if coming is not None:
                here = way.opened(coming(), step + 1)
        results, sums = [], []
        for total, (rows, _) in zip(totals, work.pieces_of_queries(), strict=True):
            if total.result is None or total.sums is None:  # a piece without queries, or no keys
                cut = query[..., rows, :]
                total.result = cut.new_zeros((*cut.shape[:-1], value.size(-1)))
                total.sums = cut.new_zeros(cut.shape[:-1], dtype=precise(cut.dtype))
            results.append(total.result.to(query.dtype))
            sums.append(total.sums)
        result, logarithms = torch.cat(results, -2), torch.cat(sums, -1)
        hidden = hidden_queries(mask)
        if hidden is not None:
            result = result.masked_fill(hidden, 0)
        ctx.save_for_backward(query, key, value, mask, result, logarithms)
        ctx.work = work
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Send keys, values and what is known of their gradients round once more.

        Where the gradients are to be differentiated in turn, attention is computed again in ops of
        torch's own.
        """
        query, key, value, mask, result, sums = ctx.saved_tensors
        work: Work = ctx.work
        if torch.is_grad_enabled():
            return (*_differentiable_gradients((query, key, value, mask), grad, work), None)
        kind = precise(query.dtype)
        level, least = levelled(query, mask)
        hidden = hidden_queries(mask)
        grad = grad.contiguous() if hidden is None else grad.masked_fill(hidden, 0)
        of_query = torch.zeros_like(query, dtype=kind)
        of_mask = None
        if mask is not None and ctx.needs_input_grad[3]:
            of_mask = torch.zeros_like(mask, dtype=kind)
        way = Travelling(work, (key, value))
        here, known, sent = (key, value), None, None
        for step in range(work.steps):
            last = step == work.steps - 1
            coming = None if last else way.start(here, step)
            gradients = tuple(torch.zeros_like(each, dtype=kind) for each in here)
            for _, rows, columns, sight in work.blocks(step, least, query.device):
                tensors = (level[..., rows, :], here[0][..., columns, :], here[1][..., columns, :])
                saved = (grad[..., rows, :], result[..., rows, :], sums[..., rows])
                *parts, added = block_gradients(
                    tensors, sight, work.scale, *saved, with_mask=of_mask is not None
                )
                of_query[..., rows, :] += parts[0]
                for gradient, part in zip(gradients, parts[1:], strict=True):
                    gradient[..., columns, :] += part
                if of_mask is not None and added is not None:
                    _add_mask(of_mask, added, rows, columns, work, step)
            if sent is not None:
                known = way.opened(sent(), step)
                gradients = tuple(one + two for one, two in zip(gradients, known, strict=True))
            # After the last step they are those of the next rank's own keys.
            sent = way.start(gradients, step) if work.steps > 1 else None  # type: ignore[arg-type]
            if coming is not None:
                here = way.opened(coming(), step + 1)
        if sent is not None:
            gradients = way.opened(sent(), 0)
        of_key, of_value = (each.to(key.dtype) for each in gradients)
        mask_grad = None if of_mask is None else of_mask.to(mask.dtype)
        return of_query.to(query.dtype), of_key, of_value, mask_grad, None

    @staticmethod
    def spmd_typecheck(
        *,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        work: Work,
    ) -> Any:
        """Return the type of the result for the checker of `spmd_types`: that of a product of rows
        of queries with keys, which are whole, or parts that all ranks get.
        """
        import spmd_types
        from spmd_types import rules

        if mask is not None:
            rules.ignore(mask)
        if not work.passes:
            return rules.einsum("bnsd,bgtd,bgte->bnse", query, key, value)
        axis = work.group.process_group  # type: ignore[attr-defined]
        passed = (
            rules.all_to_all(each, axis, src=spmd_types.V, dst=spmd_types.V)
            for each in (key, value)
        )
        return rules.einsum("bnsd,bgtd,bgte->bnse", query, *passed)


def _add_mask(
    of_mask: torch.Tensor,
    added: torch.Tensor,
    rows: slice,
    columns: slice,
    work: Work,
    step: int,
) -> None:
    """Add what a block gives to the gradient of a mask, in place."""
    if of_mask.size(-2) > 1:
        of_mask = of_mask[..., rows, :]
    if of_mask.size(-1) > 1:
        start = work.keys.intervals[work.owner(step)][0][0] if work.passes else 0
        of_mask = of_mask[..., start + columns.start : start + columns.stop]
    of_mask += added


def _differentiable_gradients(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    grad: torch.Tensor,
    work: Work,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of query, key, value and mask, which can be differentiated in turn."""
    # Of a tensor that is query and key at once, each gets its own share of the gradient.
    tensors = tuple(  # type: ignore[assignment]
        each if each is None else torch.ops.aten.alias(each) for each in tensors
    )
    query, key, value, mask = tensors
    needed = [each for each in tensors if each is not None and each.requires_grad]
    rank = work.group.rank
    whole = []
    for each in (key, value):
        if work.passes:
            held = collected(each, work.group, work.keys) if work.causal else each
            shard = Shard(SEQUENCE)
            each = convert(held, work.group, shard, Replicate(), work.keys.size)
        # A rank may have no heads.
        whole.append(each.repeat_interleave(query.size(1) // max(each.size(1), 1), 1))
    scores = query @ whole[0].mT * work.scale
    if work.causal:
        places = [torch.arange(*each, device=query.device) for each in work.queries.intervals[rank]]
        keys = torch.arange(work.keys.size, device=query.device)
        scores = scores.masked_fill(keys > torch.cat(places).unsqueeze(1), -torch.inf)
    if mask is not None:
        bad = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if bad else scores + mask
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)
    gradients = iter(
        torch.autograd.grad(weights @ whole[1], needed, grad, create_graph=True, allow_unused=True)
    )
    return tuple(
        next(gradients) if each is not None and each.requires_grad else None for each in tensors
    )
