"""Gradients of several backward passes, summed over the ranks once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from autoparallel.parallel.deferred import is_deferred
from autoparallel.parallel.module_state import state_of

__all__ = ["no_sync"]


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Put off the sums of gradients over the ranks until a backward pass outside of this context.

    module: one that autoparallelize() or apply_plan() returned. What torch's DDP has by this name:
    a step of several backward passes communicates its whole gradients once. Until the next backward
    pass outside, `grad` of a parameter that is whole on all ranks is a DTensor with the placement
    Partial, a sum yet to be taken, and hooks on it wait: `zero_grad` clears it, an optimizer's step
    takes the sum, clip_grad_norm_ of this package refuses it. Where a rank keeps but a part of a
    gradient, it is reduced in each pass, as that takes less memory than to wait.

    Example: `with no_sync(model): model(**first).loss.backward()`, and then the last outside.
    """
    if is_deferred(module):  # it has neither a plan nor gradients yet
        yield
        return
    bucket = state_of(module).tree.whole.bucket
    before, bucket.holds = bucket.holds, True
    try:
        yield
    finally:
        bucket.holds = before
