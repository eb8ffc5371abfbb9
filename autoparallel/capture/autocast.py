"""What autocast does to a call: which operands it casts, and to what."""

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
    """What really runs below autocast: every op, with the types of its tensors.

    Fake tensors are asked for devices and sizes on the way, some only the first time: what makes no
    tensor and writes to none does not count.
    """

    def __init__(self, operands: list[torch.Tensor]) -> None:
        super().__init__()
        self.places = {id(operand): index for index, operand in enumerate(operands)}
        self.casts: dict[int, torch.dtype] = {}
        self.rows: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        place = self.places.get(id(args[0])) if args else None
        if str(function) == _CAST and place is not None and not self.rows:
            self.casts[place] = made.dtype
        elif _tensors(made) or schema_of(function).is_mutable:
            flat, _ = tree_flatten((args, kwargs or {}))
            kinds = [leaf.dtype if isinstance(leaf, torch.Tensor) else str(leaf) for leaf in flat]
            self.rows.append((str(function), kinds))
        return made


def _tensors(made: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(made)[0] if isinstance(leaf, torch.Tensor)]


def casts_of(
    target: Any, args: Any, kwargs: Any, device: str, dtype: torch.dtype
) -> dict[int, torch.dtype] | None:
    """The operands that autocast to `dtype` casts before `target` runs, by position, with types.

    args, kwargs: with fake tensors. Found by running the call under autocast, and proven by running
    it again without, on operands that are cast before: all that runs must be the same. None where
    it is not.
    """
    flat, shape = tree_flatten((args, kwargs))
    # Aliases, so that an operand that occurs twice has two places.
    flat = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
    operands = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]

    def ran(casts: dict[int, torch.dtype]) -> tuple[_Recorder, list[torch.dtype]]:
        cast = iter(
            [
                operand.to(casts[place]) if place in casts else operand
                for place, operand in enumerate(operands)
            ]
        )
        leaves = [next(cast) if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        own_args, own_kwargs = tree_unflatten(leaves, shape)
        with _Recorder([] if casts else operands) as recorder:
            made = target(*own_args, **own_kwargs)
        return recorder, [tensor.dtype for tensor in _tensors(made)]

    with torch.no_grad():
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            under, kinds = ran({})
        plain, plain_kinds = ran({})
        if (plain.casts, plain.rows, plain_kinds) == (under.casts, under.rows, kinds):
            return {}  # what is cast, the op casts by itself
        low = {place: kind for place, kind in under.casts.items() if kind == dtype}
        for casts in filter(None, (under.casts, low)):
            outside, outside_kinds = ran(casts)
            if outside.rows == under.rows and outside_kinds == kinds:
                return casts
    return None
