"""Hooks that are registered inside of a module after a program was traced of it are noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from autoparallel.support.torch_private import (
    call_hooks_of,
    global_call_hooks,
    hook_handles_so_far,
)

__all__ = ["InnerHooks"]


class InnerHooks:
    """The hooks of all modules in a parallel module, whose program was traced with some of them.

    A program replaces the calls of these modules, so that it runs no hook but those that were there
    when it was traced. The module's own hooks run around its program and do not count. Hooks on all
    modules of the process are none of a program's, whenever they were registered.

    members: the module and all in it. traced: the same of the module that was traced.
    """

    def __init__(self, members: Sequence[nn.Module], traced: Sequence[nn.Module]) -> None:
        self.inner = tuple(members[1:])
        self.expected = sum(map(len, call_hooks_of(traced[1:])))
        self.dictionaries: tuple[dict[int, Any], ...] = ()
        self.handles = self.count = -1
        self.are_others = False

    def changed(self) -> bool:
        """Return whether there are other hooks now than the program was traced with.

        This is asked at every call. To read four attributes of each of a hundred modules takes as
        long as several small ops, so the dictionaries that hold the hooks are remembered, and only
        their lengths are added up, where there are any hooks at all. A module may be given new
        dictionaries; what is then registered in them makes a handle, and torch numbers all handles
        of a process.
        """
        handles = hook_handles_so_far()
        count = sum(map(len, self.dictionaries)) if any(self.dictionaries) else 0
        if handles != self.handles or count != self.count:
            inner = call_hooks_of(self.inner)
            self.dictionaries = (*inner, *global_call_hooks())
            self.handles, self.count = handles, sum(map(len, self.dictionaries))
            others = any(map(_is_users, global_call_hooks()))
            self.are_others = others or sum(map(len, inner)) != self.expected
        return self.are_others


def _is_users(hooks: dict[int, Any]) -> bool:
    """Return whether there are hooks that are not torch's own, which only count or measure."""
    homes = [getattr(hook, "__module__", None) or "" for hook in hooks.values()]
    return any(home.partition(".")[0] != "torch" for home in homes)
