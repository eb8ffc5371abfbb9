"""Random numbers that a forward draws by a seed of its own, which a graph would not follow."""

from __future__ import annotations

import threading
from typing import Any

import torch

from autoparallel.capture.decomposition_registry import Decomposition
from autoparallel.errors import CaptureError
from autoparallel.support.rng_state import torch_generators
from autoparallel.support.torch_private import OpOverload, TorchDispatchMode

__all__ = ["SeededDraws", "without_generator"]

# Nobody seeds a generator with this by chance.
_MARK = 0x6A09E667F3BCC908


class SeededDraws(TorchDispatchMode):
    """A mode of a trace under which a draw by the forward's own seed raises CaptureError.

    The numbers of a graph come from one generator for the whole model. A forward that calls
    torch.manual_seed, restores a state or passes a generator of its own wants certain numbers,
    which the graph would not have. Torch's generators have a seed of ours meanwhile: where it is
    another at a draw, the forward has set it.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []

    def __enter__(self) -> Any:
        self.generators = [(item, item.get_state()) for item in torch_generators()]
        for generator, _ in self.generators:
            generator.manual_seed(_MARK)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for generator, state in self.generators:
            generator.set_state(state)

    def finish(self) -> None:
        """Raise CaptureError where the forward, which has run, leaves another seed behind.

        What is drawn after the call would begin with that.
        """
        if any(item.initial_seed() != _MARK for item, _ in self.generators):
            raise _refused(f"seeds torch's random generator{_others()}")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(function, OpOverload) and torch.Tag.nondeterministic_seeded in function.tags:
            if kwargs.get("generator") is not None:
                raise _refused("passes a random generator of its own to an op")
            if any(item.initial_seed() != _MARK for item, _ in self.generators):
                raise _refused(f"seeds torch's random generator, and draws from it{_others()}")
        return function(*args, **kwargs)


def _others() -> str:
    """Return the doubt that there is where other threads run: the generator belongs to the process,
    and does not say who has seeded it.
    """
    return " (or another thread seeds it meanwhile)" if threading.active_count() > 1 else ""


def without_generator(decomposition: Decomposition) -> Decomposition:
    """Return a decomposition of a random op that raises CaptureError for a generator of one's own.

    >>> without_generator(torch.rand_like)(torch.zeros(2)).shape
    torch.Size([2])
    """

    def decomposed(*args: Any, generator: Any = None, **kwargs: Any) -> Any:
        """Refuse the generator; what takes its place draws from that of the whole model."""
        if generator is not None:
            raise _refused("passes a random generator of its own to an op")
        return decomposition(*args, **kwargs)

    return decomposed


def _refused(does: str) -> CaptureError:
    """Return the error for a forward that `does` what a graph cannot."""
    return CaptureError(
        f"the forward {does}",
        why="a graph draws all its numbers from one generator, and would have others",
        fix="draw them in a module without parameters, or keep them in a buffer",
    )
