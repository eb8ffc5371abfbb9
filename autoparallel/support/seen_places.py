"""Keys of dictionaries and the objects that were seen there: one question for all, asked often.

A program of a split model is right while thousands of such objects are the same ones, and every
call asks. Loops that run in C take 50 ns for each; a function that is written for these places
takes half of that. It is written when the question comes the second time, as many are asked once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["SeenPlaces"]

_GET: Any = dict.get
_HAS: Any = dict.__contains__


class SeenPlaces:
    """Places in dictionaries, the objects that were seen there, and keys that are to be absent.

    missing: stands for what is at a key that is gone.

    >>> settings = {"scale": 1.0}
    >>> places = SeenPlaces()
    >>> places.add(settings, "scale", settings["scale"])
    >>> places.add_absent(settings, "offset")
    >>> before = places.same()
    >>> settings["offset"] = 2.0
    >>> before, places.same()
    (True, False)
    """

    def __init__(self, missing: Any = None) -> None:
        self.missing = missing
        self.holders: list[Mapping[Any, Any]] = []
        self.names: list[Any] = []
        self.seen: list[Any] = []
        self.without: list[Mapping[Any, Any]] = []
        self.absences: list[Any] = []
        self._asked = False
        self._written: Callable[[], bool] | None = None
        self._scope: dict[str, Any] = {}

    def add(self, holder: dict[Any, Any], name: Any, seen: Any) -> None:
        """Add a key, and the object that was seen there."""
        self.holders.append(holder)
        self.names.append(name)
        self.seen.append(seen)

    def add_absent(self, holder: dict[Any, Any], name: Any) -> None:
        """Add a key that is to be absent."""
        self.without.append(holder)
        self.absences.append(name)

    def now(self) -> list[Any]:
        """Return what is there now."""
        return list(map(_GET, self.holders, self.names, itertools.repeat(self.missing)))

    def see(self, index: int, value: Any) -> None:
        """Take another object for the one that was seen at a place."""
        self.seen[index] = value
        if self._written is not None:
            self._scope[f"seen_{index}"] = value

    def absent(self) -> bool:
        """Return whether all keys are absent that are to be."""
        return not any(map(_HAS, self.without, self.absences))

    def same(self) -> bool:
        """Return whether these are the objects that were seen, and all absent keys are absent."""
        if self._written is not None:
            return self._written()
        if self._asked:
            self._written = self._write()
        self._asked = True
        return self.absent() and all(map(operator.is_, self.now(), self.seen))

    def _write(self) -> Callable[[], bool]:
        """Return `same` as a function with one comparison for each place."""
        scope = self._scope
        scope.update(get=_GET, has=_HAS, missing=self.missing)
        scope.update({f"seen_{index}": value for index, value in enumerate(self.seen)})
        known: dict[int, str] = {}

        def named(kind: str, value: Any) -> str:
            """Return the name by which the function knows an object."""
            name = known.setdefault(id(value), f"{kind}_{len(known)}")
            scope[name] = value
            return name

        lines = []
        for index, (holder, key) in enumerate(zip(self.holders, self.names, strict=True)):
            at, key = named("holder", holder), repr(key) if type(key) is str else named("key", key)
            # Classes of dicts may do more when they are asked for a key that they do not have.
            value = f"{at}[{key}]" if type(holder) is dict else f"get({at}, {key}, missing)"
            lines.append(f"        if {value} is not seen_{index}: return False")
        for holder, key in zip(self.without, self.absences, strict=True):
            at, key = named("holder", holder), repr(key) if type(key) is str else named("key", key)
            absent = f"{key} in {at}" if type(holder) is dict else f"has({at}, {key})"
            lines.append(f"        if {absent}: return False")
        text = "\n".join(["def same():", "    try:", *lines, "        return True"])
        exec(
            compile(f"{text}\n    except KeyError:\n        return False", "<places>", "exec"),
            scope,
        )
        same: Callable[[], bool] = scope["same"]
        return same
