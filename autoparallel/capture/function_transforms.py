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

from autoparallel.capture.repeated_calls import SeenCalls
from autoparallel.errors import CaptureError
from autoparallel.support.memory_writes import writes
from autoparallel.support.torch_private import (
    calling_module,
    in_function_transform,
    plain_ops_of,
    replaced_transforms,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

__all__ = ["lowered_transforms"]

# Modules between one that asks for a gradient and a mode.
_BETWEEN = ("autoparallel.", "torch.autograd", "torch.overrides")
# Autograd's own backward pass reads detached copies of what the forward has saved.
_AUTOGRAD = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
# Functions that write to a tensor by other names than torch's convention has.
_SETTERS = ("__setitem__", "__set__")
_SEEDED = torch.Tag.nondeterministic_seeded


class PlainOps(TorchFunctionMode):
    """A mode in which what a function makes while gradients are switched off is detached.

    The plain ops of a transform are written down without the regions they are in, such as those
    under `torch.no_grad()`. A detached tensor says the same. Raises CaptureError where a tensor is
    written to there, and where autograd is asked for a gradient, which a transform is not.

    refused: gets these errors, as the model may catch them.
    """

    def __init__(self, refused: list[CaptureError]) -> None:
        super().__init__()
        self.before = torch.is_grad_enabled()
        self.refused = refused

    def __torch_function__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _AUTOGRAD and _caller() != "torch":
            raise _noted(
                self.refused,
                "the forward calls autograd under a transform of torch.func",
                why="its gradient could not be differentiated once more in a graph",
                fix="use torch.func.grad",
            )
        if not self.before or torch.is_grad_enabled():
            return function(*args, **kwargs)
        if writes(function) or function.__name__ in _SETTERS or kwargs.get("out") is not None:
            raise _noted(
                self.refused,
                "the forward writes to a tensor without gradients under a transform of torch.func",
                why="a graph has the plain ops of a transform, and no such regions",
                fix="compute a new tensor instead",
            )
        # What is handed back as it was keeps the graph that it has.
        given = set(map(id, tree_leaves((args, kwargs))))
        return tree_map(
            lambda item: (
                item.detach() if isinstance(item, torch.Tensor) and id(item) not in given else item
            ),
            function(*args, **kwargs),
        )


@contextmanager
def lowered_transforms(
    inputs: Sequence[torch.Tensor], seen: SeenCalls, refused: list[CaptureError]
) -> Iterator[None]:
    """Return a context in which transforms of torch.func are run as the plain ops that they make.

    inputs: of the forward, whose sizes are known within. seen: notes what the user's functions
    call, as it does in a run that is not traced, and not the plain ops. refused: gets the errors
    that are raised here, as the model may catch them.
    """

    def lowered(
        original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a transform of a function. original: by what torch runs it, with these arguments.

        Raises CaptureError where random numbers may be drawn within.
        """
        if in_function_transform():  # inside of another one
            return original(function, *args, **kwargs)
        # As torch takes arguments apart: any other object is handed on as it is.
        leaves, form = tree_flatten((args, kwargs))
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        results: list[tuple[list[Any], Any]] = []

        def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
            """Run the transform on tensors in the places of its own; return those that it makes."""
            own = list(leaves)
            for at, tensor in zip(places, tensors, strict=False):
                own[at] = tensor
            args, kwargs = tree_unflatten(own, form)
            with PlainOps(refused), seen:
                made, result = tree_flatten(original(function, *args, **kwargs))
            results.append((made, result))
            return [item for item in made if isinstance(item, torch.Tensor)]

        tensors = [*(leaves[at] for at in places), *inputs]
        program = plain_ops_of(run, tensors)
        drawing = [node for node in program.graph.nodes if _SEEDED in _tags(node)]
        if drawing:
            raise _noted(
                refused,
                f"the forward draws random numbers under a transform of torch.func, or may do so: "
                f"{drawing[0].target}",
                why="they are drawn in another order there than a graph draws them in",
                fix="draw them outside of it, and pass them to it",
            )
        made, result = results[-1]
        with seen.resting():
            computed = iter(program(*tensors))
        items = [next(computed) if isinstance(item, torch.Tensor) else item for item in made]
        return tree_unflatten(items, result)

    with replaced_transforms(lowered):
        yield


def _noted(refused: list[CaptureError], what: str, **parts: str) -> CaptureError:
    """Return an error that is added to those that were raised."""
    error = CaptureError(what, **parts)
    refused.append(error)
    return error


def _caller() -> str:
    """Return the module that asks autograd for what a mode is told of, past other modes."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(_BETWEEN):
        frame = frame.f_back
    return "" if frame is None else calling_module(frame)


def _tags(node: torch.fx.Node) -> Sequence[torch.Tag]:
    """Return the tags of the op that a node calls."""
    return getattr(node.target, "tags", ())
