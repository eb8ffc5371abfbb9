"""Transforms of torch.func in a forward: a graph gets the plain ops that they make.

What `vmap` and `grad` call sees wrapped tensors, of which a tracer of the whole forward knows
nothing. So each outermost transform is first run by itself, on tensors without data, and the plain
ops that come of it are written down: batched ones of `vmap`, those of the forward and the backward
pass of `grad`. These are then called in its place, under all that the trace watches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from autoparallel.capture.held_tensors import HeldTensors
from autoparallel.capture.repeated_calls import SeenCalls
from autoparallel.errors import CaptureError
from autoparallel.support.pytree import flatten, rebuild
from autoparallel.support.torch_private import (
    calling_module,
    in_function_transform,
    plain_ops_of,
    replaced_transforms,
)

__all__ = ["lowered_transforms"]


# Modules between one that asks for a gradient and a mode.
_BETWEEN = ("autoparallel.", "torch.autograd", "torch.overrides")
# Autograd's own backward pass reads detached copies of what the forward has saved.
_AUTOGRAD = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class PlainOps(TorchFunctionMode):
    """A mode in which what a function makes while gradients are switched off is detached.

    The plain ops of a transform are written down without the regions they are in, such as those
    under `torch.no_grad()`. A detached tensor says the same. Raises CaptureError for a tensor that
    is written to there, and where autograd is asked for a gradient, which a transform is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.is_grad_enabled()

    def __torch_function__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _AUTOGRAD and _caller() != "torch":
            raise CaptureError(
                "the forward calls autograd under a transform of torch.func",
                why="its gradient could not be differentiated once more in a graph",
                fix="use torch.func.grad",
            )
        result = function(*args, **(kwargs or {}))
        if not self.before or torch.is_grad_enabled():
            return result
        written = {id(item) for item in (*args, *(kwargs or {}).values())}
        tensors, form = flatten(result)
        if any(id(tensor) in written for tensor in tensors):
            raise CaptureError(
                "the forward writes to a tensor without gradients under a transform of torch.func",
                why="a graph has the plain ops of a transform, and no such regions",
                fix="compute a new tensor instead",
            )
        return rebuild(form, [tensor.detach() for tensor in tensors]) if tensors else result


@contextmanager
def lowered_transforms(
    inputs: Sequence[torch.Tensor], held: HeldTensors, seen: SeenCalls
) -> Iterator[None]:
    """Return a context in which transforms of torch.func are run as the plain ops that they make.

    inputs: of the forward, whose sizes are known within. held, seen: modes of the trace, under
    which the user's functions run too. seen notes what they call, as it does in a run that is not
    traced, and not the plain ops.
    """

    def lowered(
        original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a transform of a function. original: by what torch runs it, with these arguments.

        Raises CaptureError where random numbers are drawn within.
        """
        if in_function_transform():  # inside of another one
            return original(function, *args, **kwargs)
        own, form = flatten((args, kwargs))
        results: list[Any] = []

        def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
            """Run the transform on tensors in the places of its own, and return what it makes."""
            args, kwargs = rebuild(form, list(tensors[: len(own)]))
            with held.in_transform(), held, PlainOps(), seen:
                made, result = flatten(original(function, *args, **kwargs))
            results.append(result)
            return made

        tensors = [*own, *inputs]
        program = plain_ops_of(run, tensors)
        if any(torch.Tag.nondeterministic_seeded in _tags(node) for node in program.graph.nodes):
            raise CaptureError(
                "the forward draws random numbers under a transform of torch.func",
                why="they are drawn in another order there than a graph draws them in",
                fix="draw them outside of it, and pass them to it",
            )
        with seen.resting():
            return rebuild(results[-1], list(program(*tensors)))

    with replaced_transforms(lowered):
        yield


def _caller() -> str:
    """Return the module that asks autograd for what a mode is told of, past other modes."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(_BETWEEN):
        frame = frame.f_back
    return "" if frame is None else calling_module(frame)


def _tags(node: torch.fx.Node) -> Sequence[torch.Tag]:
    """Return the tags of the op that a node calls."""
    return getattr(node.target, "tags", ())
