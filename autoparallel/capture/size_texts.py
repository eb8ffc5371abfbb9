"""Sizes that a forward writes into a text or looks up by: it goes by their numbers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from autoparallel.capture.asked_switches import asked_by_user
from autoparallel.capture.searched_values import is_own_code

__all__ = ["numbers_in_texts"]

_NUMBERS: dict[type, Callable[[Any], Any]] = {
    torch.SymInt: int,
    torch.SymFloat: float,
    torch.SymBool: bool,
}
# What Python does with a number and torch answers by a symbol, or not at all.
_METHODS: dict[str, Callable[..., Any]] = {"__repr__": repr, "__format__": format, "__hash__": hash}
_originals = {(kind, name): getattr(kind, name) for kind in _NUMBERS for name in _METHODS}
_inherited = {(kind, name) for kind, name in _originals if name not in vars(kind)}
_lock = threading.Lock()
_installed = 0


class _Within(threading.local):
    """A count, of each thread its own, of how often the thread is within `numbers_in_texts`."""

    depth = 0


_within = _Within()


@contextlib.contextmanager
def numbers_in_texts() -> Iterator[None]:
    """Have sizes be the numbers that they are where this thread's code writes them into a text.

    Torch writes the name of a symbol, such as "s95", which is another text than a call would have:
    a table that is looked up by it has nothing there. The tracer is told of the number, so that the
    program is for that size alone. So it is where a size is looked up in a dict or a set, of which
    torch says that it cannot be, as long as the user's own code asks: libraries do without their
    caches then. Torch's own texts, of its nodes and errors, stay as they are.

    Example: `with numbers_in_texts(): masks[f"{x.size(0)}"]`
    """
    global _installed
    with _lock:
        if not _installed:
            for kind, name in _originals:
                setattr(kind, name, _answering(kind, name))
        _installed += 1
    _within.depth += 1
    try:
        yield
    finally:
        _within.depth -= 1
        with _lock:
            _installed -= 1
            if not _installed:
                for (kind, name), original in _originals.items():
                    if (kind, name) in _inherited:
                        delattr(kind, name)
                    else:
                        setattr(kind, name, original)


def _answering(kind: type, name: str) -> Callable[..., Any]:
    """Return a method in place of torch's, for the code that is not torch's."""
    original, number, answer = _originals[kind, name], _NUMBERS[kind], _METHODS[name]

    def method(self: Any, *given: Any) -> Any:
        asker = asked_by_user(1) if _within.depth else ""
        # Caches of libraries would keep what they are given for a number, which is of the trace.
        if asker and (answer is not hash or is_own_code(asker)):
            return answer(number(self), *given)
        return original(self, *given)

    return method
