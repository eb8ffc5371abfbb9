"""Sets of layouts that a value with several readers is brought to: states of its own variable."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from autoparallel.placement import Layout
from autoparallel.strategy.equal_axes import AxisGroups, places_that_differ

__all__ = ["ReaderLayouts", "layout_sets", "offers_to_reader"]

# The most layouts of one value that may be in use at once: on a mesh of one axis, and of several,
# where they differ on one axis only. Sets of layouts are states: their number grows fast.
_MOST_TARGETS, _MOST_JOINT = 3, 2


@dataclass(frozen=True, eq=False)
class ReaderLayouts:
    """The layouts in which an op reads a value, in each of its states. Known by identity.

    layouts: per state, all layouts it reads the value in (more than one if it is several operands).
    saved_for_backward: the op's backward pass needs the value as it was read. returned_to_caller:
    the caller holds it, so that it cannot be recomputed.
    """

    layouts: tuple[tuple[Layout, ...], ...]
    saved_for_backward: bool = False
    returned_to_caller: bool = False


def layout_sets(
    readers: tuple[ReaderLayouts, ...],
    axes: int,
    memory: bool,
    groups: AxisGroups = (),
    also: frozenset[Layout] = frozenset(),
) -> tuple[tuple[tuple[Layout, ...], ...], tuple[tuple[Layout, ...], ...]]:
    """Return the sets of layouts that a value may be brought to, the smallest first.

    axes: the number of mesh axes. memory: True where saved bytes are counted. groups: of axes whose
    order is left open, none by default. also: a set that is among them, however many layouts it has
    and on however many axes they differ; it is left out where it is empty.
    Also returns, parallel to these, the subset that is saved for the backward pass: the same set
    occurs once for every subset that its readers can ask for.

    >>> from autoparallel.placement import Invariant, Shard
    >>> whole, split = (Invariant(),), (Shard(0),)
    >>> readers = ReaderLayouts(((whole,), (split,))), ReaderLayouts(((split,),))
    >>> [len(layouts) for layouts in layout_sets(readers, axes=1, memory=False)[0]]
    [1, 1, 2]
    """
    targets = tuple(
        dict.fromkeys(t for reader in readers for state in reader.layouts for t in state)
    )
    largest = max(len(state) for reader in readers for state in reader.layouts)
    most = _MOST_TARGETS if axes == 1 else _MOST_JOINT
    most = max(min(most, len(readers), len(targets)), largest)
    sets: list[tuple[Layout, ...]] = [(target,) for target in targets]
    if axes > 1 and most > 1:
        groups = groups or tuple((axis,) for axis in range(axes))
        differ = places_that_differ(targets, targets, groups) == 1
        # Of hundreds of targets few pairs differ on one axis: they are all that is looked at.
        sets += [(targets[a], targets[b]) for a, b in np.argwhere(np.triu(differ, 1))]
        place = {target: number for number, target in enumerate(targets)}
        sets += [
            group
            for count in range(3, most + 1)
            for group in combinations(targets, count)
            if differ[place[group[0]], place[group[1]]]
        ]
    elif most > 1:
        sets += [group for count in range(2, most + 1) for group in combinations(targets, count)]
    if also and all(also != frozenset(group) for group in sets):
        sets.append(tuple(target for target in targets if target in also))
    savers = sum(reader.saved_for_backward for reader in readers) if memory else 0
    layouts: list[tuple[Layout, ...]] = []
    saved: list[tuple[Layout, ...]] = []
    for group in sets:
        # Each layout of the set has a reader: those that no saver reads, one of the others
        # does, so that at least this many are saved.
        fewest = max(1, len(group) - (len(readers) - savers))
        for count in range(fewest, min(savers, len(group)) + 1):
            for some in combinations(group, count):
                layouts.append(group)
                saved.append(some)
        if not savers:
            layouts.append(group)
            saved.append(())
    return tuple(layouts), tuple(saved)


def offers_to_reader(
    groups: tuple[tuple[Layout, ...], ...],
    saved: tuple[tuple[Layout, ...], ...],
    reader: ReaderLayouts,
) -> NDArray[np.float64]:
    """Return table[group, state]: 0 if the group has all that the state reads, else +inf.

    saved: per group, the layouts that are saved; a reader that saves needs its layouts among these.
    """
    names = {layout: place for place, layout in enumerate(dict.fromkeys(chain(*groups)))}

    def members(sets: tuple[tuple[Layout, ...], ...]) -> NDArray[np.float32]:
        table = np.zeros((len(sets), len(names)), dtype=np.float32)
        for index, members in enumerate(sets):
            for layout in members:
                table[index, names[layout]] = 1
        return table

    has = members(saved if reader.saved_for_backward and any(saved) else groups)
    # Counts, for all pairs at once, the layouts that a state reads and a group lacks.
    missing = (1 - has) @ members(reader.layouts).T
    return np.where(missing > 0, np.inf, 0.0)
