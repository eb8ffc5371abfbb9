"""The random numbers that the user's own Python draws: torch's, Python's and numpy's."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["python_numbers", "restore", "seeded", "snapshot"]


def snapshot() -> Any:
    """The state of all global generators."""
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if cuda else None,
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
    )


def python_numbers() -> Any:
    """Equal as long as nobody draws from Python's or numpy's global generators."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    return (
        random.getstate(),
        [item.tobytes() if hasattr(item, "tobytes") else item for item in state],
    )


def restore(state: Any) -> None:
    """Bring all global generators to where they were."""
    host, device, python, numpy_state = state
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)
    random.setstate(python)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All global generators draw from `seed`, and then go on where they were."""
    before = snapshot()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)
        yield
    finally:
        restore(before)
