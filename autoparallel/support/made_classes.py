"""Classes that a program has made, told from the interpreter's."""

from __future__ import annotations

__all__ = ["is_made_class"]

# Py_TPFLAGS_IMMUTABLETYPE: nobody can give the class an attribute. Not whether it lies on the heap,
# where some of the interpreter's are, too: that of deques since Python 3.12.
_IMMUTABLE = 1 << 8


def is_made_class(kind: type) -> bool:
    """Return whether a program, or a library, has made a class, and not the interpreter.

    >>> import collections
    >>> [is_made_class(kind) for kind in (int, collections.deque, collections.Counter)]
    [False, False, True]
    """
    return not kind.__flags__ & _IMMUTABLE
