"""Equal blocks at every depth of a model, so that what was found for one is known for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from autoparallel.capture.equal_blocks import find_groups

__all__ = ["EqualModules", "Watch"]


class EqualModules:
    """Which modules of a model are equal but for the values of their parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.first: dict[str, str] = {}
        self.positions: dict[str, tuple[tuple[str, str], ...]] = {}
        self._collect(model, "")

    def _collect(self, module: nn.Module, path: str) -> None:
        """Groups of the module, and those inside of the first member of each."""
        for group in find_groups(module):
            members = [_join(path, member) for member, _ in group.members]
            self.first.update((member, members[0]) for member in members)
            self.positions[members[0]] = group.positions
            self._collect(group.members[0][1], members[0])

    def canonical(self, path: str) -> str:
        """The path of the first of the modules that are equal to the one at `path`."""
        found = ""
        for name in path.split(".") if path else ():
            found = _join(found, name)
            found = self.first.get(found, found)
        return found

    def counters(self, canonical: str) -> tuple[tuple[str, str], ...]:
        """(path inside the module, attribute) of the integers that number the equal modules."""
        found: list[tuple[str, str]] = []
        for block, positions in self.positions.items():
            for inner, name in positions:
                place = _join(block, inner)
                if f"{place}.".startswith(f"{canonical}.") or not canonical:
                    found.append((place[len(canonical) :].removeprefix("."), name))
        return tuple(found)


class Watch:
    """Tells whether any of the attributes that number a module is read. touched: whether so."""

    def __init__(self, counters: tuple[tuple[str, str], ...]) -> None:
        self.counters, self.touched = counters, False

    @contextlib.contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Watch `module`; in the end its classes are what they were."""
        names: dict[str, list[str]] = {}
        for path, name in self.counters:
            names.setdefault(path, []).append(name)
        changed: list[tuple[nn.Module, type]] = []
        try:
            for path, own in names.items():
                inner = module.get_submodule(path)
                base: Any = type(inner)
                body: dict[str, Any] = {name: self._property(name) for name in own}
                body |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
                changed.append((inner, base))
                inner.__class__ = type(base)(base.__name__, (base,), body)
            yield
        finally:
            for inner, kind in reversed(changed):
                inner.__class__ = kind

    def _property(self, name: str) -> property:
        def read(module: Any) -> Any:
            self.touched = True
            return vars(module)[name]

        return property(read, lambda module, value: vars(module).__setitem__(name, value))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
