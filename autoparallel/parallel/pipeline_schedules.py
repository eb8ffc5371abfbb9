"""Torch's schedules of a rank's stages, one for inputs of each size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from autoparallel.options import SCHEDULES
from autoparallel.parallel.pipeline_call import PipelineCall
from autoparallel.parallel.pipeline_place import PipelinePlace
from autoparallel.parallel.pipeline_sends import Sends
from autoparallel.parallel.stage_module import StageModule
from autoparallel.plan import Pipeline
from autoparallel.rewrite.stage_programs import StagePrograms
from autoparallel.rewrite.stages import Stage
from autoparallel.runtime.message_orders import messages_of, sends_by_table
from autoparallel.runtime.schedule_orders import schedule_class, schedule_order

__all__ = ["IN_HALVES", "PipelineSchedules", "joins_weights_once", "schedule_of_run", "weights_met"]

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


def joins_weights_once(stage: Stage) -> bool:
    """Return whether each weight of a stage meets what came in at one op alone.

    Torch goes back from each such op to the weights by itself, and frees what it has been through:
    from the second op of a weight on there is no way any more.
    Example: `joins_weights_once(stage)` is False where one linear layer is called twice
    """
    if not any(stage.graph.values[name].requires_grad for name in stage.takes):
        return True
    ops, weights = weights_met(stage)
    met = Counter(weight for some in ops.values() for weight in some)
    # What is handed on leaves by one op with what came in.
    met.update(weight for name in stage.gives for weight in weights.get(name, ()))
    return max(met.values(), default=0) <= 1


def weights_met(stage: Stage) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
    """Return the weights that meet what came in at each op, by its name, if there are such, and
    those of which each value is made, by its name, where it is made of weights alone.

    Example: `set(weights_met(stage)[0])` are the ops from which torch goes back to weights
    """
    graph = stage.graph
    came = {name for name in stage.takes if graph.values[name].requires_grad}
    weights: dict[str, frozenset[str]] = {}
    ops: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        made = [value.name for value in node.results if value.requires_grad]
        if node.kind == "parameter":
            weights |= {name: frozenset({name}) for name in made}
        if node.kind != "call" or not made:
            continue
        read = [weights.get(name, frozenset()) for name in node.operands()]
        if came.isdisjoint(node.operands()):
            weights |= dict.fromkeys(made, frozenset().union(*read))
        else:
            came |= set(made)
            ops[node.name] = frozenset().union(*read)
    return {name: some for name, some in ops.items() if some}, weights


class ReadySchedule:
    """One of torch's schedules, with a rank's stages. sends: as of Stage."""

    def __init__(self, schedule: Any, stages: Sequence[Any], sends: Sends | None) -> None:
        self.schedule, self.stages, self.sends = schedule, stages, sends

    def step(self, **options: Any) -> None:
        """Run a step; nothing of it is kept. options: of torch's schedule."""
        self.schedule.step(**options, return_outputs=False)
        if self.sends is not None:
            self.sends.finish()
        for stage in self.stages:
            stage.clear_runtime_states()


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
        self.ready: dict[Any, ReadySchedule] = {}

    def of(self, call: PipelineCall, trains: bool) -> ReadySchedule:
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

    def _made(self, call: PipelineCall, trains: bool) -> ReadySchedule:
        """Return a new schedule, with stages of its own."""
        # Importing them takes a while, and most meshes have no stages.
        from torch.distributed import pipelining

        from autoparallel.parallel.pipeline_stage import Stage as TorchStage

        sends = self._sends() if trains else None
        stages = [
            TorchStage(
                module,
                each.stage.number,
                self.pipeline.stages,
                call.device,
                input_args=tuple(one.empty(call.symbols, each.places[0]) for one in each.enters),
                output_args=module.returns(call),
                group=self.place.group,
                sends=sends,
            )
            for each, module in zip(self.programs, self.modules, strict=True)
        ]
        name = schedule_of_run(self.pipeline, trains)
        loss = _own_loss if trains else None
        single = len(stages) == 1 and name in (SCHEDULES["gpipe"].alone, SCHEDULES["1f1b"].alone)
        kind = getattr(pipelining, name)
        what = stages[0] if single else stages
        schedule = kind(what, self.pipeline.microbatches, loss_fn=loss, scale_grads=False)
        return ReadySchedule(schedule, stages, sends)

    def _sends(self) -> Sends | None:
        """Return the sends of this rank in a step that trains; None where they are torch's."""
        pipeline = self.pipeline
        each = pipeline.stages // pipeline.ranks
        numbers = pipeline.schedule, pipeline.ranks, each, pipeline.microbatches
        if not sends_by_table(*numbers):
            return None
        rank = self.place.number
        return Sends(schedule_order(*numbers)[rank], messages_of(*numbers)[rank])


def _own_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return what the last stage returns: its module has computed the micro-batch's share."""
    return output
