"""The length to which a search may go on, counted in its own steps.

A clock would end a search elsewhere in every run, and on every rank. So each step of a search says
what it takes on a machine of the present day, by how much it has to do, and the sum is what counts:
the same search ends at the same step everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["Effort", "current", "effort"]


@dataclass(slots=True)
class Effort:
    """The seconds that a search may take, and those that its steps have taken.

    most: seconds in all, by the steps' own account. can_stop: whether an interrupt (Ctrl-C) ends
    the search with the best so far, where there is one. report: called with the share of the search
    that is done, and a text. spent: seconds so far. is_stopped: whether it was interrupted.
    """

    most: float = math.inf
    can_stop: bool = True
    report: Callable[[float, str], None] | None = None
    spent: float = 0.0
    is_stopped: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the search should end as soon as it has something to return."""
        return self.is_stopped or self.spent >= self.most

    @property
    def end(self) -> str:
        """The end of the search in words, where it did not end by itself; else empty."""
        if self.is_stopped:
            return "interrupted"
        return f"ended after {self.most:g} s" if self.is_over else ""

    def spend(self, seconds: float) -> None:
        """Count a step of the search."""
        self.spent += seconds

    def stop(self) -> None:
        """End the search. To be called on KeyboardInterrupt, which is raised again where the search
        may not be stopped.
        """
        if not self.can_stop:
            raise KeyboardInterrupt
        self.is_stopped = True

    def tell(self, share: float, text: str) -> None:
        """Report what share of the search is done."""
        if self.report is not None:
            self.report(share, text)


_CURRENT: ContextVar[Effort | None] = ContextVar("effort", default=None)


def current() -> Effort:
    """Return the effort of the search that is under way; without one, there is no limit.

    >>> current().is_over
    False
    """
    return _CURRENT.get() or Effort()


@contextmanager
def effort(allowed: Effort) -> Iterator[Effort]:
    """Let the searches inside of this context take so much together.

    >>> with effort(Effort(most=2.0)) as spent:
    ...     current().spend(3.0)
    ...     spent.end
    'ended after 2 s'
    """
    token = _CURRENT.set(allowed)
    try:
        yield allowed
    finally:
        _CURRENT.reset(token)
