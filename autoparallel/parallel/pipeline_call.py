"""One call of a pipelined model: the values that a step computes with, also when it runs again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from autoparallel.runtime import rng

__all__ = ["PipelineCall", "loss_alone", "wants_loss_alone"]


@dataclass
class PipelineCall:
    """A call's own values: it computes with these, also when its step runs again.

    inputs: of the model. device: where it computes. symbols: values of the inputs' sizes. known:
    what each stage needs of the inputs alone. source, step: of the random numbers; the step is None
    where none are drawn. began: numbers of the tensors' versions when the call began.
    """

    inputs: list[torch.Tensor]
    device: torch.device
    symbols: dict[Any, int]
    parameters: Sequence[torch.Tensor]
    buffers: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    known: list[list[torch.Tensor]] = field(default_factory=list)
    source: rng.Generator | None = None
    step: int | None = None
    began: tuple[int, ...] = ()

    def versions(self) -> tuple[int, ...]:
        """Return numbers that are others once a tensor of the call was written to."""
        tensors = (*self.parameters, *self.inputs, *self.buffers.values())
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


class _Wanted(threading.local):
    """A setting of each thread: whether its calls want the loss of a step alone, or all outputs."""

    loss_alone = False


_wanted = _Wanted()


@contextmanager
def loss_alone() -> Iterator[None]:
    """Have steps bring nothing but the loss to all ranks: other outputs are zeros where they were
    not made.
    """
    _wanted.loss_alone = True
    try:
        yield
    finally:
        _wanted.loss_alone = False


def wants_loss_alone() -> bool:
    """Return whether this thread's calls want nothing but the loss."""
    return _wanted.loss_alone
