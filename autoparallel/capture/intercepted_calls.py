"""Calls that a tracer does not see as what they are: autograd Functions and checkpoints.

Models hold `torch.utils.checkpoint.checkpoint` by reference, and Functions are applied by a method
that all of them inherit. So what these two end up in is replaced while a model is traced: the
method itself, and the generator that a checkpoint looks up by name.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

__all__ = ["CallWatch", "apply_function", "unwatched"]

# What `Function.apply` is where nobody has replaced it; later releases have it written in C.
_APPLY: Any = vars(torch.autograd.Function)["apply"]
# What a checkpoint looks up: since torch 2.15 it is the first of these, and the second one is kept
# for others.
_GENERATOR = next(
    name
    for name in (
        "_checkpoint_without_reentrant_generator_impl",
        "_checkpoint_without_reentrant_generator",
    )
    if hasattr(torch_checkpoint, name)
)
_local = threading.local()
_lock = threading.Lock()
_installed = 0
_generator: Any = None


def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply a Function as torch does where nobody watches.

    Example: `apply_function(Reverse, x)` is `Reverse.apply(x)`.
    """
    return _APPLY.__get__(None, cls)(*args, **kwargs)


class CallWatch:
    """A CallWatch is told of Functions that are applied and of checkpoints, in one thread.

    Its methods do as torch does until they are overridden.

    >>> class Counter(CallWatch):
    ...     count = 0
    ...     def function(self, cls, args, kwargs):
    ...         self.count += 1
    ...         return super().function(cls, args, kwargs)
    >>> class Double(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return 2 * x
    >>> counter = Counter()
    >>> with counter.installed():
    ...     y = Double.apply(torch.ones(2))
    >>> counter.count, y
    (1, tensor([2., 2.]))
    """

    def function(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a Function. cls: its class. args, kwargs: of `apply`."""
        return apply_function(cls, *args, **kwargs)

    def reentrant(self, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Run the region of a reentrant checkpoint. call: runs it. args: what it is called with."""
        return call()

    def region(self, context: Any) -> contextlib.AbstractContextManager[Any]:
        """Return a context around the region of a checkpoint that is not reentrant.

        context: the function that makes contexts of the user's for it.
        """
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Tell this watch, and no other, of the calls that this thread makes within."""
        before = getattr(_local, "watch", None)
        _replace()
        _local.watch = self
        try:
            yield
        finally:
            _local.watch = before
            _put_back()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Have the calls that this thread makes within run as they are."""
    before, _local.watch = getattr(_local, "watch", None), None
    try:
        yield
    finally:
        _local.watch = before


def _replace() -> None:
    """Put the replacements in place, the first time: other threads may trace as well."""
    global _installed, _generator
    with _lock:
        if _installed == 0:
            _generator = getattr(torch_checkpoint, _GENERATOR)
            torch.autograd.Function.apply = classmethod(_applied)  # type: ignore[assignment]
            setattr(torch_checkpoint, _GENERATOR, _generated)
        _installed += 1


def _put_back() -> None:
    """Take the replacements away with the last trace that needs them."""
    global _installed
    with _lock:
        _installed -= 1
        if _installed == 0:
            torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]
            setattr(torch_checkpoint, _GENERATOR, _generator)


def _applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply a Function as the watch of this thread wants it."""
    watch: CallWatch | None = getattr(_local, "watch", None)
    if watch is None:
        return apply_function(cls, *args, **kwargs)
    if cls is torch_checkpoint.CheckpointFunction:
        run, _, *operands = args
        return watch.reentrant(lambda: run(*operands), tuple(operands))
    return watch.function(cls, args, kwargs)


def _generated(function: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Run what is around the region of a checkpoint as the watch of this thread wants it.

    args: whether to keep random states, the contexts, and further settings, before the region's
    own arguments. Since torch 2.15 the settings are in kwargs, and args are the region's own.
    """
    watch: CallWatch | None = getattr(_local, "watch", None)
    if watch is None:
        yield from _generator(function, *args, **kwargs)
        return
    with watch.region(kwargs["context_fn"] if "context_fn" in kwargs else args[1]):
        yield
