"""The pen that writes random programs: it draws choices, and knows the values that there are."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from fuzz_programs import INPUTS, content
from torch.nn import functional as F

__all__ = ["Pen", "SkippedError", "apart_from", "distinct"]

Test = Callable[[torch.Tensor], bool]
_WORD = re.compile(r"[A-Za-z_]\w*")
SIZES = (4, 3, 6, 2, 5, 8, 7, 9, 1, 12)
MOST_ELEMENTS, LARGEST = 1500, 1e3


class SkippedError(Exception):
    """A SkippedError says that no value there fits this step."""


class Pen:
    """A Pen is a program while it is written: declarations, lines, and the values that they make.

    number: draws a whole number, from the first of two to the second, both included.
    """

    def __init__(self, number: Callable[[int, int], int]) -> None:
        self.number = number
        # What is dropped here must be the same each time that a program is drawn from one seed.
        torch.manual_seed(0)
        self.declarations: dict[str, str] = {}
        self.lines: list[tuple[str, tuple[str, ...]]] = []
        self.values: dict[str, torch.Tensor] = {}
        self.blocks: dict[str, Any] = {}

    def maybe(self) -> bool:
        return self.number(0, 1) == 1

    def one(self, options: Any) -> Any:
        """Draw one of them; the first is the simplest."""
        options = tuple(options)
        if not options:
            raise SkippedError
        return options[self.number(0, len(options) - 1)]

    def order(self, count: int) -> list[int]:
        """Draw an order of the numbers from 0 to `count`, which is excluded."""
        rest = list(range(count))
        return [rest.pop(self.number(0, len(rest) - 1)) for _ in range(count)]

    def size(self) -> int:
        return int(self.one(SIZES))

    # What is there.

    def value(self, test: Test = lambda t: True) -> str:
        """Draw a value of floating point, often the newest."""
        found = [n for n, t in self.values.items() if t.is_floating_point() and test(t)]
        return str(self.one((*found[-1:] * len(found), *reversed(found))))

    def whole(self, below: int, test: Test = lambda t: True) -> str:
        """Draw a value of whole numbers from 0 to `below`, which is excluded."""
        found = [
            name
            for name, tensor in self.values.items()
            if tensor.dtype == torch.int64
            and test(tensor)
            and 0 <= int(tensor.min()) <= int(tensor.max()) < below
        ]
        return str(self.one(reversed(found)))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def axis(self, name: str, test: Callable[[int], bool] = lambda size: True) -> int:
        """Draw a dim of the value."""
        return int(self.one(d for d, size in enumerate(self.shape(name)) if test(size)))

    def sign(self, dim: int, name: str) -> int:
        """Draw a way to write the dim: from the beginning or from the end."""
        return dim - len(self.shape(name)) if self.maybe() else dim

    def length(self, name: str, dim: int) -> str:
        """Write a size as a number, or as an expression that asks the value for it."""
        return f"{name}.size({dim})" if self.maybe() else str(self.shape(name)[dim])

    # What to write.

    def declare(self, kind: str, *sizes: int) -> str:
        """Return a tensor that is there before the program runs: an earlier one, or a new one."""
        text = f"{kind}({', '.join(map(str, sizes))})"
        if kind not in INPUTS:
            twins = [name for name, row in self.declarations.items() if row == text]
            if twins and self.maybe():
                return twins[0]
        count = sum(name[0] == kind[0] for name in self.declarations)
        name = f"{kind[0]}{count}"
        self.declarations[name] = text
        self.values[name] = content(name, kind, sizes)
        return name

    def declare_blocks(self, kind: str, make: Callable[..., Any], *sizes: int) -> str:
        """Declare equal blocks, always new ones."""
        name = f"b{sum(name[0] == 'b' for name in self.declarations)}"
        self.declarations[name] = f"{kind}({', '.join(map(str, sizes))})"
        self.blocks[name] = make(name, kind, sizes)
        return name

    def parameter(self, *sizes: int) -> str:
        return self.declare("parameter", *sizes)

    def integers(self, shape: tuple[int, ...], below: int) -> str:
        return self.declare("integers", *shape, below)

    def truths(self, shape: tuple[int, ...]) -> str:
        """Return a mask over the last dims of `shape`, or over all."""
        start = self.number(0, len(shape))
        return self.declare("truths", *shape[start:])

    def write(self, text: str, count: int = 1) -> str:
        """Write a line that makes `count` values, drop it if it goes too far; return the first."""
        names = [f"v{len(self.lines)}{'abcdefgh'[i] if count > 1 else ''}" for i in range(count)]
        line = f"{', '.join(names)} = {text}"
        before = set(self.values)
        room = {"torch": torch, "F": F, "functools": functools, **self.values, **self.blocks}
        with torch.no_grad():
            exec(line, room)
        made = {name: room[name] for name in names}
        for tensor in made.values():
            far = tensor.is_floating_point() and not bool((tensor.abs() < LARGEST).all())
            # Results in fewer digits are not the same in another order of the sums.
            far = far or (tensor.is_floating_point() and tensor.dtype != torch.float64)
            if not 0 < tensor.numel() <= MOST_ELEMENTS or far or tensor.dim() > 5:
                raise SkippedError
        assert not before & set(made)
        self.values |= made
        self.lines.append((line, tuple(names)))
        return names[0]

    def change(self, text: str, *names: str) -> None:
        """Write a line that writes in place to memory that goes by these names."""
        with torch.no_grad():
            exec(text, {"torch": torch, "F": F, **self.values})
        self.lines.append((text, names))

    def unread(self) -> list[str]:
        """Return the values of floating point that no line reads, the newest first."""
        read = {word for line, makes in self.lines for word in _WORD.findall(line.split(" = ")[-1])}
        makes = [name for _, names in self.lines for name in names]
        return [
            name
            for name in dict.fromkeys(reversed(makes))
            if name not in read and self.values[name].is_floating_point()
        ]

    def text(self, returned: str) -> str:
        """Return the program without the lines that do not matter to its result."""
        needed = set(_WORD.findall(returned))
        needed |= {name for name, row in self.declarations.items() if row.startswith("buffer")}
        kept = []
        for line, makes in reversed(self.lines):
            if needed & set(makes):
                kept.append(line)
                needed |= set(_WORD.findall(line))
        rows = [f"{name} = {row}" for name, row in self.declarations.items() if name in needed]
        return "\n".join((*rows, *reversed(kept), f"return {returned}"))


def distinct(tensor: torch.Tensor) -> bool:
    """True if no two numbers are so close that rounding could change their order."""
    flat = tensor.detach().reshape(-1).sort().values
    return bool((flat.diff() > 1e-6).all())


def apart_from(tensor: torch.Tensor, *numbers: float) -> bool:
    """True if no element is so close to one of the numbers that rounding could change its side."""
    return all(bool(((tensor - number).abs() > 1e-6).all()) for number in numbers)
