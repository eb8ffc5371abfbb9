"""Hooks that are registered inside of a module after a program was traced of it are noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from autoparallel.support.torch_private import (
    call_hooks_of,
    has_global_hooks,
    hook_handles_so_far,
)

__all__ = ["InnerHooks"]


class InnerHooks:
    """The hooks of all modules in a parallel module, whose program was traced with some of them.

    A program replaces the calls of these modules, so that it runs no hook but those that were there
    when it was traced. The module's own hooks run around its program and do not count. Hooks on
    all modules of a process (torch.nn.modules.module.register_module_forward_hook) do.

    members: the module and all in it. traced: the same of the module that was traced.
    """

    def __init__(self, members: Sequence[nn.Module], traced: Sequence[nn.Module]) -> None:
        self.inner = tuple(members[1:])
        self.expected = sum(map(len, call_hooks_of(traced[1:])))
        self.dictionaries: tuple[dict[int, Any], ...] = ()
        self.handles = -1

    def changed(self) -> bool:
        """Return whether there are other hooks now than the program was traced with.

        This is asked at every call. To read four attributes of each of a hundred modules takes as
        long as several small ops, so the dictionaries that hold the hooks are remembered, and only
        their lengths are added up. A module may be given new dictionaries; what is then registered
        in them makes a handle, and torch numbers all handles of a process.
        """
        handles = hook_handles_so_far()
        if handles != self.handles:
            self.dictionaries = call_hooks_of(self.inner)
            self.handles = handles
        return sum(map(len, self.dictionaries)) != self.expected or has_global_hooks()
