"""Megatron's words for the split of a product on a mesh axis: by columns, or by rows."""

from __future__ import annotations

from collections.abc import Sequence

from autoparallel.placement import Layout, Partial, Shard

__all__ = ["is_column", "is_row", "split_word"]


def is_row(operands: Sequence[Layout], results: Sequence[Layout], axis: int) -> bool:
    """Say whether an op sums over what is split on an axis.

    operands, results: the layouts of its tensors.

    >>> is_row([(Shard(1),), (Shard(0),)], [(Partial(),)], 0)
    True
    """
    split = any(isinstance(layout[axis], Shard) for layout in operands)
    return split and all(isinstance(layout[axis], Partial) for layout in results)


def is_column(
    operands: Sequence[Layout], results: Sequence[Layout], weights: Sequence[bool], axis: int
) -> bool:
    """Say whether an axis splits an op's weights and its results, and not its activations.

    operands, results: the layouts of its tensors. weights: per operand, whether it is a weight.
    """
    split = [isinstance(layout[axis], Shard) for layout in operands]
    of_weights = [one for one, weight in zip(split, weights, strict=True) if weight]
    others = [one for one, weight in zip(split, weights, strict=True) if not weight]
    return (
        any(of_weights)
        and not any(others)
        and all(isinstance(layout[axis], Shard) for layout in results)
    )


def split_word(
    operands: Sequence[Layout], results: Sequence[Layout], weights: Sequence[bool], axis: int
) -> str:
    """Return "column", "row", "whole", or "inputs" for a split of what the inputs bring.

    operands, results, weights: as in `is_column`.
    """
    if is_row(operands, results, axis):
        return "row"
    if is_column(operands, results, weights, axis):
        return "column"
    layouts = (*operands, *results)
    return "inputs" if any(isinstance(layout[axis], Shard) for layout in layouts) else "whole"
