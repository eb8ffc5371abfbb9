"""One run of the user's model on its example inputs: which modules are called, and with what."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autoparallel.errors import CaptureError
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.module_copy import shallow_copy
from autoparallel.support.pytree import Skeleton, flatten, rebuild
from autoparallel.support.rng_state import seeded
from autoparallel.support.torch_private import is_functorch_wrapped_tensor

__all__ = ["Call", "record"]


@dataclass
class Call:
    """The first call of a module. callers: paths of the modules that called it, of any call.

    tensors: stand-ins on the meta device with the devices of the real ones.
    """

    skeleton: Skeleton
    tensors: list[tuple[torch.Tensor, torch.device]]
    callers: dict[str, None] = field(default_factory=dict)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) as they were, with tensors of any content."""
        made = [torch.empty_like(like, device=device) for like, device in self.tensors]
        args, kwargs = rebuild(self.skeleton, made)
        return args, kwargs

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for calls that a tracer cannot tell apart."""
        looks = [(t.shape, t.stride(), t.dtype, device) for t, device in self.tensors]
        return (str(self.skeleton), *looks)


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int = 0
) -> dict[str, Call]:
    """The calls of all modules but the model itself, by path, in the order of the first calls.

    The run is without gradients, on a copy of the tree, and with random numbers of its own: the
    same on every rank. Whatever it writes to is put back.
    Raises CaptureError where the run fails.
    """
    made = shallow_copy(model)
    calls: dict[str, Call] = {}
    stack: list[str] = [""]

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors, skeleton = flatten((args, kwargs))
            if path not in calls and not any(map(is_functorch_wrapped_tensor, tensors)):
                kept = [(torch.empty_like(t, device="meta"), t.device) for t in tensors]
                calls[path] = Call(_frozen(skeleton), kept)
            if path in calls:
                calls[path].callers[stack[-1]] = None
            stack.append(path)

        return hook

    def leave(*_: Any) -> None:
        stack.pop()

    for path, module in made.named_modules():
        if path:
            module.register_forward_pre_hook(enter(path), with_kwargs=True)
            module.register_forward_hook(leave, always_call=True)
    tensors, skeleton = flatten((args, dict(kwargs)))
    given = rebuild(skeleton, [tensor.detach().clone() for tensor in tensors])
    try:
        with untouched(model, given, values=True), torch.no_grad(), seeded(seed):
            made(*given[0], **given[1])
    except Exception as error:
        raise CaptureError(
            f"the example run of {type(model).__name__} failed",
            why=f"{type(error).__name__}: {error}",
            fix="pass example_inputs with which the model runs",
        ) from error
    return calls


def _frozen(skeleton: Skeleton) -> Skeleton:
    """With copies of the objects that the run may change later."""
    sample = skeleton.sample
    plain = hasattr(sample, "__dict__") and not isinstance(sample, (type, nn.Module))
    if skeleton.kind == "constant" and plain and not callable(sample):
        with contextlib.suppress(Exception):
            sample = copy.deepcopy(sample)
    return Skeleton(skeleton.kind, sample, skeleton.keys, tuple(map(_frozen, skeleton.children)))
