"""Dropout over ranks: independent where activations are split, equal where they are whole."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_rules.regions import Group, group_rank

__all__ = ["ParallelDropout", "RandomStream"]


class RandomStream:
    """Random numbers of this rank alone, beside the generator that all ranks keep in step.

    Dropout of split activations draws from it: a common generator would drop the same positions of
    every part. Dropout of whole activations must not, or the copies on the ranks would differ.
    """

    def __init__(self, seed: int, group: Group = None) -> None:
        # A large prime apart, so that the streams of neighbouring seeds do not coincide.
        self.seed = seed * 1_000_003 + group_rank(group) + 1
        self.states: dict[torch.device, Tensor] = {}

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Let the device's default generator continue this stream; afterwards its own."""
        backend = torch if device.type == "cpu" else torch.get_device_module(device)
        common = backend.get_rng_state()
        if device in self.states:
            backend.set_rng_state(self.states[device])
        else:
            backend.manual_seed(self.seed)
        try:
            yield
        finally:
            self.states[device] = backend.get_rng_state()
            backend.set_rng_state(common)


class ParallelDropout(nn.Module):
    """Dropout from the rank's own stream where activations are split, else from the common one.

    probability: of dropping. stream: None for the common generator.
    """

    def __init__(self, probability: float, stream: RandomStream | None) -> None:
        super().__init__()
        self.probability, self.stream = probability, stream

    def forward(self, x: Tensor) -> Tensor:
        """Return x with elements dropped, in its shape; x itself in evaluation."""
        if not self.training or self.probability == 0.0:
            return x
        if self.stream is None:
            return F.dropout(x, self.probability)
        with self.stream.active(x.device):
            return F.dropout(x, self.probability)
