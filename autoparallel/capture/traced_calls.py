"""Autograd Functions and checkpoints while a model is traced: recorded as what they are."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from autoparallel.capture.checkpoint_regions import marked, require_plain
from autoparallel.capture.custom_functions import applied, note_inside_op
from autoparallel.capture.intercepted_calls import CallWatch
from autoparallel.capture.repeated_calls import SeenCalls
from autoparallel.errors import CaptureError
from autoparallel.support.torch_private import (
    carries_backward_hooks,
    get_proxy_mode,
    is_functorch_wrapped_tensor,
    tree_leaves,
)

__all__ = ["TracedCalls"]


class TracedCalls(CallWatch):
    """A watch that records each Function as one op, and the region of each checkpoint as itself.

    is_model_memory: whether a tensor lies in the memory of the model that is traced. failure: the
    first error raised here, remembered as the model may catch it. seen: notes what the forward
    calls, and nothing of what Functions compute.

    Example: `with TracedCalls(held.owns, seen).installed(): model(x)`, inside of torch.export.
    """

    def __init__(self, is_model_memory: Callable[[torch.Tensor], bool], seen: SeenCalls) -> None:
        self.is_model_memory, self.seen = is_model_memory, seen
        self.failure: CaptureError | None = None

    def function(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the op of a Function. Raises CaptureError where none can stand for it."""
        try:
            with self.seen.resting():
                return self.recorded(cls, args, kwargs)
        except CaptureError as error:
            self.failure = self.failure or error
            raise

    def recorded(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the op of a Function, as `function` does."""
        if carries_backward_hooks(cls):
            raise CaptureError(
                "a hook on the backward pass of every module is registered",
                why="a graph has no calls of modules, around which hooks would run",
                fix="remove it (torch.nn.modules.module.register_module_full_backward_hook)",
            )
        # An op of a library is at work, which is recorded itself; this is how it is differentiated.
        if get_proxy_mode() is None:
            note_inside_op(cls)
            return super().function(cls, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(x, torch.Tensor) and is_functorch_wrapped_tensor(x) for x in leaves):
            raise CaptureError(
                f"the autograd.Function {cls.__name__} is applied inside of a function transform",
                why="torch.func's transforms hold programs of their own",
                fix="keep it in a submodule of its own, which then stays Python",
            )
        if kwargs or cls.setup_context is not torch.autograd.Function.setup_context:
            bound = inspect.signature(cls.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        return applied(cls, args, self.is_model_memory)

    def reentrant(self, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Trace the region of a reentrant checkpoint, with gradients on."""
        tensors = [item for item in args if isinstance(item, torch.Tensor)]
        with marked(tensors, reentrant=True):
            return call()

    def region(self, context: Any) -> contextlib.AbstractContextManager[Any]:
        """Mark the region of a checkpoint. Raises CaptureError for contexts of the user's."""
        try:
            require_plain(context)
        except CaptureError as error:
            self.failure = self.failure or error
            raise
        return marked((), reentrant=False)
