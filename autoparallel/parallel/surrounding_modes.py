"""Modes around a call that see what is called within: a program calls other functions."""

from __future__ import annotations

import logging

from autoparallel.support.torch_private import (
    forward_gradients_are_on,
    in_function_transform,
    users_dispatch_modes,
    users_function_modes,
)

__all__ = ["modes_of_split", "reason_for_python"]

_log = logging.getLogger(__name__)
_told: set[tuple[type, str]] = set()


def _function_modes() -> tuple[type, ...]:
    """Return the types of the user's modes that see calls of torch's functions here."""
    return tuple([type(mode) for mode in users_function_modes()])


def modes_of_split() -> tuple[type, ...]:
    """Return the modes in which a model is split here, and tell what comes of it once for each.

    Example: `modes_of_split()` is () where there are none.
    """
    modes = _function_modes()
    for mode in modes:
        _tell_once(
            mode,
            "sees calls of torch's functions: what it does stays in the programs of models that "
            "are planned within it, also when they are called outside of it",
        )
    return modes


def reason_for_python(within: tuple[type, ...] = ()) -> str:
    """Return why the user's Python must run here in place of a program; nothing if it need not.

    within: the modes in which the program was traced, which has what these do. A mode that sees
    ops is told of once: it may count what a rank computes, which is its business, or change it.

    >>> from torch.overrides import TorchFunctionMode
    >>> class Mode(TorchFunctionMode):
    ...     def __torch_function__(self, function, types, args=(), kwargs=None):
    ...         return function(*args, **(kwargs or {}))
    >>> Mode.__module__ = "of_the_user"
    >>> with Mode():
    ...     reason_for_python()
    "Mode sees calls of torch's functions"
    """
    if forward_gradients_are_on() or in_function_transform():
        return "programs have no other derivatives"
    for mode in users_dispatch_modes():
        _tell_once(
            type(mode),
            "sees the ops that this rank runs, on the parts of tensors that it holds: what it "
            "changes may differ from what it would change unsplit",
        )
    modes = _function_modes()
    if not modes or modes == within:
        return ""
    reason = "sees calls of torch's functions"
    _tell_once(modes[-1], f"{reason}: within it, models that were split run as Python")
    return f"{modes[-1].__name__} {reason}"


def _tell_once(kind: type, text: str) -> None:
    if (kind, text) not in _told:
        _told.add((kind, text))
        _log.warning("%s %s", kind.__name__, text)
