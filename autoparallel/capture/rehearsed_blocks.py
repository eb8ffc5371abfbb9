"""A run on tensors without data tells which equal blocks do more than compute, before a trace.

A trace that hides blocks finds out as it goes that one of them does, and is made again without
hiding any: see `block_folding.py`. The run takes a tenth of the time. It says what is to be
expected and proves nothing: the trace looks at each block again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from autoparallel.capture.block_calls import effects_of
from autoparallel.capture.census import census_of
from autoparallel.capture.equal_blocks import Group, find_groups, watched_class
from autoparallel.capture.traced_forward import Wanted
from autoparallel.support.pytree import flatten

__all__ = ["computing_groups"]

_log = logging.getLogger(__name__)


def computing_groups(
    wanted: Wanted, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Group, ...]:
    """Return the groups of equal blocks that only compute, as far as a run of the model tells.

    args, kwargs: of the call, as it is made.

    Example: `Folding(computing_groups(wanted, (x,), {}), frozenset())`.
    """
    groups = find_groups(wanted.model, called=True)
    if not any(map(_may_do_more, groups)):
        return groups
    rehearsal = _Rehearsal(groups)
    try:
        with rehearsal.installed():
            census_of(wanted.model, args, kwargs, wanted.part, "meta", wanted.ways)
    except Exception as error:  # the forward is anyone's code, and may fail in any way
        _log.info("blocks are rehearsed in part: %r", error)
    for reason in rehearsal.failed.values():
        _log.info("blocks are traced one by one: %s", reason)
    return tuple(group for number, group in enumerate(groups) if number not in rehearsal.failed)


def _may_do_more(group: Group) -> bool:
    """Return whether the blocks of a group are worth a run: they hold what a forward may write to,
    or numbers that tell them apart.
    """
    _, block = group.members[0]
    return bool(group.positions) or any(True for _ in block.buffers())


class _Rehearsal:
    """Notes which equal blocks do more than compute while the model runs.

    blocks: (path, block) by the id of the block's dict. failed: what they do, by the number of the
    group.
    """

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self.groups = groups
        self.blocks: dict[int, tuple[str, nn.Module]] = {}
        self.failed: dict[int, str] = {}
        self._inside = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Have blocks note, inside of this context, what they do."""
        changed: list[tuple[nn.Module, type]] = []
        try:
            for number, group in enumerate(self.groups):
                kinds: dict[Any, type] = {}  # one subclass for equal modules of a group
                for path, block in group.members:
                    self.blocks[id(vars(block))] = (path, block)
                    watched: dict[str, list[str]] = {"": []}
                    for inner, attribute in group.positions:
                        watched.setdefault(inner, []).append(attribute)
                    for inner, attributes in watched.items():
                        module = block.get_submodule(inner)
                        key = (type(module), not inner, tuple(attributes))
                        if key not in kinds:
                            kinds[key] = self._kind(number, *key)
                        changed.append((module, type(module)))
                        module.__class__ = kinds[key]
            yield
        finally:
            for module, kind in reversed(changed):
                module.__class__ = kind

    def _kind(self, group: int, base: Any, is_block: bool, counters: tuple[str, ...]) -> type:
        """Return the subclass that a module becomes an instance of.

        group: number of the block's group. base: the module's class. counters: attributes that
        number the blocks.
        """

        def notice(name: str) -> None:
            """Note where a block's forward reads such an attribute."""
            if self._inside:
                self.failed[group] = f"the forward reads {name}, which numbers the blocks"

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            """Run a block, and note what it does."""
            path, block = self.blocks[id(vars(module))]
            if self._inside:
                self.failed[group] = f"{path} is called by another block"
                return base.forward(module, *args, **kwargs)
            self._inside = True
            try:
                tensors, skeleton = flatten((args, kwargs))
                effect = effects_of(block, tensors, skeleton, (args, kwargs))
                result = base.forward(module, *args, **kwargs)
                done = effect(result)
            finally:
                self._inside = False
            if done:
                self.failed[group] = f"{path} {done}"
            return result

        return watched_class(base, counters, notice, **({"forward": forward} if is_block else {}))
