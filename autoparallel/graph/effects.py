"""What a forward leaves behind besides its result: attributes and objects that it writes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.errors import CaptureError
from autoparallel.graph.blocks import token_of
from autoparallel.writes import Watch

__all__ = ["NoReplacing", "effects", "refuse_effects"]

_HELD = frozenset(vars(nn.Module()))
_DEPTH = 3  # levels of plain objects that are opened


def effects(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """By a name for each, what a caller may see change: the same values, no side effects.

    Buffers are not looked at: a graph says what it writes to them.
    """
    found: dict[str, Any] = {}
    for path, inner in module.named_modules():
        for name, value in vars(inner).items():
            if name not in _HELD:
                place = f"{path}.{name}" if path else name
                found[f"its attribute {place}"] = token_of(value, {}, depth=_DEPTH)
    for name, value in arguments.items():
        kind = type(value).__name__
        found[f"its argument {name} (a {kind})"] = token_of(value, {}, depth=_DEPTH)
    return found


def refuse_effects(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises CaptureError that names what has changed: a graph would not do it again."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise CaptureError(
            f"the forward writes to {', '.join(changed)}",
            why="a graph returns values; what it leaves behind in Python objects is lost",
            fix="return the new value instead (for a cache: use_cache=False)",
        )


class NoReplacing(Watch):
    """Refuses what a tracer does not see: tensors that are given other memory, or trained or not.

    model: its parameters must go on being trained as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        named = model.named_parameters(remove_duplicate=False)
        self.names = {id(parameter): path for path, parameter in named}

    def assigned(self, tensor: torch.Tensor, value: Any) -> bool:
        name = self.names.get(id(tensor))
        raise CaptureError(
            "the forward gives other memory to "
            + (f"parameter {name}" if name else "a tensor")
            + " (tensor.data = value)",
            why="a graph returns values, and its parameters stay where they are",
            fix="write the values in place: under torch.no_grad, tensor.copy_(value)",
        )

    def trained(self, tensor: torch.Tensor, value: bool) -> None:
        name = self.names.get(id(tensor))
        if name is not None and tensor.requires_grad != value:
            raise CaptureError(
                f"the forward sets requires_grad of parameter {name}",
                why="what is trained is planned before the model runs",
                fix="set it before the model is split",
            )
