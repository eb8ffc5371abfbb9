"""A module's parameters as the user's own Python reads them, while it runs on a split model."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

__all__ = ["ShownParameters", "held_by"]


class _Reader(Protocol):
    """Gives the whole values of parameters; WholeParameters is one."""

    def read(self, held: dict[str, Any], name: str) -> Any:
        """Return the whole value of the parameter that a dictionary holds."""

    def refuse_other(self, held: dict[str, Any], name: str) -> None:
        """Raise AutoParallelError where a parameter that may be split would become another."""


class ShownParameters(dict[str, Any]):
    """A module's dictionary of parameters as its forward reads it: whole, plain tensors.

    It stands in place of `module._parameters` while the user's Python runs. held: the dictionary
    that it stands for, with the parameters as the optimizer sees them. whole: it reads them.
    """

    def __init__(self, held: dict[str, Any], whole: _Reader) -> None:
        super().__init__(held)
        self.held, self.whole = held, whole

    # dict's own methods read what they hold without calling __getitem__, which must not be seen:
    # all that give values are overridden.

    def __getitem__(self, name: str) -> Any:
        return self.whole.read(self.held, name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.whole.refuse_other(self.held, name)
        self.held[name] = value
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.whole.refuse_other(self.held, name)
        del self.held[name]
        super().__delitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the whole value of a parameter, the default where there is none of that name."""
        return self.whole.read(self.held, name) if name in self.held else default

    def items(self) -> Any:
        """Return names and whole values, as a list, because reading them gathers."""
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        """Return whole values, as a list."""
        return [self[name] for name in self]


def held_by(module: nn.Module) -> dict[str, Any]:
    """Return the module's dictionary of parameters as an optimizer sees them, never as shown."""
    parameters: Any = module._parameters
    return parameters.held if isinstance(parameters, ShownParameters) else parameters
