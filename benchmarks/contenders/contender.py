"""One contender: a model that it has split, and a step of training as its users write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from contenders.workloads import LARGEST_NORM, LEARNING_RATE

__all__ = ["AbsentError", "Contender", "Trained"]


class AbsentError(Exception):
    """A contender does not run this workload here; the message is the reason."""


@dataclass(frozen=True)
class Trained:
    """A model ready to train.

    parameters: its own. loss: a function that runs the forward pass and returns the loss. clip: a
    function that scales gradients to a norm of at most a limit, and returns the norm.
    """

    parameters: tuple[torch.Tensor, ...]
    loss: Callable[[], Any]
    clip: Callable[[Iterable[Any], float], Any]

    def stepper(self) -> Callable[[], float]:
        """Return a function that makes one step and returns its loss."""
        optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        loss_of, clip, parameters = self.loss, self.clip, self.parameters

        def step() -> Any:
            loss = loss_of()
            loss.backward()
            clip(parameters, LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        step.optimizer = optimizer  # type: ignore[attr-defined]
        return step


@dataclass(frozen=True)
class Contender:
    """A way to train a workload. ranks: 1 or 2 processes. kinds: the workloads that it can train.

    make: a function from the workload to a model ready to train; it raises AbsentError, with the
    reason, where it cannot run here. title: for tables.
    """

    name: str
    title: str
    ranks: int
    kinds: tuple[str, ...]
    make: Callable[[Any], Trained]
