"""The global random generators of the user's own Python: torch's, Python's and numpy's."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch

__all__ = [
    "PythonDraw",
    "PythonNumbers",
    "python_numbers",
    "python_numbers_sums",
    "restore",
    "seeded",
    "snapshot",
]
__all__ += ["torch_generators"]


def snapshot() -> Any:
    """Return the state of all global random generators, for `restore`.

    Numpy counts only where it has been imported, and the GPU's generator only where one is in use:
    looking at either must not start it.

    >>> before = snapshot()
    >>> first = torch.rand(())
    >>> restore(before)
    >>> bool(torch.rand(()) == first)
    True
    """
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if cuda else None,
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
    )


def python_numbers() -> dict[str, Any]:
    """Return the states of Python's and numpy's global generators by name, as values that stay
    equal as long as nobody draws from them.

    Torch's generator is left out: ops that draw from it are seen in the graph.

    >>> before = python_numbers()
    >>> python_numbers() == before
    True
    """
    numpy = sys.modules.get("numpy")
    states: dict[str, Any] = {"python": random.getstate()}
    if numpy is not None:
        state = numpy.random.get_state()
        # Arrays have no single truth value, so that tuples that hold them cannot be compared.
        states["numpy"] = (
            tuple(item.tobytes() if hasattr(item, "tobytes") else item for item in state)
            if isinstance(state, tuple)
            else repr(state)
        )
    return states


@dataclass(frozen=True)
class PythonNumbers:
    """The state of Python's or numpy's global generator, to be set again.

    generator: "python" or "numpy". state: as `python_numbers` returns it.
    """

    generator: str
    state: Any

    def put(self) -> None:
        """Have the generator go on from this state.

        >>> PythonNumbers("python", python_numbers()["python"]).put()
        """
        if self.generator == "python":
            random.setstate(self.state)
            return
        numpy = sys.modules["numpy"]
        name, words, *rest = self.state
        numpy.random.set_state((name, numpy.frombuffer(words, numpy.uint32), *rest))


@dataclass(frozen=True)
class PythonDraw:
    """Numbers of [0, 1) that are drawn from Python's or numpy's global generator, and let go.

    generator: "python" or "numpy". count: how many they are.
    """

    generator: str
    count: int

    def put(self) -> None:
        """Have the generator go on behind them.

        >>> PythonDraw("python", 2).put()
        """
        source = random if self.generator == "python" else sys.modules["numpy"].random
        for _ in range(self.count):
            source.random()


def python_numbers_sums() -> tuple[int, int]:
    """Return a number for the state of Python's global generator and one for numpy's, which are the
    same in all processes that have the same states.
    """
    _, words, following = random.getstate()
    # None has another hash in each process.
    python = [hash(words), following is not None and hash(following)]
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    items = [crc32(item.tobytes()) if hasattr(item, "tobytes") else item for item in state]
    return crc32(repr(python).encode()), crc32(repr(items).encode())


def restore(state: Any, python: bool = True, numpy: bool = True) -> None:
    """Bring all global random generators to where they were. state: as `snapshot` gave it.
    python, numpy: False for one that is to stay where it is.
    """
    host, device, python_state, numpy_state = state
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)
    if python:
        random.setstate(python_state)
    if numpy and numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)


def torch_generators() -> tuple[torch.Generator, ...]:
    """Return the generators that torch draws from where it is given none: of the host, and of each
    GPU where they are in use.

    >>> torch_generators()[0] is torch.default_generator
    True
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return (torch.default_generator, *(torch.cuda.default_generators if cuda else ()))


@contextlib.contextmanager
def seeded(seed: int, python: bool = True, numpy: bool = True) -> Iterator[None]:
    """Have all global generators draw from `seed` within; afterwards they go on where they
    were. python, numpy: False for one that is left alone.

    >>> with seeded(0):
    ...     first = torch.rand(())
    >>> with seeded(0):
    ...     print(bool(torch.rand(()) == first))
    True
    """
    before = snapshot()
    try:
        torch.manual_seed(seed)
        if python:
            random.seed(seed)
        if numpy and "numpy" in sys.modules:
            # Numpy takes seeds of 32 bits, torch of 64.
            sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)
        yield
    finally:
        restore(before, python, numpy)
