"""Calls of ops on real tensors, whose independent sizes differ and whose values are not zero."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from autoparallel.discovery.example_calls import Example, make_example

_SEED = count()


@dataclass
class Call:
    """A Call is target(*args, **kwargs). symbolic: sizes that the program takes from its inputs."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    symbolic: dict[int, str] = field(default_factory=dict)

    def example(self) -> Example:
        return make_example(self.target, self.args, self.kwargs, self.symbolic)

    def __str__(self) -> str:
        def word(item):
            if isinstance(item, torch.Tensor):
                return "x".join(map(str, item.shape)) or "scalar"
            if isinstance(item, tuple):
                return "(" + ",".join(map(word, item)) + ")"
            return str(item)

        words = [word(arg) for arg in self.args]
        words += [f"{key}={word(value)}" for key, value in self.kwargs.items()]
        words += ["symbolic"] if self.symbolic else []
        return f"{self.target}({','.join(words)})"


def x(*shape: int, low: float = 0.2, high: float = 0.9, signs: bool = True) -> torch.Tensor:
    """Return trainable numbers of magnitude low to high, of both signs unless told otherwise."""
    generator = torch.Generator().manual_seed(next(_SEED))
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    if signs:
        numbers *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return numbers.requires_grad_()


def fixed(*shape: int) -> torch.Tensor:
    """Return numbers that take no gradient."""
    return x(*shape).detach()


def x_for(function: Callable[..., Any], *shape: int) -> torch.Tensor:
    """Return trainable numbers, or fixed ones where this torch cannot differentiate it."""
    made = function(torch.ones(2, requires_grad=True))
    results = [made] if isinstance(made, torch.Tensor) else list(made)
    try:
        torch.autograd.backward([result.sum() for result in results])
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        return fixed(*shape)
    return x(*shape)


def ints(*shape: int, low: int = 1, high: int = 9) -> torch.Tensor:
    """Return whole numbers low <= n < high."""
    generator = torch.Generator().manual_seed(next(_SEED))
    return torch.randint(low, high, shape, generator=generator)


def truth(*shape: int) -> torch.Tensor:
    """Return truth values."""
    return ints(*shape) % 2 == 0


def call(target: str, *args: Any, symbolic: dict[int, str] | None = None, **kwargs: Any) -> Call:
    return Call(f"aten.{target}", args, kwargs, symbolic or {})
