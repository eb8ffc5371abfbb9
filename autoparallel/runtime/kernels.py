"""Kernels: operators on parts that know where their part begins, and may communicate inside.

Each takes the op's own arguments, with this rank's tensors, then `group`, the ranks that split a
loop of the op, and `size`, the whole size of that loop. A result that is "a pending sum" has
placement Partial: the ranks' results are still to be added. Kernels of this file are written for an
op, those in `discovered_kernels` for kinds of ops, and those in `statistics` reduce over a split
dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from autoparallel.placement import part_bounds
from autoparallel.runtime import ctc_loss, routed_experts  # noqa: F401  # ops, called by name
from autoparallel.runtime.collectives import pending_sum
from autoparallel.runtime.cross_entropy import (
    cross_entropy_classes,
    cross_entropy_rows,
    cross_entropy_tokens,
)
from autoparallel.runtime.discovered_kernels import (
    alike_elsewhere,
    combined_parts,
    masked_lookup,
    weighted_mean,
)
from autoparallel.runtime.expert_kernels import (
    experts_exchanged,
    experts_inner,
    experts_summed,
)
from autoparallel.runtime.groups import Group
from autoparallel.runtime.memory_order import in_memory_order
from autoparallel.runtime.split_attention import attention_queries, attention_ring
from autoparallel.runtime.split_indices import places_here
from autoparallel.runtime.stand_ins import stand_ins_for, without_stand_ins
from autoparallel.runtime.statistics import (
    amax_split,
    amin_split,
    argmax_split,
    argmin_split,
    batch_norm_split,
    log_softmax_split,
    logsumexp_split,
    max_split,
    min_split,
    softmax_split,
)
from autoparallel.runtime.value_branches import branch_taken
from autoparallel.runtime.variance import (
    group_norm_split,
    instance_norm_split,
    rms_norm_split,
    variance_split,
)
from autoparallel.runtime.window_kernels import convolution_edges, pool_edges, resample_edges

__all__ = [
    "alike_elsewhere",
    "amax_split",
    "amin_split",
    "argmax_split",
    "argmin_split",
    "attention",
    "attention_queries",
    "attention_ring",
    "batch_norm_split",
    "branch_taken",
    "combined_parts",
    "convolution_edges",
    "convolution_inputs",
    "convolution_outputs",
    "cross_entropy_classes",
    "cross_entropy_rows",
    "cross_entropy_tokens",
    "embedding",
    "embedding_rows",
    "experts_exchanged",
    "experts_inner",
    "experts_summed",
    "gather_split",
    "group_norm_split",
    "grouped_mm_matrices",
    "index_select_split",
    "instance_norm_split",
    "kernel_arguments",
    "layer_norm",
    "log_softmax_split",
    "logsumexp_split",
    "masked_lookup",
    "max_split",
    "min_split",
    "pool_edges",
    "repeat",
    "resample_edges",
    "rms_norm",
    "rms_norm_split",
    "softmax_split",
    "stand_ins_for",
    "variance_split",
    "weighted_mean",
    "without_stand_ins",
]

_HELPERS = {"attention", "embedding", "kernel_arguments", "layer_norm", "repeat", "rms_norm"}
_HELPERS |= {"stand_ins_for", "without_stand_ins"}
# What an emitted program itself gives to kernels.
_GIVEN = {"group", "size", "run", "dim", "extent"}


@functools.cache
def kernel_arguments(name: str) -> frozenset[str]:
    """Return the names of the arguments that a rule may give to a kernel.

    name: of the kernel. Raises ValueError where there is no kernel of that name: names reach the
    text of programs, so that they must be known ones.

    >>> sorted(kernel_arguments("weighted_mean"))
    ['operation', 'where']
    """
    if name not in __all__ or name in _HELPERS:
        raise ValueError(f"there is no kernel {name!r:.60}")
    parameters = inspect.signature(globals()[name]).parameters.values()
    named = (each.name for each in parameters if each.kind is each.KEYWORD_ONLY)
    return frozenset(named) - _GIVEN


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *arguments: Any,
    enable_gqa: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Return torch's fused attention, on a rank too that holds nothing of it.

    Arguments: as of `torch.nn.functional.scaled_dot_product_attention`. Gradients of what torch
    returns for no elements depend on nothing. In gradients of gradients such a rank would leave out
    what the others send; so it computes the products, of nothing.
    """
    if query.numel() and key.numel():
        options["enable_gqa"] = enable_gqa
        attend = functional.scaled_dot_product_attention
        return attend(query, key, value, mask, *arguments, **options)
    if enable_gqa and key.size(-3):
        times = query.size(-3) // key.size(-3)
        key, value = (each.repeat_interleave(times, -3) for each in (key, value))
    scores = query @ key.transpose(-2, -1)
    if mask is not None and mask.requires_grad:
        scores = scores + mask
    return scores.softmax(-1) @ value


def embedding(weight: torch.Tensor, index: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Return torch's embedding, on a rank too that looks up nothing.

    Arguments: as of `torch.embedding`, which cannot be differentiated twice there.
    """
    if index.numel():
        return torch.embedding(weight, index, *arguments)
    return weight.index_select(0, index.flatten()).view(*index.shape, weight.size(1))


def repeat(x: torch.Tensor, times: Sequence[int]) -> torch.Tensor:
    """Return x repeated along its dims, on a rank too that has none of the repetitions.

    times: per dim, the last ones if they are fewer, as of `torch.tile`. Of no repetitions, torch's
    gradient of x would depend on nothing, where that of other ranks depends on what comes in.

    >>> repeat(torch.ones(1, 2), (0, 3)).shape
    torch.Size([0, 6])
    """
    result = x.tile([max(count, 1) for count in times])
    for dim, count in enumerate(times, start=result.dim() - len(times)):
        result = result if count else result.narrow(dim, 0, 0)
    return result


def layer_norm(x: torch.Tensor, shape: Any, *arguments: Any) -> torch.Tensor:
    """Return torch's layer norm, in the memory order of its operand."""
    return in_memory_order(torch.layer_norm, x, shape, *arguments)


def rms_norm(x: torch.Tensor, shape: Any, *arguments: Any) -> torch.Tensor:
    """Return torch's root mean square norm, in the memory order of its operand."""
    return in_memory_order(torch.rms_norm, x, shape, *arguments)


def embedding_rows(
    weight: torch.Tensor,
    index: torch.Tensor,
    padding: int = -1,
    scale: bool = False,
    sparse: bool = False,
    *,
    group: Group,
    size: int,
) -> torch.Tensor:
    """Look up rows of a table whose rows are split: this rank's rows or zeros, a pending sum.

    weight: (v / n, h). index: any shape, counted from the start of the whole. size: v, rows of the
    whole table. The result is (*index.shape, h). This is Megatron's vocabulary-parallel embedding
    (arXiv:1909.08053, section 3).
    Raises IndexError for an index outside of [0, size).
    """
    with torch.no_grad():
        start, stop = part_bounds(size, group.world_size, group.rank)
        local, elsewhere = places_here(index, size, group, "embedding index")
    if stop == start:
        # No rows are here. The sum of none is 0, and keeps the result dependent on the weight, so
        # that the backward pass runs alike on all ranks.
        rows = weight.new_zeros((*index.shape, weight.size(1))) + weight.sum()
        return pending_sum(rows, group)
    own_padding = padding - start if start <= padding < stop else -1
    rows = torch.embedding(weight, local, own_padding)
    return pending_sum(rows.masked_fill(elsewhere.unsqueeze(-1), 0), group)


def gather_split(
    x: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    sparse_grad: bool = False,
    *,
    group: Group,
    size: int,
) -> torch.Tensor:
    """Take x[a, index[a, i, b], b] along a split dim: this rank's elements or zeros, a pending sum.

    x: split along `dim`, whose whole size is `size`. index: whole, counted from the start of the
    whole dim.
    Raises IndexError for an index outside of [0, size).
    """
    with torch.no_grad():
        local, elsewhere = places_here(index, size, group)
    if not x.size(dim):
        shape = [min(counts) for counts in zip(x.shape, index.shape, strict=True)]
        shape[dim] = index.size(dim)
        return pending_sum(x.new_zeros(shape) + x.sum(), group)
    return pending_sum(x.gather(dim, local).masked_fill(elsewhere, 0), group)


def index_select_split(
    x: torch.Tensor, dim: int, index: torch.Tensor, *, group: Group, size: int
) -> torch.Tensor:
    """Take x[.., index[i], ..] along a split dim: this rank's elements or zeros, a pending sum.

    x: split along `dim`, whose whole size is `size`. index: whole and of one dim, counted from the
    start of the whole dim.
    Raises IndexError for an index outside of [0, size).
    """
    with torch.no_grad():
        local, elsewhere = places_here(index, size, group)
    shape = [1] * x.dim()
    shape[dim] = index.numel()
    if not x.size(dim):
        whole = list(x.shape)
        whole[dim] = index.numel()
        return pending_sum(x.new_zeros(whole) + x.sum(), group)
    selected = x.index_select(dim, local).masked_fill(elsewhere.reshape(shape), 0)
    return pending_sum(selected, group)


def _convolution(weight: torch.Tensor, transposed: bool = False) -> Callable[..., torch.Tensor]:
    """Return torch's convolution for a weight of so many dims."""
    plain = (functional.conv1d, functional.conv2d, functional.conv3d)
    others = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    return (others if transposed else plain)[weight.dim() - 3]


def convolution_inputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *options: Any,
    group: Group,
    size: int,
    transposed: bool,
    **more: Any,
) -> torch.Tensor:
    """Convolve with split input channels: a pending sum, with the bias on the first rank alone.

    x: (b, g c / n, *spatial). weight: (g o, c / n, *kernel), or (g c / n, o, *kernel) of a
    transposed convolution. bias: (g o,). options, more: the op's other arguments. size: the input
    channels of the whole.
    """
    # Times 0 rather than left out: the bias then has a gradient on every rank, and which ranks
    # communicate in the backward pass does not depend on the rank.
    bias_here = bias * (1 if group.rank == 0 else 0)
    run = _convolution(weight, transposed)
    return pending_sum(run(x, weight, bias_here, *options, **more), group)


def convolution_outputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *options: Any,
    group: Group,
    size: int,
    **more: Any,
) -> torch.Tensor:
    """Convolve in groups of which each has a part of its output channels here.

    x: (b, g c, *spatial). weight: (g o / n, c, *kernel). bias: (g o / n,) or None. options, more:
    the op's other arguments, of which the number of groups, g, is read off the shapes: this rank
    may have a part of them.
    """
    groups = x.size(1 - weight.dim()) // weight.size(1)
    return _convolution(weight)(x, weight, bias, *options[:3], **{**more, "groups": groups})


def grouped_mm_matrices(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *, group: Group, size: int
) -> torch.Tensor:
    """Multiply rows by the matrix of their group, the matrices being split: this rank's rows or
    zeros, a pending sum.

    x: (t, k), sorted by group. weight: (e / n, k, m), this rank's matrices. ends: (e,), where the
    rows of each group end. size: e of the whole. The result is (t, m). This rank's rows are moved
    to the front, in their order, so that no size must be known to the host; what lies behind them
    is masked, both before and after the product.
    """
    start, stop = part_bounds(size, group.world_size, group.rank)
    with torch.no_grad():
        places = torch.arange(x.size(0), device=x.device)
        first = ends[start - 1] if start else ends.new_zeros(())
        ends_here = ends[start:stop] - first
        mine = (places < ends_here[-1]).unsqueeze(1)
        # Two rotations by `first`, one the inverse of the other: they keep every shape.
        rotated = (places + first) % max(x.size(0), 1)
        rotated_back = (places - first) % max(x.size(0), 1)
    rows = _grouped_mm(x[rotated].masked_fill(~mine, 0), weight, ends_here.to(ends.dtype))
    return pending_sum(rows.masked_fill(~mine, 0)[rotated_back], group)


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply by torch's grouped product, or by one product after the other for types and sizes
    that it does not take.

    torch 2.13 takes bfloat16 with rows that are multiples of 16 bytes.
    """
    sizes = (x.size(1), weight.size(1), weight.size(2))
    aligned = all(size * x.element_size() % 16 == 0 for size in sizes)
    if x.dtype == torch.bfloat16 and aligned:
        return functional.grouped_mm(x, weight, offs=ends)
    parts = []
    start = 0
    for matrix, stop in zip(weight.unbind(0), ends.tolist(), strict=True):
        parts.append(x[start:stop] @ matrix)
        start = stop
    parts.append(x.new_zeros((x.size(0) - start, weight.size(2))))
    return torch.cat(parts)
