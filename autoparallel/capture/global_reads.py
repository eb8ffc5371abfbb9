"""Global variables that a forward may read: found in the code of the functions that it may call.

Variables of a function around are found likewise. A read of either cannot be watched as one of an
attribute can. The search (`capture/variable_search.py`) finds a little more than is read: a program
is then made anew where it need not be, and never kept where it must not.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from autoparallel.capture.library_questions import compares_objects
from autoparallel.capture.outside_answers import asking_code
from autoparallel.capture.remembered_calls import (
    Remembering,
    in_its_place,
    remembering_methods,
    remembers,
)
from autoparallel.capture.searched_values import is_own_code, is_own_kind
from autoparallel.capture.variable_search import searched
from autoparallel.graph.attribute_read import ABSENT, SIMPLE, Answer, AttributeRead
from autoparallel.support.model_snapshot import lent, untouched
from autoparallel.support.object_state import moves_on
from autoparallel.support.one_at_a_time import planning
from autoparallel.support.paused_collection import paused_collection

__all__ = ["OuterVariables", "global_reads", "undisturbed"]


def global_reads(model: nn.Module) -> tuple[AttributeRead, ...]:
    """Return the global and enclosed variables that forwards in a model may read, as they are.

    Numbers, texts and the like count, containers of them, and those that a module, a class or an
    object has to which a global variable refers; also functions that are called by their names, or
    by none, as `__call__` of a module's class is. Functions are followed inside of the package
    that the model's class is from.

    >>> import autoparallel.capture.variable_search as here
    >>> class Limited(nn.Module):
    ...     def forward(self, x):
    ...         return x.clamp(max=here._DEEPEST)
    >>> [read.name for read in global_reads(Limited())]
    ['__call__']
    """
    return searched(model).reads()


class OuterVariables:
    """The objects outside of a model to which its forwards may write, and functions that remember.

    model: the one whose code is searched. objects: containers and plain objects in global and
    enclosed variables, by the variables' names. caches: functions under functools.lru_cache.
    moving: iterators there, described. unwatched: by class the attributes of its instances that may
    be read past what is called when an attribute is read, as by `object.__getattribute__`; "" for
    all of them.
    variables: all that have a value, each with what has it. codes, helpers, kept,
    asks_gradients: see VariableSearch. methods: those of classes that remember. found: what
    global_reads returns. imported: how many Python modules there were.

    >>> OuterVariables(nn.Linear(2, 2)).objects
    {}
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.imported = model, len(sys.modules)
        walk = searched(model)
        self.found = walk.reads()
        self.objects, self.caches, self.moving = walk.objects, walk.caches, walk.moving
        self.unwatched, self.variables = walk.unwatched, tuple(walk.variables.values())
        self.codes, self.helpers, self.kept = walk.codes, walk.helpers, walk.kept
        self.asks_gradients = walk.asks_gradients
        owners = dict.fromkeys(
            each for kind in (*walk.places, *walk.helpers) for each in kind.__mro__
        )
        self.methods = remembering_methods(filter(is_own_kind, owners))
        self.remembering: dict[int, Remembering] = {}  # by the function, what stands in its place
        # Names of code that are no variables may become some.
        self.names = [
            (variables, frozenset(code.co_names) - variables.keys())
            for code, variables in walk.codes.items()
        ]

    @classmethod
    def of(cls, model: nn.Module) -> OuterVariables:
        """Return those of a model; the search is not made again where nothing can be new.

        >>> layer = nn.Linear(2, 2)
        >>> with undisturbed(layer):
        ...     pass  # numpy imports its generators when their state is first asked for
        >>> with undisturbed(layer):
        ...     OuterVariables.of(layer) is OuterVariables.of(layer)
        True
        """
        known = _held.outer
        if known is None or known.model is not model or known.is_stale() or known.changed():
            return cls(model)
        return known

    def is_stale(self) -> bool:
        """Return whether there are Python modules that were not there when this was made."""
        return len(sys.modules) != self.imported

    def reads(self) -> tuple[AttributeRead, ...]:
        """Return what global_reads returns, which is as it was unless there are new modules."""
        if not self.is_stale():
            return self.found
        # What libraries answer is what they answered when planning began.
        before = {read.name: read for read in self.found if _is_question(read)}
        now = global_reads(self.model)
        return tuple(before.get(read.name, read) if _is_question(read) else read for read in now)

    def asking(self) -> Mapping[types.CodeType, Mapping[str, Any]]:
        """Return the user's code, if any of it may ask what no graph could; see OutsideAnswers."""
        return asking_code(self.codes, self.helpers, self.kept)

    def walks(self) -> bool:
        """Return whether forwards may go from node to node in what autograd has recorded."""
        return any("next_functions" in code.co_names for code in self.codes)

    def compares_objects(self) -> bool:
        """Return whether the user's own code may ask whether two tensors are one object."""
        return any(
            is_own_code(str(around.get("__name__"))) and compares_objects(code)
            for code, around in self.codes.items()
        )

    def changed(self) -> tuple[str, ...]:
        """Return the names of variables that have other values now, or were not there before."""
        names = [
            f"the variable {name}"
            for owner, name, value in self.variables
            if not _is_same(_value(owner, name), value)
        ]
        names += [
            f"the variable {name}"
            for variables, missing in self.names
            for name in sorted(missing & variables.keys())
        ]
        return tuple(dict.fromkeys(names))

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Have copies in the place of iterators within, whose position nobody can set back."""
        with self.others({id(v): lent(v) for _, _, v in self.variables if moves_on(v)}):
            yield

    @contextlib.contextmanager
    def others(self, others: Mapping[int, Any]) -> Iterator[None]:
        """Have others in the place of variables' values within. others: by the values' ids."""
        before = self.variables
        self.variables = tuple((owner, name, others.get(id(v), v)) for owner, name, v in before)
        try:
            for owner, name, value in before:
                if id(value) in others:
                    _put(owner, name, others[id(value)])
            yield
        finally:
            self.variables = before
            for owner, name, value in before:
                if id(value) in others:
                    _put(owner, name, value)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Set variables back, and have functions forget what they have remembered, within.

        That may be tensors of a trace. Those of the user's own are called for real meanwhile.
        """
        standing_in = {id(v): Remembering(v) for _, _, v in self.variables if remembers(v)}
        methods = [(kind, name, Remembering(cache)) for kind, name, cache in self.methods]
        self.remembering.update(standing_in)
        self.remembering.update((id(other.cache), other) for _, _, other in methods)
        before = list(map(self.computed, self.caches))
        try:
            with self.others(standing_in), contextlib.ExitStack() as within:
                for method in methods:
                    within.enter_context(in_its_place(*method))
                yield
        finally:
            for cache, misses in zip(self.caches, before, strict=True):
                if self.computed(cache) != misses:
                    cache.cache_clear()
            for owner, name, value in self.variables:
                if _value(owner, name) is value:
                    continue
                _put(owner, name, value)
            for variables, missing in self.names:
                for name in missing & variables.keys():
                    del variables[name]

    def computed(self, cache: Any) -> int:
        """Return how many calls of a function that remembers were computed in a trace."""
        real = self.remembering.get(id(cache))
        misses: int = cache.cache_info().misses
        return misses - (real.misses if real is not None else 0)


def _is_question(read: AttributeRead) -> bool:
    """Return whether a read is the answer of a library to a question in code."""
    return len(read.route) == 1 and isinstance(read.route[0][1], Answer)


class _Held(threading.local):
    """The variables outside of the model that a thread is about to plan, None of no model."""

    outer: OuterVariables | None = None


_held = _Held()


def _value(owner: Any, name: str) -> Any:
    """Return the value of a variable, ABSENT if it has none. owner: its cell, or a mapping."""
    if not isinstance(owner, types.CellType):
        return owner.get(name, ABSENT)
    try:
        return owner.cell_contents
    except ValueError:
        return ABSENT


def _put(owner: Any, name: str, value: Any) -> None:
    """Give a variable a value. owner: its cell, or a mapping."""
    if isinstance(owner, types.CellType):
        owner.cell_contents = value
    else:
        owner[name] = value


def _is_same(now: Any, before: Any) -> bool:
    """Return whether a variable has the value that it had: the object, or one of equal text.

    >>> _is_same(1, 1), _is_same(1, True)
    (True, False)
    """
    plain = isinstance(now, SIMPLE) and type(now) is type(before)
    return now is before or (plain and repr(now) == repr(before))


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """At the end the model, and variables outside of it that its code may write to, are as before.

    Other threads that come here wait until then: they would take a variable for theirs that is
    about to be put back. Python's collector rests: traces and plans are objects that stay.

    >>> layer = nn.Linear(2, 2)
    >>> with undisturbed(layer):
    ...     layer.calls = 1
    >>> hasattr(layer, "calls")
    False
    """
    with planning.held(), paused_collection():
        before, outer = _held.outer, OuterVariables(model)
        with untouched(model, *outer.objects.values()), outer.lent(), outer.restored():
            _held.outer = outer
            try:
                yield
            finally:
                _held.outer = before
