"""Functions of the user's under functools.lru_cache, which a forward calls while it is traced.

What they have remembered is what they give, whatever has changed since. So they are called for
real, and keep it, as in a call of the model; the same call is a question that is asked again at
each call of the program, which is right as long as the answer is the same object.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch

from autoparallel.capture.asked_switches import is_traced, note_question
from autoparallel.capture.searched_values import is_own_code
from autoparallel.errors import CaptureError
from autoparallel.graph.attribute_read import SIMPLE, Answer
from autoparallel.support.pytree import SYMBOLIC
from autoparallel.support.torch_private import tree_leaves, without_function_modes, without_modes

__all__ = ["Remembering", "in_its_place", "remembering_methods", "remembers"]

# A class, the name of its method, and the function that remembers, under what else it is.
Method = tuple[type, str, Any]


def remembers(value: Any) -> bool:
    """Return whether a value is a function of the user's own that remembers what it has returned.

    >>> remembers(len), remembers(functools.cache(len))
    (False, False)
    """
    return isinstance(value, functools._lru_cache_wrapper) and is_own_code(value.__module__ or "")


def remembering_methods(kinds: Iterable[type]) -> tuple[Method, ...]:
    """Return the methods of classes that remember what they have returned.

    >>> remembering_methods([dict])
    ()
    """
    return tuple(
        (kind, name, _function(value))
        for kind in kinds
        for name, value in vars(kind).items()
        if remembers(_function(value))
    )


def _function(value: Any) -> Any:
    """Return the function in a method, whichever kind of method it is."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


@contextlib.contextmanager
def in_its_place(kind: type, name: str, other: Any) -> Iterator[None]:
    """Have another function in the place of a class's method within, as the same kind of method.

    >>> class Layer:
    ...     @property
    ...     def size(self):
    ...         return 1
    >>> with in_its_place(Layer, "size", lambda layer: 2):
    ...     Layer().size
    2
    """
    before: Any = vars(kind)[name]
    wraps = isinstance(before, (property, staticmethod, classmethod))
    setattr(kind, name, type(before)(other) if wraps else other)
    try:
        yield
    finally:
        setattr(kind, name, before)


class _Remembered(Answer):
    """The answer of a function that remembers few results, and computes those that it has forgotten
    anew: one that equals the traced result is as good.
    """

    def __init__(self, ask: Any, traced: Any) -> None:
        super().__init__(ask)
        self.traced = traced

    def __getitem__(self, name: str) -> Any:
        now = super().__getitem__(name)
        return self.traced if _alike(now, self.traced) else now


def _alike(one: Any, other: Any) -> bool:
    """Return whether two results are one object, or tensors without a gradient of equal numbers."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if type(one) is not torch.Tensor or one.requires_grad or other.requires_grad:
        return False
    looks = [(each.dtype, each.device, each.shape, each.stride()) for each in (one, other)]
    with without_function_modes(), without_modes():
        return looks[0] == looks[1] and torch.equal(one, other)


class Remembering:
    """A function in the place of one that remembers, while models are traced.

    cache: the one. misses: how many calls were computed here, for real.
    """

    def __init__(self, cache: Any) -> None:
        self.cache, self.misses = cache, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        others = [leaf for leaf in leaves if not isinstance(leaf, (*SIMPLE, type))]
        if not all(isinstance(leaf, (torch.Tensor, *SYMBOLIC)) for leaf in others):
            # In a call of the model it is another object, of which it may remember another result.
            if is_traced():
                raise CaptureError(
                    f"the forward calls {self.cache.__qualname__}, which remembers what it has "
                    "returned for an object",
                    why="that is right for later calls, whatever the object has become, and a "
                    "graph cannot ask",
                    fix="remember it by numbers and texts, or keep it in an attribute or a buffer",
                )
            return self.cache.__wrapped__(*args, **kwargs)
        if others:
            return self.cache(*args, **kwargs)  # of tensors, or of sizes that are no numbers
        before = self.cache.cache_info().misses
        with without_function_modes(), without_modes():
            drawn = torch.get_rng_state()
            result = self.cache(*args, **kwargs)
            draws = not torch.equal(torch.get_rng_state(), drawn)
        if draws:
            self.cache.cache_clear()  # it is to draw in a call of the model
            self.misses = 0
            if is_traced():
                raise CaptureError(
                    f"the forward calls {self.cache.__qualname__}, which draws random numbers",
                    why="it remembers those of its first call, and a graph draws others each time",
                    fix="draw them once, and keep them in a buffer",
                )
            return result
        self.misses += self.cache.cache_info().misses - before
        answer = _Remembered(partial(self.cache, *args, **kwargs), result)
        note_question(self.cache.__qualname__, answer)
        return result

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)
