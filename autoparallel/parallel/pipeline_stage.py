"""Torch's stage of a pipeline, made right for backward passes in two halves.

It is imported when a step runs: torch.distributed.pipelining takes a while.
"""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.parallel.pipeline_sends import Sends
from autoparallel.parallel.stage_module import StageModule
from autoparallel.support.torch_private import LazyStage

__all__ = ["Stage"]


class Stage(LazyStage):
    """A stage whose gradients of weights may be computed later than those of its inputs.

    Torch finds what gradients of weights begin with on the way from the outputs to the inputs.
    Where no input has a gradient there is none, and torch would leave the weights without one: such
    a stage does all of its backward pass when gradients of weights are due. Where the module knows
    no halves, it does all of it at once.

    sends: those of its rank; None where torch waits for each of them soon, or sends them together
    with what it receives.
    """

    def __init__(
        self, module: StageModule, *args: Any, sends: Sends | None = None, **options: Any
    ) -> None:
        super().__init__(module, *args, **options)
        self.module, self.sends = module, sends
        self.put_off: dict[int, torch.Tensor | None] = {}

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **options: Any) -> Any:
        """Compute a micro-batch, of which the inputs have been received."""
        if self.sends is not None:
            self.sends.received(self.stage_index, True, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **options)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Return what sends a micro-batch to the next stage, if this does not send it itself."""
        return self._left_to_send(True, fwd_chunk_id, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Return what sends gradients to the stage before, if this does not send them itself."""
        return self._left_to_send(False, bwd_chunk_id, super().get_bwd_send_ops(bwd_chunk_id))

    def _left_to_send(self, forward: bool, microbatch: int, ops: list[Any]) -> list[Any]:
        """Return the sends that are torch's to begin."""
        if self.sends is None:
            return ops
        self.sends.send(self.stage_index, forward, microbatch, ops)
        return []

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: torch.Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Compute the gradients of a micro-batch, or those of what came in alone."""
        if self.sends is not None:
            self.sends.received(self.stage_index, False, bwd_chunk_id)
        full_backward = full_backward or not self.module.halves
        if self.has_backward and not (full_backward or self.is_first or self.module.has_way_back):
            self.put_off[bwd_chunk_id] = loss
            # Nothing that came in has a gradient.
            self.bwd_cache[bwd_chunk_id] = (None,) * len(self.module.programs.enters)
            return
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if bwd_chunk_id in self.bwd_cache and not full_backward:
            # Sends take no others. Of a whole backward pass, autograd lays them out so.
            gradients = self.bwd_cache[bwd_chunk_id]
            self.bwd_cache[bwd_chunk_id] = tuple(
                g if g is None else g.contiguous() for g in gradients
            )

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """Compute gradients; those of weights are in memory of their own."""
        found = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type == "full":
            came = bwd_kwargs["output_grads"]
            came = (came,) if isinstance(came, torch.Tensor) else came or ()
            self.module.separate((*came, *found[0]))
        return found

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Compute the gradients of the weights for a micro-batch, if they were not with others."""
        if not self.module.halves:
            return
        if bwd_chunk_id in self.put_off:
            loss = self.put_off.pop(bwd_chunk_id)
            super().backward_one_chunk(bwd_chunk_id, loss, True, last_backward)
            self.bwd_cache.pop(bwd_chunk_id, None)
        else:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.module.settle()

    def get_local_bwd_output(self, mb_index: int) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients for a stage of this rank; none where there is no backward pass."""
        if not self.has_backward:
            return ()
        gradients: tuple[torch.Tensor | None, ...] = super().get_local_bwd_output(mb_index)
        return gradients

    def set_local_bwd_input(
        self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int
    ) -> None:
        """Take the gradients of a stage of this rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)
