"""Results of ops on the meta device, each found out once: a model calls the same ops many times."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["remembering_meta_results"]

# Arguments that compare by content, and by which torch's own ops are chosen and shaped.
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout)
_PLAIN_TYPES = frozenset((*_PLAIN, torch.memory_format))


def remembering_meta_results() -> AbstractContextManager[Any]:
    """Return a context in which torch's ops on meta tensors run once for each kind of operands.

    On the meta device many ops are run in Python, which takes a hundred times as long as to make
    a tensor of the shape that is known already. Ops that return views, write, or draw random
    numbers are run each time, and so is whatever gets other tensors than plain ones on the meta
    device. Autograd, which lies above, records as ever.

    >>> with remembering_meta_results():
    ...     tensor = torch.ones(2, 3, device="meta")
    ...     (tensor + tensor).shape, (tensor + tensor).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    return _Remembered()


class _Remembered(TorchDispatchMode):
    """The mode. It knows by op and operands whether one tensor is returned, and of what kinds."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, tuple[bool, tuple[Any, ...]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return whether torch wraps the method below, which costs more than the method does."""
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return whether a compiler within takes no notice of this mode, as it computes nothing."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        key = None
        if _makes_new_tensors(func):
            key = _key((*args, *kwargs, *kwargs.values()))
        if key is None:
            return func(*args, **kwargs)
        key = (func, torch.get_default_dtype(), key)
        known = self._known.get(key)
        if known is not None:
            alone, specs = known
            made = [
                torch.empty_strided(size, stride, dtype=dtype, device="meta")
                for size, stride, dtype in specs
            ]
            return made[0] if alone else tuple(made)
        results = func(*args, **kwargs)
        alone = not isinstance(results, tuple)
        several = (results,) if alone else results
        keys = _key(several)
        # A gradient that nobody wants is None.
        if keys is not None and all(isinstance(item, torch.Tensor) for item in several):
            self._known[key] = alone, tuple(item[:3] for item in keys)
        return results


@cache
def _makes_new_tensors(func: Any) -> bool:
    """Return whether an op is one of torch's own that returns nothing but new tensors, which
    follow from its arguments.
    """
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return False
    schema: Any = func._schema
    return (
        not schema.is_mutable
        and bool(schema.returns)
        and all(item.alias_info is None for item in (*schema.arguments, *schema.returns))
        and all(str(item.type) == "Tensor" for item in schema.returns)
        and torch.Tag.nondeterministic_seeded not in func.tags
    )


def _key(items: Any) -> tuple[Any, ...] | None:
    """Return what the shapes of results follow from; None for what is not known by its looks."""
    key: list[Any] = []
    for item in items:
        kind = type(item)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            # A view that is conjugated or negated may be more than its looks.
            if not item.is_meta or item.dtype.is_complex or item.layout is not torch.strided:
                return None
            key.append((item.shape, item.stride(), item.dtype, item.storage_offset()))
        elif kind in _PLAIN_TYPES:
            # 1, 1.0 and True are equal, and not the same to an op.
            key.append((kind, item))
        elif kind is list or kind is tuple:
            inner = _key(item)
            if inner is None:
                return None
            key.append(inner)
        else:
            return None
    return tuple(key)
