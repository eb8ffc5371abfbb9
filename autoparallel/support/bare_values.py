"""Containers, numbers and texts past what a class of the user's says of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from autoparallel.support.made_classes import is_made_class

__all__ = ["container_kind", "plain_contents", "plain_items", "plain_value"]


def container_kind(value: Any) -> Any:
    """Return the interpreter's class that a container is of, or the class of its own inherits from.

    >>> class Closed(list):
    ...     def __len__(self):
    ...         raise TypeError
    >>> container_kind(Closed())
    <class 'list'>
    """
    kind = type(value)
    if kind in _KINDS:  # nearly all are
        return kind
    return next(base for base in kind.__mro__ if not is_made_class(base))


def plain_items(value: Any) -> list[Any]:
    """Return the items of a list, tuple, set or the like, or the pairs of a dict.

    It asks past what the class says of itself.

    >>> class Closed(list):
    ...     def __len__(self):
    ...         raise TypeError
    >>> plain_items(Closed([1, 2])), plain_items({"a": 1})
    ([1, 2], [('a', 1)])
    """
    if type(value) is dict:
        return list(value.items())
    kind = container_kind(value)
    return list(kind.items(value) if issubclass(kind, dict) else kind.__iter__(value))


def plain_contents(value: Any) -> list[Any]:
    """Return the items of a list, tuple, set or the like, or the values of a dict.

    See `plain_items`.

    >>> plain_contents((1, 2)), plain_contents({"a": 1})
    ([1, 2], [1])
    """
    items = plain_items(value)
    return [item for _, item in items] if isinstance(value, dict) else items


def plain_value(value: Any) -> Any:
    """Return the number or text that an object of a class of the user's is, as that of the
    interpreter's class; None for objects that are none.

    It asks past what the class says of itself.

    >>> class Length(float):
    ...     def __float__(self):
    ...         return 0.0
    >>> plain_value(Length(1.5)), plain_value([])
    (1.5, None)
    """
    return next((plain(value) for kind, plain in _PLAIN_VALUES if isinstance(value, kind)), None)


_KINDS = frozenset({dict, OrderedDict, list, tuple, set, frozenset})

_PLAIN_VALUES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (complex, complex.__pos__),
    (str, str.__str__),
    (bytes, lambda value: bytes.__getitem__(value, slice(None))),
)
