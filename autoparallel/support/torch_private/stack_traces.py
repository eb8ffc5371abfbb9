"""Which frames of Python torch notes with each op that it traces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import StackSummary

import torch

__all__ = ["keeping_frames"]

_filtering = threading.RLock()


@contextmanager
def keeping_frames(kept: Callable[[str], bool], inside: str) -> Iterator[None]:
    """Let the stack traces of traced nodes have more frames, one thread after the other.

    Torch keeps those of functions named "forward". kept: whether all frames of a file are kept, by
    its name. inside: a file; no frame is kept up to the innermost one in it.
    """
    from torch.fx.proxy import TracerBase

    with _filtering:
        original = torch.fx.proxy.TracerBase._filter_traceback_frames

        def filtered(tracer: TracerBase, frames: StackSummary) -> StackSummary:
            places = (at + 1 for at, row in enumerate(frames) if row.filename == inside)
            begin = max(places, default=0)
            inner = StackSummary.from_list(frames[begin:])
            torchs = {id(row) for row in original(tracer, inner)}
            return StackSummary.from_list(
                [row for row in inner if id(row) in torchs or kept(row.filename)]
            )

        TracerBase._filter_traceback_frames = filtered  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]
