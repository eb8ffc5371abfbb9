"""The frames of Python that torch notes with each op that it traces."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from traceback import FrameSummary, StackSummary
from types import FrameType
from typing import Any

import torch

__all__ = ["calling_module", "keeping_frames"]

_filtering = threading.RLock()


@contextmanager
def keeping_frames(kept: Callable[[str], bool], inside: str) -> Iterator[None]:
    """Let the stack traces of traced nodes have more frames, one thread after the other.

    Torch keeps those of functions named "forward". kept: whether all frames of a file are kept, by
    its name. inside: a file; no frame is kept up to the innermost one in it.
    The other frames of this thread are not described at all. Torch describes the whole stack for
    every node, source lines and all, which took a tenth of the time of a trace (torch 2.13).
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

        proxy: Any = import_module("torch.fx.proxy")
        described = proxy.CapturedTraceback
        TracerBase._filter_traceback_frames = filtered  # type: ignore[method-assign,assignment]
        proxy.CapturedTraceback = _short_stacks(proxy, kept, inside)
        try:
            yield
        finally:
            proxy.CapturedTraceback = described
            TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]


def _short_stacks(proxy: Any, kept: Callable[[str], bool], inside: str) -> Any:
    """Return torch's class of stacks, which describes the kept frames alone in this thread.

    proxy: torch.fx.proxy. Other arguments are those of `keeping_frames`.
    """
    base: Any = proxy.CapturedTraceback
    owner = threading.get_ident()
    anchors = getattr(proxy, "_STACK_TRACE_ANCHORS", ())  # of torch 2.13 and later

    def is_kept(file: str, function: str) -> bool:
        return function == "forward" or (file, function) in anchors or kept(file)

    class ShortStacks(base):
        """The stacks of callers."""

        @staticmethod
        def extract(**options: Any) -> Any:
            """Return the stack of the caller, as far as it is kept in the thread that asked."""
            if threading.get_ident() != owner:
                return base.extract(**options)
            return _KeptFrames(sys._getframe(1), is_kept, inside)

    return ShortStacks


class _KeptFrames:
    """The frames around a frame that are kept; arguments as of `keeping_frames`."""

    def __init__(
        self, frame: FrameType | None, is_kept: Callable[[str, str], bool], inside: str
    ) -> None:
        self.frame, self.is_kept, self.inside = frame, is_kept, inside

    def summary(self) -> StackSummary:
        """Return them, the outermost first; their source lines are read when they are asked for."""
        rows = []
        frame = self.frame
        while frame is not None and frame.f_code.co_filename != self.inside:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if self.is_kept(file, function):
                rows.append(FrameSummary(file, frame.f_lineno, function, lookup_line=False))
            frame = frame.f_back
        return StackSummary.from_list(rows[::-1])


# By these a function is called for another one.
_BETWEEN = ("torch._ops", "torch.overrides")
# What tensors without numbers, and tracers, are made of: they compute for themselves. The last
# three show their insides where tensors are plain, and are one function where they are not.
_INNER = tuple(
    f"torch.{name}"
    for name in (
        *("_subclasses", "_prims", "_refs", "_decomp", "_meta_registrations", "_functorch"),
        *("_export", "_dispatch", "_library", "_higher_order_ops", "fx", "utils._python_dispatch"),
        *("_lowrank", "_lobpcg", "_linalg_utils"),
    )
)


def calling_module(frame: FrameType) -> str:
    """Return the name of the module whose code calls a function of torch.

    frame: of the caller, which may call it for another. It is "torch" where tensors without numbers
    or tracers call it in place of what real tensors do: to list their elements they iterate.

    >>> calling_module(sys._getframe()) == __name__
    True
    """
    name, back = str(frame.f_globals.get("__name__")), frame.f_back
    while name in _BETWEEN and back is not None:
        name, back = str(back.f_globals.get("__name__")), back.f_back
    # Who iterates over a tensor is seen one call further out.
    if name == "torch._tensor" and back is not None:
        outer = str(back.f_globals.get("__name__"))
        name = outer if outer.startswith(_INNER) else name
    return "torch" if name.startswith(_INNER) else name
