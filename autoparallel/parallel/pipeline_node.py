"""A step of a pipeline as autograd sees it: one node from the parameters to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.pipeline_call import PipelineCall
from autoparallel.rewrite.stage_programs import Travelling
from autoparallel.support.torch_private import without_function_overrides

__all__ = ["PipelineStep"]

_Gradients = list[torch.Tensor | None]


class RunOfStages(Protocol):
    """The part of `PipelineRun` that a step needs. outputs, loss: of the model, see there."""

    @property
    def outputs(self) -> tuple[Travelling, ...]:
        """The outputs of the model."""

    @property
    def loss(self) -> int | None:
        """The place of the loss among them; None where there is none."""

    def eagerly(self, call: PipelineCall) -> tuple[list[torch.Tensor], _Gradients | None]:
        """Return the outputs of a step, and the parameters' gradients of the loss."""

    def again(self, call: PipelineCall, gradients: Sequence[torch.Tensor | None]) -> _Gradients:
        """Return the parameters' gradients of a step that is run again."""

    def scaled(
        self, call: PipelineCall, held: Sequence[torch.Tensor | None], gradient: torch.Tensor
    ) -> _Gradients:
        """Return the parameters' gradients for a gradient of the loss."""


class PipelineStep(torch.autograd.Function):
    """A step of the pipeline: parameters in, outputs out."""

    @staticmethod
    def forward(
        ctx: Any,
        run: RunOfStages,
        call: PipelineCall,
        anchor: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        outputs, gradients = run.eagerly(call)
        ctx.run, ctx.call, ctx.gradients = run, call, gradients
        ctx.needed = ctx.needs_input_grad[3:]
        ctx.set_materialize_grads(False)
        plain = [
            value
            for value, each in zip(outputs, run.outputs, strict=True)
            if not each.requires_grad
        ]
        ctx.mark_non_differentiable(*plain)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            # Torch's once_differentiable would return constants here, and say nothing.
            raise AutoParallelError(
                "gradients of a model in stages are to be differentiated (create_graph=True)",
                why="its micro-batches have run, and their graphs are gone, when gradients come",
                fix="split it without stages: leave the axis pp out of the mesh",
            )
        run: RunOfStages = ctx.run
        others = [g for place, g in enumerate(gradients) if g is not None and place != run.loss]
        loss = None if run.loss is None else gradients[run.loss]
        # They are given away, as autograd frees what it has saved; a second backward pass runs the
        # step again.
        held, ctx.gradients = ctx.gradients, None
        with without_function_overrides():
            if held is None or others:
                found = run.again(ctx.call, gradients)
            elif loss is None:
                found = [None] * len(ctx.needed)
            else:
                found = run.scaled(ctx.call, held, loss)
        found = [g if wanted else None for g, wanted in zip(found, ctx.needed, strict=True)]
        return None, None, None, *found
