"""Functions of the user's under functools.lru_cache, which a forward calls while it is traced.

What they have remembered is what they give, whatever has changed since. So they are called for
real, and keep it, as in a call of the model; the same call is a question that is asked again at
each call of the program, which is right as long as the answer is the same object.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch

from autoparallel.capture.asked_switches import is_traced, note_question
from autoparallel.capture.searched_values import is_own_code
from autoparallel.errors import CaptureError
from autoparallel.graph.attribute_read import SIMPLE, Answer
from autoparallel.support.torch_private import tree_leaves, without_function_modes, without_modes

__all__ = ["Remembering", "remembers"]


def remembers(value: Any) -> bool:
    """Return whether a value is a function of the user's own that remembers what it has returned.

    >>> remembers(len), remembers(functools.cache(len))
    (False, False)
    """
    return isinstance(value, functools._lru_cache_wrapper) and is_own_code(value.__module__ or "")


class Remembering:
    """A function in the place of one that remembers, while models are traced.

    cache: the one. misses: how many calls were computed here, for real.
    """

    def __init__(self, cache: Any) -> None:
        self.cache, self.misses = cache, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not all(isinstance(item, SIMPLE) for item in tree_leaves((args, kwargs))):
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
        note_question(self.cache.__qualname__, Answer(partial(self.cache, *args, **kwargs)))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)
