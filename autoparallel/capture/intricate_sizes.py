"""Symbolic sizes that grow too intricate, for which dims of the inputs must be fixed instead."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.overrides import TorchFunctionMode

from autoparallel.support.torch_private import expression_of

__all__ = ["IntricateSizes", "WatchedSizes", "fails_at_sizes", "require_free_sizes"]

# Operations in the expression of one size. Each convolution adds two or three, most of which
# simplify; sizes of real models that can be followed stay far below.
_LIMIT = 24
# Where torch computes with symbolic sizes.
_ARITHMETIC = tuple(os.sep + os.path.join(*path) + os.sep for path in (("sympy",), ("_sympy",)))


class IntricateSizes(Exception):  # noqa: N818 - not an error: the trace begins again
    """A size has become too intricate; the trace begins again with more dims fixed.

    dims: (input, dim) pairs to be fixed, both counted from 0.
    """

    def __init__(self, dims: frozenset[tuple[int, int]]) -> None:
        super().__init__(f"sizes of intricate form come from the inputs' dims {sorted(dims)}")
        self.dims = dims


class WatchedSizes(TorchFunctionMode):
    """A mode under which a size with too many operations raises IntricateSizes.

    A model that pads images to whole windows, say, has sizes like 4 * ((h // 2 + (-(h // 2)) % 4)
    // 4), which grow from layer to layer until no tracer compares two of them in reasonable time.
    So does a size that is divided by a quotient of sizes, which no rule makes simpler.

    inputs: the tensors that the forward is given. places: the (input, dim) pairs whose size has a
    symbol, by symbol. seen: expressions that have been looked at.
    """

    def __init__(self, inputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.places: dict[Any, set[tuple[int, int]]] = {}
        self.seen: set[Any] = set()
        for number, tensor in enumerate(inputs):
            sizes: Any = tensor.shape
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt):
                    for symbol in expression_of(size).free_symbols:
                        self.places.setdefault(symbol, set()).add((number, dim))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            sizes: Any = result.shape
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    self.check(expression_of(size))
        return result

    def check(self, size: Any) -> None:
        """Raise IntricateSizes where a size has too many operations.

        Fixed is the symbol that occurs most often in it, with all others that occur as often: one
        fixed dim often makes the rest simple, and the trace that follows tells.
        """
        if size in self.seen:
            return
        self.seen.add(size)
        if size.count_ops() > _LIMIT or _divides_by_a_quotient(size):
            often = {s: size.count(s) for s in self.places if s in size.free_symbols}
            most = max(often.values(), default=0)
            dims = [self.places[symbol] for symbol in often if often[symbol] == most]
            if dims:
                raise IntricateSizes(frozenset().union(*dims))


def _divides_by_a_quotient(size: Any) -> bool:
    """Return whether a size is like n // (n // 2)."""
    quotients = [part for part in size.atoms(sympy.Function) if type(part).__name__ == "FloorDiv"]
    return any(part.args[1].atoms(type(part)) for part in quotients)


def fails_at_sizes(error: BaseException) -> bool:
    """Return whether a trace has failed inside of torch's arithmetic with symbolic sizes.

    It fails at some that are right, such as a remainder of fractions (`size / 2 % 1`).

    >>> fails_at_sizes(ValueError("no"))
    False
    """
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(part in frames[-1].filename for part in _ARITHMETIC)


def require_free_sizes(inputs: Sequence[torch.Tensor], fixed: frozenset[tuple[int, int]]) -> None:
    """Raise IntricateSizes for the sizes of images, sound and other numbers that may be fixed yet.

    inputs: the tensors that the forward is given. fixed: the (input, dim) pairs that are fixed. The
    batch stays free, and so does the length of a text, which differs from call to call.

    >>> require_free_sizes([torch.ones(2, 3, dtype=torch.long)], frozenset())
    """
    dims = frozenset(
        (number, dim)
        for number, tensor in enumerate(inputs)
        for dim in range(1, tensor.dim())
        if tensor.is_floating_point()
    )
    if not dims <= fixed:
        raise IntricateSizes(dims)
