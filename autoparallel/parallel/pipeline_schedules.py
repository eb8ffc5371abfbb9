"""Torch's schedules of a rank's stages, one for inputs of each size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoparallel.options import SCHEDULES
from autoparallel.parallel.pipeline_call import PipelineCall
from autoparallel.parallel.pipeline_place import PipelinePlace
from autoparallel.parallel.stage_module import StageModule
from autoparallel.plan import Pipeline
from autoparallel.rewrite.stage_programs import StagePrograms
from autoparallel.runtime.schedule_orders import schedule_class

__all__ = ["IN_HALVES", "PipelineSchedules", "schedule_of_run"]

# Torch's classes that may compute gradients of weights later than those of a stage's inputs.
IN_HALVES = frozenset(
    name
    for schedule in ("zero_bubble", "zbv", "dualpipev")
    for name in (SCHEDULES[schedule].alone, SCHEDULES[schedule].several)
    if name
)

# Schedules for inputs of so many sizes are kept ready.
_MOST_SIZES = 16


def schedule_of_run(pipeline: Pipeline, trains: bool) -> str:
    """Return the name of torch's class that runs the steps of a pipeline.

    trains: whether backward passes follow. Where the one that was asked for takes no so few
    micro-batches, it is one that has the same stages on each rank.

    >>> few = Pipeline(4, 4, 2, "1f1b", ("a", "b", "c", "d"), (), (), 0.0)
    >>> schedule_of_run(few, trains=True)
    'ScheduleGPipe'
    """
    each = pipeline.stages // pipeline.ranks
    if trains or SCHEDULES[pipeline.schedule].folded:
        return schedule_class(pipeline.schedule, pipeline.ranks, each, pipeline.microbatches)
    plain = SCHEDULES["gpipe"]
    return plain.several if each > 1 else plain.alone


class PipelineSchedules:
    """The schedules of one rank's stages.

    pipeline, place: of the plan, and this rank's. programs, modules: of its stages.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        place: PipelinePlace,
        programs: Sequence[StagePrograms],
        modules: Sequence[StageModule],
    ) -> None:
        self.pipeline, self.place = pipeline, place
        self.programs, self.modules = programs, modules
        self.ready: dict[Any, Any] = {}

    def of(self, call: PipelineCall, trains: bool) -> Any:
        """Return torch's schedule for inputs of these sizes."""
        # What is made in inference mode cannot be written to outside of it.
        modes = (trains, torch.is_inference_mode_enabled())
        key = (tuple(tensor.shape for tensor in call.inputs), modes, call.device)
        if key not in self.ready:
            if len(self.ready) >= _MOST_SIZES:
                self.ready.clear()
            self.ready[key] = self._made(call, trains)
        return self.ready[key]

    def forget(self) -> None:
        """Forget all schedules, as after a step that was not finished."""
        self.ready.clear()

    def _made(self, call: PipelineCall, trains: bool) -> Any:
        """Return a new schedule, with stages of its own."""
        # Importing them takes a while, and most meshes have no stages.
        from torch.distributed import pipelining

        from autoparallel.parallel.pipeline_stage import Stage

        stages = [
            Stage(
                module,
                each.stage.number,
                self.pipeline.stages,
                call.device,
                input_args=tuple(one.empty(call.symbols, each.places[0]) for one in each.enters),
                output_args=module.returns(call),
                group=self.place.group,
            )
            for each, module in zip(self.programs, self.modules, strict=True)
        ]
        name = schedule_of_run(self.pipeline, trains)
        loss = _own_loss if trains else None
        single = len(stages) == 1 and name in (SCHEDULES["gpipe"].alone, SCHEDULES["1f1b"].alone)
        kind = getattr(pipelining, name)
        what = stages[0] if single else stages
        return kind(what, self.pipeline.microbatches, loss_fn=loss, scale_grads=False)


def _own_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return what the last stage returns: its module has computed the micro-batch's share."""
    return output
