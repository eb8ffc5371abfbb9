"""The functions of torch that a forward calls, to compare two of its runs.

A trace has a number that the forward finds out somewhere as a constant. A second run that is given
another number shows it, wherever it came from: a clock, a library, a counter, the type of a tensor.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from autoparallel.capture.library_names import torch_functions
from autoparallel.graph.attribute_read import AttributeRead, Where
from autoparallel.graph.read_holders import Version
from autoparallel.support.object_state import bytes_of
from autoparallel.support.pytree import SYMBOLIC
from autoparallel.support.replaced_functions import refuse_replaced
from autoparallel.support.torch_private import calling_module, hint_of

__all__ = ["SeenCalls"]

_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.layout, torch.memory_format)
_MOST_BYTES = 1 << 16  # of an array whose numbers are compared
# Of the ops that mark where a checkpoint begins, and the like, and of those that are Functions; of
# algorithms that torch shows as one function only of tensors that are not plain.
_OWN = ("autoparallel", "autograd_function", "_lowrank", "_lobpcg", "_linalg_utils")
# Functions that give Python the numbers in a tensor.
_NUMBERS = frozenset(
    "item tolist numpy is_nonzero equal allclose __array__ __float__ __int__ __bool__ __index__ "
    "__complex__ __contains__ __format__".split()
)
_DIGITS = 12  # a number that follows from symbolic sizes may be rounded otherwise
_ARRAYS = ("numpy", "array")
_OF_SIZES = ("sym_", "_sym_")
_MOST = 64  # items of a list that are looked at


class SeenCalls(TorchFunctionMode):
    """A mode that notes which functions of torch make tensors, with the numbers they are given.

    Of tensors, devices and other objects only the kind is noted: a run on another device is not
    another one. calls: what was noted. constants: tensors outside of the trace whose
    numbers Python was given. unknown: whether a number was given that follows from the
    values of tensors. rests: whether nothing is noted.

    >>> first, second = SeenCalls(), SeenCalls()
    >>> with first:
    ...     _ = torch.nn.LeakyReLU(0.1)(torch.ones(2))
    >>> with second:
    ...     _ = torch.nn.LeakyReLU(0.2)(torch.ones(2))
    >>> first.difference(second)
    'leaky_relu(Tensor, (inplace, False), (negative_slope, 0.1))'
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], None] = {}
        self.constants: dict[int, torch.Tensor] = {}
        self.unknown = self.rests = False

    def __torch_function__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        refuse_replaced(function)
        # What a watch of this project calls for itself is no call of the forward's, nor is what
        # tensors without numbers do in place of others: they iterate to make a list.
        caller = calling_module(sys._getframe(1))
        home = str(getattr(function, "__module__", ""))
        name = getattr(function, "__name__", "")
        ours = caller.startswith("autoparallel.") or home.rpartition(".")[2] in _OWN
        result = function(*args, **(kwargs or {}))
        if args and type(args[0]) is torch.Tensor and name in _NUMBERS:
            # It is no tensor of the trace, and others may write other numbers to it.
            self.constants[id(args[0])] = args[0]
        # What is read of a tensor, or computed of sizes, is seen where it is used; and a mode that
        # is switched, as a checkpoint does with gradients, is no computation.
        of_sizes = name == "__get__" or name.startswith(_OF_SIZES)
        watched = not (self.rests or ours or of_sizes or caller == "torch")
        # A tensor that is written to, by index, is no result.
        if watched and _is_made_of_tensors(args if result is None else result):
            items = (*args, *sorted(kwargs.items())) if kwargs else args
            self.calls[function, *map(self.noted, items)] = None
        return result

    def noted(self, item: Any) -> Any:
        """Return what is noted of an argument."""
        kind = type(item)
        if isinstance(item, torch.Tensor):
            return torch.Tensor
        if isinstance(item, SYMBOLIC):
            item = hint_of(item)
            kind = type(item)
            self.unknown = self.unknown or item is None
        if kind in _PLAIN:
            return item if kind is not bool else str(item)
        # Numbers of numpy's are numbers, some of them of Python's kinds as well.
        array = bytes_of(item) if kind.__module__.partition(".")[0] in _ARRAYS else None
        if array is not None and hasattr(item, "item") and not getattr(item, "shape", (1,)):
            item = item.item()
        elif array is not None and len(array) <= _MOST_BYTES:
            return f"{kind.__name__} {zlib.crc32(array)}"
        if isinstance(item, (float, complex)):
            return f"{item:.{_DIGITS}g}"
        if isinstance(item, int):
            return int(item)
        if kind is slice:
            return tuple(map(self.noted, (item.start, item.stop, item.step)))
        if isinstance(item, (list, tuple)):
            return tuple(map(self.noted, item[:_MOST]))
        return kind

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Note nothing within, where a Function computes: to a graph it is one op."""
        before, self.rests = self.rests, True
        try:
            yield
        finally:
            self.rests = before

    def reads(self) -> tuple[AttributeRead, ...]:
        """Return what has to stay as it is: the functions' names, and the constants' numbers."""
        versions = [
            AttributeRead("", (("cell", Version(one)),), "_version", Where.ENCLOSED, one._version)
            for one in self.constants.values()
            if not one.is_inference()
        ]
        return (*torch_functions(call[0] for call in self.calls), *versions)

    def clear(self) -> None:
        """Forget all calls, as for another attempt."""
        self.calls.clear()
        self.constants.clear()
        self.unknown = False

    def difference(self, other: SeenCalls) -> str:
        """Return a call that the other run has not had, as text; empty where there is none."""
        if self.unknown or other.unknown:
            return ""
        return next((_text(call) for call in self.calls if call not in other.calls), "")


def _is_made_of_tensors(result: Any) -> bool:
    """Return whether a function of torch has returned a tensor, alone or among others."""
    if isinstance(result, (list, tuple)):
        return any(map(_is_made_of_tensors, result[:_MOST]))
    return isinstance(result, torch.Tensor)


def _text(call: tuple[Any, ...]) -> str:
    """Return a call as text."""
    function, *items = call
    name = str(getattr(function, "__name__", function)).strip("_")
    return f"{name}({', '.join(_texts(items))})"


def _texts(items: Any) -> Iterator[str]:
    """Yield what is noted of arguments as texts."""
    for item in items:
        if isinstance(item, tuple):
            yield f"({', '.join(_texts(item))})"
        else:
            yield item.__name__ if isinstance(item, type) else str(item)
