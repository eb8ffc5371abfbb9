"""Constants of a trace that are one: equal blocks make equal tensors from numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.capture.global_reads import OuterVariables
from autoparallel.support.memory_writes import memory_of, place_of
from autoparallel.support.model_snapshot import memories_of

__all__ = ["constant_keys"]


def constant_keys(model: nn.Module, constants: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what constants go by, which is equal for those that are one, by their targets.

    model: the one that was traced. A tensor that the user can reach may be written to by itself,
    so that it is one with no other, whatever numbers it has.

    >>> two, second = torch.tensor(2.0), torch.tensor(2.0)
    >>> keys = constant_keys(nn.ReLU(), {"lifted_tensor_0": two, "lifted_tensor_1": second})
    >>> keys["lifted_tensor_0"] == keys["lifted_tensor_1"]
    True
    """
    keys: dict[str, Any] = {}
    for target, value in constants.items():
        keys[target] = target.removeprefix("model.")
        # A meta tensor has no numbers to go by.
        if keys[target].rpartition("lifted_tensor_")[2].isdigit() and not value.is_meta:
            looks = (value.dtype, tuple(value.shape), value.device)
            keys[target] = (*looks, str(value.tolist()))
    if len(set(keys.values())) < len(keys):
        variables = OuterVariables.of(model).variables
        reached = memories_of(model, *(value for _, _, value in variables))
        for target, value in constants.items():
            if memory_of(value) in reached:
                keys[target] = place_of(value)
    return keys
