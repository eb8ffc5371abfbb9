"""Building a model whose buffers have values and whose parameters take no memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

__all__ = ["buffers_alone"]


def buffers_alone() -> AbstractContextManager[Any]:
    """Return a context in which torch.empty, of which parameters are made, is on the meta device.

    Buffers are computed of arange and the like, which are as they would be without it.

    >>> import torch
    >>> with buffers_alone():
    ...     torch.nn.Linear(4, 4).weight.is_meta, torch.arange(4).is_meta
    (True, False)
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Empty(TorchFunctionMode):
        """Sends calls of torch.empty to the meta device."""

        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if function is torch.empty and kwargs.get("device") is None:
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    mode: AbstractContextManager[Any] = Empty()
    return mode
