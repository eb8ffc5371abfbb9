"""What a forward leaves behind besides its result: attributes and objects that it writes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.capture.equal_blocks import token_of
from autoparallel.errors import CaptureError
from autoparallel.support.memory_writes import Watch

__all__ = ["NoReplacing", "changed", "effects", "moving", "refuse_effects", "tensors_left"]

_HELD = frozenset(vars(nn.Module()))
_HOOKS = tuple(name for name in sorted(_HELD) if name.endswith("_hooks"))
_NOTHING: Mapping[int, str] = {}
_DEPTH = 3  # levels of plain objects that are opened


def effects(
    module: nn.Module, arguments: Mapping[str, Any], known: Mapping[int, str] = _NOTHING
) -> dict[str, Any]:
    """By a name for each, what a caller may see change: the same values, no side effects.

    The values of buffers are not looked at: a graph says what it writes to them. known: names of
    tensors by id, which stand for the model's parameters although they are others.
    """
    paths = dict(known)
    for tensors in (module.named_parameters(), module.named_buffers()):
        paths.update((id(tensor), path) for path, tensor in tensors)
    found: dict[str, Any] = {}
    for path, inner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(inner).items():
            if name not in _HELD:
                found[f"its attribute {prefix}{name}"] = token_of(value, paths, depth=_DEPTH)
        # By their dicts: a tracer shows modules in the guise of others.
        found[f"the modules in {path or 'it'}"] = [
            (name, None if child is None else id(vars(child)))
            for name, child in inner._modules.items()
        ]
        for name in _HOOKS:
            hooks = vars(inner)[name]
            found[f"{name} of {path or 'the model'}"] = [*hooks, *map(id, hooks.values())]
        for kind in ("_parameters", "_buffers"):
            held = [(name, value is None) for name, value in vars(inner)[kind].items()]
            found[f"the names in {prefix}{kind}"] = held
    for name, value in arguments.items():
        kind = type(value).__name__
        found[f"its argument {name} (a {kind})"] = token_of(value, paths, depth=_DEPTH)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what is not as it was."""
    return tuple(name for name in {**before, **after} if before.get(name) != after.get(name))


def moving(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what is not as it was, although tensors may be others in the same places."""
    names = changed(before, after)
    return tuple(n for n in names if _places(before.get(n)) != _places(after.get(n)))


def _places(token: Any) -> Any:
    """The token with all tensors alike that the model does not know."""
    if not isinstance(token, (tuple, list)):
        return token
    if len(token) == 3 and token[0] == "tensor":
        return "tensor"
    return tuple(map(_places, token))


def tensors_left(module: nn.Module, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """By their paths, tensors that are now attributes of modules, of the effects of these names."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        place = name.removeprefix("its attribute ")
        owner, _, last = place.rpartition(".")
        if place != name:
            value = vars(module.get_submodule(owner)).get(last)
            if isinstance(value, torch.Tensor):
                found[place] = value
    return found


def refuse_effects(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises CaptureError that names what has changed: a graph would not do it again."""
    names = changed(before, after)
    if names:
        raise CaptureError(
            f"the forward writes to {', '.join(names)}",
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
