"""Global variables that a forward may read: found in the code of the functions that it may call.

Variables of a function around are found likewise. A read of either cannot be watched as one of an
attribute can. The search (`capture/variable_search.py`) finds a little more than is read: a program
is then made anew where it need not be, and never kept where it must not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from autoparallel.capture.variable_search import searched
from autoparallel.graph.attribute_read import AttributeRead
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.one_at_a_time import planning

__all__ = ["OuterVariables", "global_reads", "undisturbed"]


def global_reads(model: nn.Module) -> tuple[AttributeRead, ...]:
    """Return the global and enclosed variables that forwards in a model may read, as they are.

    Numbers, texts and the like count, small containers of them, and those that a module, a class or
    an object has to which a global variable refers. Functions are followed inside of the package
    that the model's class is from.

    >>> import autoparallel.capture.variable_search as here
    >>> class Limited(nn.Module):
    ...     def forward(self, x):
    ...         return x.clamp(max=here._DEEPEST)
    >>> [(read.name, read.value) for read in global_reads(Limited())]
    []
    """
    return searched(model).reads()


class OuterVariables:
    """The objects outside of a model to which its forwards may write, and functions that remember.

    model: the one whose code is searched. objects: containers and plain objects in global and
    enclosed variables, by the variables' names. caches: functions under functools.lru_cache.
    moving: iterators there, described. unwatched: by class the attributes of its instances that may
    be read past what is called when an attribute is read, as by `object.__getattribute__`.

    >>> OuterVariables(nn.Linear(2, 2)).objects
    {}
    """

    def __init__(self, model: nn.Module) -> None:
        walk = searched(model)
        walk.reads()
        self.objects, self.caches, self.moving = walk.objects, walk.caches, walk.moving
        self.unwatched = walk.unwatched

    @contextlib.contextmanager
    def forgotten(self) -> Iterator[None]:
        """Have functions forget what they have remembered within: it may be tensors of a trace."""
        before = [cache.cache_info().misses for cache in self.caches]
        try:
            yield
        finally:
            for cache, misses in zip(self.caches, before, strict=True):
                if cache.cache_info().misses != misses:
                    cache.cache_clear()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """At the end the model, and variables outside of it that its code may write to, are as before.

    Other threads that come here wait until then: they would take a variable for theirs that is
    about to be put back.

    >>> layer = nn.Linear(2, 2)
    >>> with undisturbed(layer):
    ...     layer.calls = 1
    >>> hasattr(layer, "calls")
    False
    """
    with planning.held():
        outer = OuterVariables(model)
        with untouched(model, *outer.objects.values()), outer.forgotten():
            yield
