"""Transforms of torch.func in a forward: a graph gets the plain ops that they make.

What `vmap` and `grad` call sees wrapped tensors, of which a tracer of the whole forward knows
nothing. So each outermost transform is first run by itself, on tensors without data, and the plain
ops that come of it are written down: batched ones of `vmap`, those of the forward and the backward
pass of `grad`. These are then called in its place, under all that the trace watches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autoparallel.capture.held_tensors import HeldTensors
from autoparallel.capture.repeated_calls import SeenCalls
from autoparallel.errors import CaptureError
from autoparallel.support.pytree import flatten, rebuild
from autoparallel.support.torch_private import (
    in_function_transform,
    plain_ops_of,
    replaced_transforms,
)

__all__ = ["lowered_transforms"]


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
            with held.in_transform(), held, seen:
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


def _tags(node: torch.fx.Node) -> Sequence[torch.Tag]:
    """Return the tags of the op that a node calls."""
    return getattr(node.target, "tags", ())
