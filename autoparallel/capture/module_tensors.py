"""The parameters and buffers of a module by path, and the attributes that every module has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from autoparallel.support.module_paths import join_path

__all__ = ["MODULE_ATTRIBUTES", "first_paths", "named_tensors"]

# The attributes by which torch itself keeps a module: what the user's class adds is not among them.
# `Module.compile()` sets the last one.
MODULE_ATTRIBUTES = frozenset([*vars(nn.Module()), "_compiled_call_impl"])


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Yield (path, module that has it, kind, tensor) for all parameters and buffers.

    kind: "parameter" or "buffer". A tensor that is registered in several places comes once for each
    of its paths.

    >>> [(path, kind) for path, _, kind, _ in named_tensors(nn.Linear(2, 3))]
    [('weight', 'parameter'), ('bias', 'parameter')]
    """
    for path, module in model.named_modules(remove_duplicate=False):
        for kind in ("parameter", "buffer"):
            tensors = module._parameters if kind == "parameter" else module._buffers
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield join_path(path, name), module, kind, tensor


def first_paths(model: nn.Module) -> dict[str, str]:
    """Return for each path of a parameter the path by which the parameter goes.

    That is the first one in the model's order, which `named_parameters` gives as well; tied weights
    have several paths.

    >>> first_paths(nn.Linear(2, 3))
    {'weight': 'weight', 'bias': 'bias'}
    """
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {path: first.setdefault(id(parameter), path) for path, parameter in named}
