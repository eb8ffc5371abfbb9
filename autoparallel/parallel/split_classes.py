"""The class of the classes of split modules, by which they stand for the user's classes."""

from __future__ import annotations

from typing import Any

__all__ = ["class_of_classes"]

_COMPLETE = "_autoparallel_complete"
_known: dict[Any, Any] = {}


def class_of_classes(kind: Any) -> Any:
    """Return the class of the classes of split modules, a child of the user's classes' own class.

    kind: the latter, `type` as a rule. The user's class is the second base of such a class. What a
    forward sets on `type(self)` is set on the user's class, where all its instances look. Both are
    equal, so that models that ask for the classes of their modules find them.

    >>> class Layer:
    ...     calls = 0
    >>> class Mixin:
    ...     pass
    >>> split = class_of_classes(type)("Layer", (Mixin, Layer), {})
    >>> split.calls += 1
    >>> Layer.calls, split == Layer
    (1, True)
    """
    if kind not in _known:
        _known[kind] = type(kind.__name__, (_SplitClass, kind), {})
    return _known[kind]


class _SplitClass(type):
    """A class whose attributes are set on its second base, from when it is complete."""

    def __init__(cls, *arguments: Any, **options: Any) -> None:
        # The user's classes may set something on each class that inherits from them.
        super().__init__(*arguments, **options)
        super().__setattr__(_COMPLETE, True)

    def __setattr__(cls, name: str, value: Any) -> None:
        user = _user_class(cls)
        if _COMPLETE in vars(cls) and user is not None:
            setattr(user, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        user = _user_class(cls)
        if user is not None:
            delattr(user, name)
        else:
            super().__delattr__(name)

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and _user_class(cls) is other)

    def __hash__(cls) -> int:
        user = _user_class(cls)
        return type.__hash__(cls) if user is None else hash(user)


def _user_class(cls: type) -> Any:
    """Return the class that a class stands for, None for a child of a class of split modules.

    Torch derives such a child for one object whose weights it computes (parametrizations), and
    sets properties on it that are for that object alone.
    """
    return None if isinstance(cls.__bases__[0], _SplitClass) else cls.__bases__[1]
