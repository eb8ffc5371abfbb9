"""Comparisons of random numbers that come out the same whichever number is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["ConstantComparisons", "DrawnNumber"]

_Comparison = Callable[[float], bool | None]
# By comparison: the answer for every number in [0, 1), None where it depends on the number.
_DECIDED: dict[str, _Comparison] = {
    "lt": lambda bound: True if bound >= 1 else False if bound <= 0 else None,
    "le": lambda bound: True if bound >= 1 else False if bound < 0 else None,
    "gt": lambda bound: True if bound < 0 else False if bound >= 1 else None,
    "ge": lambda bound: True if bound <= 0 else False if bound >= 1 else None,
    "eq": lambda bound: False if bound < 0 or bound >= 1 else None,
    "ne": lambda bound: True if bound < 0 or bound >= 1 else None,
}


class DrawnNumber:
    """A number that Python or numpy has drawn from [0, 1), of which only the range may be used.

    refuse: is called for every other use, and raises an error.

    >>> drawn = DrawnNumber(lambda: None)
    >>> drawn < 0.0, 1.0 > drawn
    (False, True)
    """

    def __init__(self, refuse: Callable[[], Any]) -> None:
        self.refuse = refuse


def _comparison(name: str) -> Callable[[DrawnNumber, Any], Any]:
    """Return the method that compares a number as far as its range decides it."""

    def compare(self: DrawnNumber, bound: Any) -> Any:
        """Return what the comparison is for every number, or refuse it."""
        plain = isinstance(bound, (bool, int, float))
        verdict = _DECIDED[name](float(bound)) if plain else None
        return self.refuse() if verdict is None else verdict

    return compare


def _refused(self: DrawnNumber, *_: Any) -> Any:
    """Refuse a use of a number."""
    return self.refuse()


for _name in _DECIDED:
    setattr(DrawnNumber, f"__{_name}__", _comparison(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(DrawnNumber, f"__{_name}__", _refused)
    setattr(DrawnNumber, f"__r{_name}__", _refused)
for _name in (*("float", "int", "bool", "index", "neg", "abs", "round"), *("hash", "repr")):
    setattr(DrawnNumber, f"__{_name}__", _refused)


class ConstantComparisons(TorchFunctionMode):
    """A mode under which a comparison of one drawn number is a constant where its range decides it.

    `torch.rand([]) < probability` is how layers are dropped (stochastic depth, LayerDrop). A graph
    has one path for all data, but at probability 0 or 1 there is only one path. Every other use of
    the number is traced as it is, and refused by the tracer where the path depends on it.

    draws: the drawn tensors of one element, by id.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: dict[int, torch.Tensor] = {}  # kept, so that their ids stay theirs

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        if name in _DECIDED and len(args) == 2 and not kwargs and id(args[0]) in self.draws:
            verdict = None
            if isinstance(args[1], (bool, int, float)):
                verdict = _DECIDED[name](float(args[1]))
            if verdict is not None:
                # A tensor of the number's shape: [[True]] for a draw of shape (1, 1).
                content: Any = verdict
                for _ in range(self.draws[id(args[0])].dim()):
                    content = [content]
                return torch.tensor(content)
        result = function(*args, **(kwargs or {}))
        drawn = function is torch.rand or function is torch.rand_like
        if drawn and all(isinstance(size, int) and size == 1 for size in result.shape):
            self.draws[id(result)] = result
        return result
