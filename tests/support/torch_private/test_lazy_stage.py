"""A stage of torch's has memory for what it receives only while it is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn

from autoparallel.support import torch_private
from autoparallel.support.torch_private import StorageWeakRef


class Doubled(nn.Module):
    """A stage with a weight. The last one returns the loss: of another one made of what it returns,
    torch keeps what the last stage has received.
    """

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).sum() if self.last else x * self.scale


def steps(rank: int) -> tuple[list[int], list[float]]:
    """Run a step of four micro-batches; return how many buffers are alive after each pass of this
    stage, and its gradient.
    """
    from torch.distributed.pipelining import Schedule1F1B

    buffers: list[StorageWeakRef] = []
    alive: list[int] = []

    class Noted(dist.P2POp):
        """A receive whose memory is noted."""

        def __init__(self, op: Any, tensor: torch.Tensor, *args: Any, **options: Any) -> None:
            super().__init__(op, tensor, *args, **options)
            if op is dist.irecv:
                assert tensor.device.type == "cpu"
                buffers.append(StorageWeakRef(tensor.untyped_storage()))

    class Counted(torch_private.LazyStage):
        """A stage that counts what is alive when a pass ends."""

        def backward_one_chunk(self, *args: Any, **options: Any) -> None:
            super().backward_one_chunk(*args, **options)
            alive.append(sum(not each.expired() for each in buffers))

    module, like = Doubled(rank == 1), torch.zeros(2, 3, dtype=torch.float64)
    like.requires_grad_(rank == 1)
    stage = Counted(
        module, rank, 2, torch.device("cpu"), input_args=(like,), output_args=(module(like),)
    )
    schedule = Schedule1F1B(stage, 4, loss_fn=lambda loss, _: loss, scale_grads=False)
    plain, dist.P2POp = dist.P2POp, Noted  # type: ignore[misc]
    rows = torch.arange(24.0, dtype=torch.float64).view(8, 3)
    try:
        for _ in range(2):
            module.zero_grad()
            if rank == 0:
                schedule.step(rows, return_outputs=False)
            else:
                schedule.step(target=rows, return_outputs=False)
    finally:
        dist.P2POp = plain  # type: ignore[misc]
    assert module.scale.grad is not None
    return alive, [float(module.scale.grad)]


def test_buffers_are_there_while_they_are_needed() -> None:
    """In 1F1B's order a stage holds what its pass has received, and what it is to use next."""
    measured = run_processes(steps, 2)
    whole = 2 * sum(range(24))
    for alive, gradient in measured:
        assert len(alive) == 8
        assert max(alive) <= 2
        assert gradient == [whole]
