"""Autocast regions as explicit casts: which operands autocast casts before a call, and to what."""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.support.torch_private import (
    TorchDispatchMode,
    schema_of,
    tree_flatten,
    tree_unflatten,
)

__all__ = ["casts_of"]

_CAST = "aten._to_copy.default"


class _Recorder(TorchDispatchMode):
    """Records the ops that run below autocast, in order, with the types of their tensors.

    operands: the tensors of the call, whose casts before the first other op are recorded apart.
    casts: the type to which each operand was cast, by its position. rows: (op, types of its
    tensors and values of its other arguments) for every op that runs.

    Fake tensors are asked for devices and sizes on the way, some only the first time. Ops that
    return no tensor and write to none are therefore left out, or two equal runs would differ.
    """

    def __init__(self, operands: list[torch.Tensor]) -> None:
        super().__init__()
        self.places = {id(operand): index for index, operand in enumerate(operands)}
        self.casts: dict[int, torch.dtype] = {}
        self.rows: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        place = self.places.get(id(args[0])) if args else None
        # Autocast casts before the op runs; a cast after that is part of the op's own definition.
        if str(function) == _CAST and place is not None and not self.rows:
            self.casts[place] = result.dtype
        elif _tensors(result) or schema_of(function).is_mutable:
            flat, _ = tree_flatten((args, kwargs or {}))
            kinds = [leaf.dtype if isinstance(leaf, torch.Tensor) else str(leaf) for leaf in flat]
            self.rows.append((str(function), kinds))
        return result


def _tensors(result: Any) -> list[torch.Tensor]:
    """Return the tensors in what an op returned."""
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]


def casts_of(
    target: Any, args: Any, kwargs: Any, device: str, dtype: torch.dtype
) -> dict[int, torch.dtype] | None:
    """Return the operands that autocast casts before a call, by position, each with its new type.

    target: the op. args, kwargs: its arguments, with fake tensors; operands are counted in their
    order. device, dtype: of the autocast region, such as "cuda" and torch.bfloat16.

    Torch's lists of ops that autocast concerns are no public data, so the call is tried: it runs
    under autocast, where the casts are seen, and again without, on operands that were cast before.
    All that runs must be the same, op by op, and so must the types of the results. Returns None
    where no set of casts passes. Raises RuntimeError where the call cannot be tried, as in torch
    2.11 a product of symbolic sizes inside of an autograd Function.

    Example: under autocast to bfloat16, `aten.mm.default` of two float32 operands gives
    {0: torch.bfloat16, 1: torch.bfloat16}.
    """
    flat, structure = tree_flatten((args, kwargs))
    # Aliases, so that an operand that occurs twice has two places.
    flat = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
    operands = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]

    def run(casts: dict[int, torch.dtype]) -> tuple[_Recorder, list[torch.dtype]]:
        """Run the call with these casts before it. Returns the record and the results' types."""
        cast_operands = iter(
            [
                operand.to(casts[place]) if place in casts else operand
                for place, operand in enumerate(operands)
            ]
        )
        leaves = [next(cast_operands) if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        cast_args, cast_kwargs = tree_unflatten(leaves, structure)
        with _Recorder([] if casts else operands) as recorder:
            result = target(*cast_args, **cast_kwargs)
        return recorder, [tensor.dtype for tensor in _tensors(result)]

    with torch.no_grad():
        # Without the cache: it would skip the cast of a weight that another call has cast before.
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            under, kinds = run({})
        plain, plain_kinds = run({})
        if (plain.casts, plain.rows, plain_kinds) == (under.casts, under.rows, kinds):
            return {}  # what is cast, the op casts by itself
        # Casts to another type than the region's may be the op's own: both sets are tried.
        low = {place: kind for place, kind in under.casts.items() if kind == dtype}
        for casts in filter(None, (under.casts, low)):
            outside, outside_kinds = run(casts)
            if outside.rows == under.rows and outside_kinds == kinds:
                return casts
    return None
