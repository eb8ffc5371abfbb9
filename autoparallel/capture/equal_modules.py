"""Equal modules at every depth of a model: what was found out about one is known of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from autoparallel.capture.equal_blocks import (
    find_groups,
    fingerprint,
    occurrences_of,
    watched_class,
)
from autoparallel.support.module_paths import join_path

__all__ = ["EqualModules", "Watch"]


class EqualModules:
    """Knows which modules of a model are equal but for the values of their parameters.

    model: must stay as it is. first: the path of the first block of its group, by the path of each
    block whose outer blocks are first ones too. positions: the integers that count the blocks of a
    group (see Group), by the path of the first block.

    >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    >>> EqualModules(layers).canonical("2.0")
    '0.0'
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first: dict[str, str] = {}
        self.positions: dict[str, tuple[tuple[str, str], ...]] = {}
        self._collect(model, "")
        self._occurrences = occurrences_of(model)
        self._canonical: dict[str, str] = {}
        self._looks: dict[Any, str] = {}

    def _collect(self, module: nn.Module, path: str) -> None:
        """Note the groups of the module at `path`, and those inside of the first block of each."""
        for group in find_groups(module, fewest=2):
            members = [join_path(path, member) for member, _ in group.members]
            self.first.update((member, members[0]) for member in members)
            self.positions[members[0]] = group.positions
            self._collect(group.members[0][1], members[0])

    def canonical(self, path: str) -> str:
        """Return the path of the first of the modules that are equal to the one at `path`.

        Modules that are no blocks of one series are equal where they look the same, such as two
        projections of one size; the one that was asked for first is the first of them.
        """
        first = ""
        # From the outside in: "layers.2.experts.5" is "layers.0.experts.5", then "....experts.0".
        for name in path.split(".") if path else ():
            first = join_path(first, name)
            first = self.first.get(first, first)
        if first and first not in self._canonical:
            look = fingerprint(self.model.get_submodule(first), (), self._occurrences)
            # Integers that are not watched in the one would be read unseen for the other.
            key = (look, self.counters(first))
            self._canonical[first] = first if look is None else self._looks.setdefault(key, first)
        return self._canonical.get(first, first)

    def counters(self, canonical: str) -> tuple[tuple[str, str], ...]:
        """Return (path inside the module, attribute) of the integers that number equal modules.

        canonical: the path of the module, as `canonical` returns it; "" is the whole model.
        """
        counters: list[tuple[str, str]] = []
        for block, positions in self.positions.items():
            for inner, name in positions:
                place = join_path(block, inner)
                if f"{place}.".startswith(f"{canonical}.") or not canonical:
                    counters.append((place[len(canonical) :].removeprefix("."), name))
        return tuple(counters)


class Watch:
    """Tells whether a forward reads any of the attributes that number a module.

    counters: (path inside the module, attribute), see EqualModules.counters. touched: becomes true
    when one of them is read: what was found out about the module then goes for it alone.
    """

    def __init__(self, counters: tuple[tuple[str, str], ...]) -> None:
        self.counters, self.touched = counters, False

    @contextlib.contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Watch `module` inside of this context; in the end its classes are what they were."""
        names: dict[str, list[str]] = {}
        for path, name in self.counters:
            names.setdefault(path, []).append(name)
        changed: list[tuple[nn.Module, type]] = []
        try:
            for path, attributes in names.items():
                inner = module.get_submodule(path)
                changed.append((inner, type(inner)))
                inner.__class__ = watched_class(type(inner), tuple(attributes), self._notice)
            yield
        finally:
            for inner, kind in reversed(changed):
                inner.__class__ = kind

    def _notice(self, _: str) -> None:
        """Remember that an attribute was read."""
        self.touched = True
