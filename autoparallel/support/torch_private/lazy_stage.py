"""Torch's stage of a pipeline, which has memory for what it receives only while it is needed.

It is imported when a step runs: torch.distributed.pipelining takes a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.stage import _RecvInfo

__all__ = ["LazyStage"]

# Up to torch 2.14, a stage makes buffers for all micro-batches before the first one comes.
_MAKES_BUFFERS = not hasattr(_RecvInfo, "allocate_buffer")
# Torch 2.11 does not know whether an input has a gradient: the stage before waits for all of them.
_SENDS_ALL = not hasattr(PipelineStage, "_get_grad_send_meta")


class LazyStage(PipelineStage):
    """A stage that has a buffer for a micro-batch from when it is asked for until it is used.

    What says of which size and type a buffer is to be is a tensor on the meta device.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        """Return what connects this rank with those of the stages beside: a rank sends nothing to
        itself. Up to torch 2.12 it would, where two stages in a row are on one rank (zero bubble in
        the shape of a V), and gloo refuses that.
        """
        ops: list[Any] = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.group_peer != self.group_rank]

    def _prepare_forward_infra(self, *args: Any, **options: Any) -> Any:
        """Prepare what is received of the stage before."""
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **options)

    def _prepare_backward_infra(self, *args: Any, **options: Any) -> Any:
        """Prepare the gradients that are received of the stage after."""
        with self._without_memory():
            return super()._prepare_backward_infra(*args, **options)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """Have buffers made on the meta device."""
        device = self.device
        self.device = torch.device("meta") if _MAKES_BUFFERS else device
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Return what receives a micro-batch."""
        self._fill(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Return what receives the gradients of a micro-batch."""
        self._fill(self.grad_recv_info.get(bwd_chunk_id, ()))
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_bwd_input(
        self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int
    ) -> None:
        """Take the gradients of a stage of this rank, or zeros for what has none."""
        # Torch 2.11 has no entry for a gradient that is none.
        pairs = zip(self.grad_recv_info[mb_index], next_stage_bwd_outputs, strict=False)
        self._fill(info for info, gradient in pairs if gradient is None)
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        """Compute a micro-batch: what was received is kept until its backward pass, if there is
        one.
        """
        result = super().forward_one_chunk(fwd_chunk_id, *args, **options)
        _empty(self.args_recv_info[fwd_chunk_id])
        if _MAKES_BUFFERS and not self.has_backward:
            self.fwd_cache[fwd_chunk_id] = (self.fwd_cache[fwd_chunk_id][0], [])
        return result

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Return what sends a micro-batch to the next stage."""
        ops: list[Any] = super().get_fwd_send_ops(fwd_chunk_id)
        if _MAKES_BUFFERS and not self.has_backward:
            del self.fwd_cache[fwd_chunk_id]
        return ops

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> None:
        """Compute the gradients of a micro-batch."""
        super().backward_one_chunk(bwd_chunk_id, *args, **options)
        _empty(self.grad_recv_info.get(bwd_chunk_id, ()))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Return what sends the gradients of a micro-batch to the stage before: zeros for what no
        gradient came to, where that stage waits for it.
        """
        if _SENDS_ALL and bwd_chunk_id in self.bwd_cache:
            pairs = zip(
                self.bwd_cache[bwd_chunk_id], self.args_recv_info[bwd_chunk_id], strict=False
            )
            self.bwd_cache[bwd_chunk_id] = tuple(
                torch.zeros_like(info.buffer, device=self.device, requires_grad=False)
                if gradient is None and isinstance(info, _RecvInfo) and info.buffer is not None
                else gradient
                for gradient, info in pairs
            )
        ops: list[Any] = super().get_bwd_send_ops(bwd_chunk_id)
        return ops

    def _fill(self, infos: Iterable[Any]) -> None:
        """Make buffers, where torch has made none."""
        _remake(infos, self.device)


def _empty(infos: Iterable[Any]) -> None:
    """Forget buffers, but for their sizes and types."""
    _remake(infos, torch.device("meta"))


def _remake(infos: Iterable[Any], device: torch.device) -> None:
    """Put buffers of the same sizes and types on a device in the place of those that are there."""
    for info in infos if _MAKES_BUFFERS else ():
        like = getattr(info, "buffer", None)
        if like is not None:
            info.buffer = torch.empty_strided(
                like.size(),
                like.stride(),
                dtype=like.dtype,
                device=device,
                requires_grad=like.requires_grad,
            )
