"""Attention of some queries to some of the keys, and how blocks of keys are put together.

The softmax over all keys follows from those over blocks: each block has its result and the
logarithms of its sums, by which results are weighted (online softmax, arXiv:1805.02867; as in
FlashAttention, arXiv:2205.14135). Backward, a block's gradients follow from the sums of all keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autoparallel.support.torch_private import (
    attention_and_sums,
    attention_gradients,
    has_attention_sums,
)

__all__ = [
    "Seen",
    "Total",
    "block",
    "block_gradients",
    "broadcast",
    "hidden_queries",
    "levelled",
    "precise",
    "seen",
]

# A query that is added less to all its scores sees nothing in its user's eyes. It is computed.
_FAR_DOWN = -1000.0
# Scores are lost where a number is added whose last digit is this much.
_LOST = 16.0
# A block that no fused kernel takes is computed in rows with at most so many scores.
_MOST_SCORES = 2**26


def precise(kind: torch.dtype) -> torch.dtype:
    """Return the type in which numbers of a type are added up.

    >>> precise(torch.bfloat16), precise(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if kind.itemsize < torch.float32.itemsize else kind


@dataclass(frozen=True, slots=True)
class Seen:
    """The part of a block of keys that a block of queries sees.

    keys: how many of them, from the first. causal: whether each query sees keys up to its own place
    in the block. mask: truth values or numbers to add, (b, n, s, t) or 1 for any; None for nothing.
    """

    keys: int
    causal: bool
    mask: torch.Tensor | None


def seen(
    queries: tuple[int, int],
    keys: tuple[int, int],
    causal: bool,
    mask: torch.Tensor | None,
    device: torch.device,
) -> Seen | None:
    """Return what queries see of keys, which are given by their places; None for nothing.

    mask: of these queries and all keys, (b, n, s, t) or 1 for any; None for none. causal: whether
    queries see keys up to their own place; there is no mask then.

    >>> seen((4, 6), (4, 8), True, None, torch.device("cpu"))
    Seen(keys=2, causal=True, mask=None)
    >>> seen((0, 4), (4, 8), True, None, torch.device("cpu")) is None
    True
    """
    (first, last), (start, stop) = queries, keys
    if first >= last or start >= stop:
        return None
    if not causal:
        cut = mask if mask is None or mask.size(-1) == 1 else mask[..., start:stop]
        return Seen(stop - start, False, cut)
    stop = min(stop, last)
    if start >= stop:
        return None
    if stop - 1 <= first:
        return Seen(stop - start, False, None)
    if queries == (start, stop):
        return Seen(stop - start, True, None)
    places = torch.arange(first, last, device=device), torch.arange(start, stop, device=device)
    visible = places[1] <= places[0].unsqueeze(1)
    return Seen(stop - start, False, visible[None, None])


def hidden_queries(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return which queries see no key at all: their result is 0, as torch has it. None for none.

    mask: of some queries and all keys. The last dim of the result is 1.

    >>> hidden_queries(torch.tensor([[True, False], [False, False]]))
    tensor([[False],
            [ True]])
    """
    if mask is None:
        return None
    hides = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    return hides.all(-1, keepdim=True)


def broadcast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values of one batch, as torch broadcasts them: kernels read beyond
    the end of what has less. Keys and values have as many heads, by which those of the queries can
    be divided.

    >>> key = torch.ones(1, 2, 4)
    >>> [tuple(each.shape) for each in broadcast(torch.ones(3, 2, 5, 4), key, key)]
    [(3, 2, 5, 4), (3, 2, 2, 4), (3, 2, 2, 4)]
    """
    rank = max(each.dim() for each in (query, key, value))
    if query.dim() == key.dim() == value.dim() and (
        query.shape[:-3] == key.shape[:-3] == value.shape[:-3]
        and key.shape[:-2] == value.shape[:-2]
        and (rank < 3 or not query.size(-3) or key.size(-3) <= query.size(-3))
    ):
        return query, key, value
    tensors = [each[(None,) * (rank - each.dim())] for each in (query, key, value)]
    batch = torch.broadcast_shapes(*(each.shape[:-3] for each in tensors))
    heads = max(each.size(-3) for each in tensors)
    alike = []
    for each in tensors:
        of_one = each.expand(*batch, *each.shape[-3:])
        alike.append(of_one.repeat_interleave(heads // each.size(-3), -3))
    return alike[0], alike[1], alike[2]


def levelled(
    query: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return queries and a mask of the same softmax whose blocks can be put together.

    A query may be added the least number of its type to all its scores. The logarithm of a sum of
    these is that number, of however many keys: rows are moved up so that none lies far down. Where
    a number so large is added that nothing is left of the scores, torch gives the mean of all
    values, as it does for a query of zeros; keys have no gradient from it then.

    >>> levelled(torch.ones(2, 1), torch.tensor([[0.0, 1.0], [-1e38, -1e38]]))
    (tensor([[1.],
            [0.]]), tensor([[0., 1.],
            [0., 0.]]))
    """
    if mask is None or mask.dtype == torch.bool:
        return query, mask
    top = mask.amax(-1, keepdim=True)
    top = torch.where((top < _FAR_DOWN) & (top > -torch.inf), top, 0)
    lost = top < -_LOST / torch.finfo(precise(query.dtype)).eps
    return query.masked_fill(lost, 0), mask - top


class Total:
    """The result of some queries over the keys that they have seen so far.

    result: (b, n, s, e), None before the first. sums: the logarithms of the sums, (b, n, s).
    """

    def __init__(self) -> None:
        self.result: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None

    def add(self, result: torch.Tensor, sums: torch.Tensor) -> None:
        """Add what a block of keys gave."""
        result = result.to(sums.dtype)
        if self.result is None or self.sums is None:
            self.result, self.sums = result, sums
            return
        share = torch.sigmoid(sums - self.sums).unsqueeze(-1)
        self.result = torch.lerp(self.result, result, share)
        self.sums = torch.logaddexp(self.sums, sums)


def block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: Seen, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention to one block of keys, and the logarithms of its sums.

    query: (b, n, s, d). key, value: (b, g, t, d), (b, g, t, e), of which n / g heads share one. A
    query that sees none of the block has any finite result, and a sum beside which that of any key
    that is seen is everything: there is one, or the query is one of `hidden_queries`.
    """
    key, value = (_heads_of(query, each[..., : sight.keys, :]) for each in (key, value))
    added = _added(sight, query.dtype)
    if _is_fused(query, value):
        return attention_and_sums((query, key, value), added, sight.causal, scale)
    results, sums = [], []
    for rows in _rows(query, sight):
        scores = _scores(query, key, sight, added, scale, rows)
        logarithms = scores.logsumexp(-1)
        weights = (scores - logarithms.unsqueeze(-1)).exp()
        results.append((weights @ value.to(weights.dtype)).to(query.dtype))
        sums.append(logarithms)
    return torch.cat(results, -2), torch.cat(sums, -1)


def block_gradients(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sight: Seen,
    scale: float,
    grad: torch.Tensor,
    result: torch.Tensor,
    sums: torch.Tensor,
    with_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients that a block of keys gives to query, key and value, which are `tensors`,
    and to its part of the mask.

    grad, result, sums: of these queries over all keys. with_mask: whether that of the mask is asked
    for, which no fused kernel gives.
    """
    query, *pair = tensors
    groups, hidden = pair[0].size(1), pair[0].size(-2) - sight.keys
    key, value = (_heads_of(query, each[..., : sight.keys, :]) for each in pair)
    added, of_mask = _added(sight, query.dtype), None
    if _is_fused(query, value) and not with_mask:
        of_query, *of_pair = attention_gradients(
            (query, key, value), added, sight.causal, scale, grad, result, sums
        )
    else:
        kind = precise(query.dtype)
        parts, masks = [], []
        of_pair = [torch.zeros_like(each, dtype=kind) for each in (key, value)]
        for rows in _rows(query, sight):
            scores = _scores(query, key, sight, added, scale, rows)
            weights = (scores - sums[..., rows].unsqueeze(-1)).exp()
            above = grad[..., rows, :].to(kind)
            inner = (above * result[..., rows, :].to(kind)).sum(-1, keepdim=True)
            of_scores = weights * (above @ value.to(kind).mT - inner)
            masks.append(of_scores)
            parts.append(of_scores @ key.to(kind) * scale)
            of_pair[0] += of_scores.mT @ query[..., rows, :].to(kind) * scale
            of_pair[1] += weights.mT @ above
        of_query = torch.cat(parts, -2)
        if sight.mask is not None and with_mask:
            of_mask = torch.cat(masks, -2).sum_to_size(sight.mask.shape)
    of_key, of_value = (
        torch.constant_pad_nd(_groups_of(each, groups), (0, 0, 0, hidden)) for each in of_pair
    )
    return of_query, of_key, of_value, of_mask


def _heads_of(query: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return keys or values with a head for each of the queries', which share them in runs."""
    heads, groups = query.size(1), tensor.size(1)
    return tensor if heads == groups else tensor.repeat_interleave(heads // groups, 1)


def _groups_of(gradient: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the gradient of keys or values from that of a head for each of the queries'."""
    heads = gradient.size(1)
    return gradient if heads == groups else gradient.unflatten(1, (groups, -1)).sum(2)


def _is_fused(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Say whether a block is computed by a kernel of torch's."""
    return query.numel() > 0 and has_attention_sums(query, value)


def _added(sight: Seen, kind: torch.dtype) -> torch.Tensor | None:
    """Return what is added to the scores: the least number where a key is hidden, as the sum of
    scores of -inf alone is none.
    """
    mask = sight.mask
    if mask is None:
        return None
    least = torch.finfo(kind).min
    if mask.dtype == torch.bool:
        return mask.new_zeros(mask.shape, dtype=kind).masked_fill(~mask, least)
    return mask.clamp(min=least).to(kind)


def _rows(query: torch.Tensor, sight: Seen) -> list[slice]:
    """Return the runs of queries that are computed one after the other."""
    count = query.size(-2)
    step = max(1, _MOST_SCORES // max(1, query.size(0) * query.size(1) * sight.keys))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    sight: Seen,
    added: torch.Tensor | None,
    scale: float,
    rows: slice,
) -> torch.Tensor:
    """Return the scores of some rows of queries."""
    kind = precise(query.dtype)
    scores = query[..., rows, :].to(kind) @ key.to(kind).mT * scale
    if sight.causal:
        places = torch.arange(query.size(-2), device=query.device)[rows]
        keys = torch.arange(sight.keys, device=query.device)
        return scores.masked_fill(keys > places.unsqueeze(1), -torch.inf)
    if added is None:
        return scores
    return scores + (added if added.size(-2) == 1 else added[..., rows, :])
