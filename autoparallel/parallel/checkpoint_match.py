"""The names in a checkpoint, and the check that it is of this model and of these optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.saved_optimizers import (
    Optimizers,
    describe,
    require_same_optimizers,
)

__all__ = [
    "EXTRA",
    "GROUPS",
    "KINDS",
    "MODEL",
    "OPTIMIZER",
    "PLAIN",
    "parameter_groups",
    "require_optimizers",
    "require_same_tensors",
]

# What comes before the names of the model's and of the optimizer's tensors.
MODEL, OPTIMIZER = "model.", "optimizer.state."
# What comes before the names of all that is no tensor; see plain_values.py.
PLAIN = "plain."
# What the optimizers are known by, the settings of their groups, and what the user gave besides.
KINDS, GROUPS, EXTRA = "optimizer.kinds", "optimizer.groups", "extra"


def require_optimizers(
    module: nn.Module, optimizers: Optimizers, saved: Mapping[str, Any], target: Path
) -> None:
    """Raise AutoParallelError where optimizers are given and the checkpoint is of others, or none.

    saved: the kinds and the groups' settings, as far as they are in the checkpoint.
    """
    described = describe(module, optimizers)
    if not optimizers:
        return
    if GROUPS not in saved:
        raise AutoParallelError(
            f"the checkpoint in {target} has no optimizer",
            why="it was saved without one",
            fix="leave it out here, too, and begin it anew",
        )
    if KINDS in saved:
        require_same_optimizers(saved[KINDS], described, target)
    groups = parameter_groups(optimizers)
    if len(saved[GROUPS]) != len(groups):
        raise AutoParallelError(
            f"the optimizer has {len(groups)} groups of parameters, and that of the checkpoint in "
            f"{target} had {len(saved[GROUPS])}",
            why="learning rate and other settings are saved for each group",
            fix="make the optimizer with as many groups as it was saved with",
        )


def parameter_groups(optimizers: Optimizers) -> list[dict[str, Any]]:
    """Return the groups of parameters of all optimizers, in order."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def require_same_tensors(
    stored: Mapping[str, Any],
    known: Mapping[str, Any],
    folder: Path,
    absent: Collection[str] = (),
) -> None:
    """Raise AutoParallelError that names all tensors that are not in the checkpoint as they are.

    stored: what is to be filled. known: torch's metadata of what the checkpoint has, by name.
    absent: the names of what other ranks fill.
    """
    wrong, rounded = [], []
    for name, value in stored.items():
        is_tensor = isinstance(value, torch.Tensor)
        saved = known.get(name if is_tensor else PLAIN + name)
        if saved is None and (name in known or PLAIN + name in known):
            wrong.append(f"{name} is a tensor only in one of the two")
        elif saved is None:
            wrong.append(f"{name} is not in it")
        elif is_tensor:
            dtypes = (value.dtype, saved.properties.dtype)
            if saved.size != value.size():
                wrong.append(f"{name} is {tuple(value.size())}, there {tuple(saved.size)}")
            # Another precision is read; fractions would be cut off without a word.
            elif dtypes[0] != dtypes[1] and not all(dtype.is_floating_point for dtype in dtypes):
                wrong.append(f"{name} is {dtypes[0]}, there {dtypes[1]}")
            elif _is_narrower(*dtypes):
                rounded.append(f"{name} is {dtypes[0]}, there {dtypes[1]}")
    wrong += [
        f"{name.removeprefix(PLAIN)} is in it alone"
        for name in known
        if name.removeprefix(PLAIN).startswith(MODEL)
        and name.removeprefix(PLAIN) not in stored
        and name not in absent
    ]
    if wrong:
        raise AutoParallelError(
            f"the checkpoint in {folder} is of another model or optimizer",
            why="; ".join(wrong[:8]) + (f"; {len(wrong) - 8} more" if len(wrong) > 8 else ""),
            fix="pass the model and the optimizer that were given to save_checkpoint()",
        )
    if rounded:
        more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
        warnings.warn(
            f"the checkpoint in {folder} has tensors of wider types: numbers are rounded, and are "
            f"infinite where they are too large: {rounded[0]}{more}",
            stacklevel=2,
        )


def _is_narrower(own: torch.dtype, other: torch.dtype) -> bool:
    """Return whether a floating point type holds fewer numbers than another."""
    if not (own.is_floating_point and other.is_floating_point):
        return False
    one, two = torch.finfo(own), torch.finfo(other)
    return one.max < two.max or one.eps > two.eps
