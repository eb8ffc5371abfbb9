"""Other engines' wrappers around a parallel module are refused when they are made.

They would average, split or copy parameters that are split already. What they do along a mesh axis
of their own is a mesh axis of the plan.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from autoparallel.errors import WrappedModelError

__all__ = ["RefusedWrappers"]


# The modules of torch that wrap, and the names by which their users know the wrappers.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FSDP"),
)


class RefusedWrappers:
    """Mixed into a parallel module's class: the constructors of wrappers fail in words.

    A wrapper begins by asking for the parameters, or for copies of the module. A module of a single
    rank has whole, plain parameters, which any engine may take.
    """

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return names and parameters as nn.Module does, but raise WrappedModelError where it is
        a wrapper that asks.
        """
        asking = str(sys._getframe(1).f_globals.get("__name__"))
        for reader, wrapper in _WRAPPERS:
            if asking.startswith(reader) and _is_split(self):
                _refuse(self, wrapper)
        named: Iterator[tuple[str, nn.Parameter]] = super().named_parameters(  # type: ignore[misc]
            *args, **kwargs
        )
        return named

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return names and modules as nn.Module does, but raise WrappedModelError where it is
        parallelize_module that asks.
        """
        if not torch.compiler.is_compiling():
            self._refuse_parallelizing(sys._getframe(1))
        children: Iterator[tuple[str, nn.Module]] = super().named_children()  # type: ignore[misc]
        return children

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Return paths and modules as nn.Module does, with the same exception."""
        if not torch.compiler.is_compiling():
            self._refuse_parallelizing(sys._getframe(1))
        modules: Iterator[tuple[str, nn.Module]] = super().named_modules(  # type: ignore[misc]
            *args, **kwargs
        )
        return modules

    def _refuse_parallelizing(self, frame: Any) -> None:
        asking = str(frame.f_globals.get("__name__"))
        if asking.startswith("torch.distributed.tensor") and _is_split(self):
            _refuse(self, "parallelize_module")

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse to be copied to other devices, for which DataParallel calls this."""
        if _is_split(self):
            _refuse(self, "DataParallel")
        return super()._replicate_for_data_parallel()  # type: ignore[misc]


def _is_split(module: Any) -> bool:
    """Return whether there are other ranks that hold parts of the module."""
    state = None if module is None else module.__dict__.get("_autoparallel")
    return state is not None and state.ranks.world_size > 1


def _refuse(module: Any, wrapper: str) -> NoReturn:
    """Raise WrappedModelError for a wrapper, by its name, around a parallel module."""
    ranks = module.__dict__["_autoparallel"].ranks
    axes = ", ".join(f"{name}={size}" for name, size in zip(ranks.names, ranks.sizes, strict=True))
    raise WrappedModelError(
        f"{wrapper} over a module that autoparallelize has split",
        where=f"{type(module).__name__} on Mesh({axes})",
        why="its parameters are DTensors of which each rank holds a part, and their gradients are "
        "summed over the ranks already",
        fix="leave the wrapper out; for data parallelism or FSDP plan with a mesh axis for it: "
        'autoparallelize(model, mesh=Mesh(dp=2, tp=4), local_inputs="dp")',
    )
