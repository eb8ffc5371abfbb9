"""Functions of torch in whose place a program has put others, which modes and subclasses run twice.

Torch hands a function that is called under a mode, or with a subclass of tensors, to these by its
name: `torch.nn.functional.softmax` finds what stands under that name, which calls torch's own
function, which hands on the name again. A function that doubles its result doubles it anew in each.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from autoparallel.errors import AutoParallelError

__all__ = ["HOMES", "is_of_another", "refuse_replaced", "replaced_functions"]

# Where torch's own Python, and a user's, has functions of torch from.
HOMES: tuple[types.ModuleType, ...] = (
    *(torch, nn.functional, torch.functional, torch.special, torch.fft, torch.linalg),
)
# Packages whose decorators give back functions of their own.
_DECORATORS = frozenset({"contextlib", "functools", "typing_extensions", "warnings"})


@functools.lru_cache(maxsize=4096)
def refuse_replaced(function: Any) -> None:
    """Raise AutoParallelError for a function that a program has put in the place of one of torch's.

    function: as a mode is given it.

    >>> refuse_replaced(torch.nn.functional.softmax)
    """
    for name in _names_of(function):
        module = function.__globals__.get("__name__")
        raise AutoParallelError(
            f"{name} is a function of {module} now, in the place of torch's own",
            where=f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}",
            why="torch gives the function of this name to all that watches what is called, so that "
            "it would run once more for each of them",
            fix=f"leave {name} as it is, and call the other function by its own name",
        )


def is_of_another(function: Any) -> bool:
    """Return whether something is a function in Python that neither torch nor this project wrote.

    >>> is_of_another(nn.functional.softmax), is_of_another(functools.wraps)
    (False, True)

    Torch's own function under a decorator of another package is still torch's.

    >>> import contextlib
    >>> is_of_another(contextlib.contextmanager(nn.functional.softmax))
    False
    """
    if not isinstance(function, types.FunctionType):
        return False
    # Torch itself decorates some, as those that are deprecated.
    while _home(function) in _DECORATORS and isinstance(
        decorated := getattr(function, "__wrapped__", None), types.FunctionType
    ):
        function = decorated
    return _home(function) not in ("torch", "autoparallel")


def _home(function: types.FunctionType) -> str:
    """Return the package in which a function is written: not by `__module__`, which a decorator
    takes over from what it decorates.
    """
    return str(function.__globals__.get("__name__")).partition(".")[0]


def replaced_functions() -> Iterator[types.FunctionType]:
    """Yield the functions that programs have put in places where torch's own code finds them.

    >>> from unittest.mock import patch
    >>> with patch.object(nn.functional, "linear", functools.wraps):
    ...     nn.functional.linear in replaced_functions()
    True
    """
    for owner in (*HOMES, torch.Tensor):
        for value in list(vars(owner).values()):
            if is_of_another(value):
                yield value


def _names_of(function: Any) -> Iterator[str]:
    """Yield the names of torch's by which a function that is not torch's is called."""
    if not is_of_another(function):
        return
    homes: dict[str, Any] = {home.__name__: home for home in HOMES}
    for shown, owner in (*homes.items(), ("torch.Tensor", torch.Tensor)):
        for name, value in vars(owner).items():
            if value is function:
                yield f"{shown}.{name}"
