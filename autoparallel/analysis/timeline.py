"""One step of training as it runs: a stream that computes beside one that communicates.

The planner adds up seconds; here work that does not wait for other work overlaps with it, just as
the emitted module has it. Each stream does one thing after the other, in the order in which they
are issued. A redistribution is issued before its first reader, and waited for. Two kinds of work go
on meanwhile, unless the plan's options say `overlap=False`:

- The backward pass computes gradients of weights while gradients of activations are moved, each in
  the gap that `rewrite.gaps` has for it. A product that is summed over the ranks is summed piece by
  piece while it is computed.
- Gradients of parameters are reduced in buckets beside the rest of the backward pass.

A kernel's collectives, inside of an op, count as computing.
"""

from __future__ import annotations

from dataclasses import replace

from autoparallel.analysis.pipeline_step import timeline_of_stages
from autoparallel.analysis.step_simulation import StagePasses, StepSimulation
from autoparallel.analysis.streams import REDUCED
from autoparallel.analysis.training_step import Timeline
from autoparallel.cost.hardware import Hardware, find_hardware, presets
from autoparallel.plan import Plan
from autoparallel.runtime.joint_moves import bucket_nbytes as module_bucket
from autoparallel.support.arguments import MAKE_ONE, require_kind

__all__ = ["passes_of_stage", "step_and_waits", "timeline"]


def timeline(
    plan: Plan,
    *,
    hardware: Hardware | str | None = None,
    overlap: bool | None = None,
    bucket_nbytes: int | None = None,
) -> Timeline:
    """Return the predicted timeline of one step, with ops that take as long as the plan says.

    hardware: to communicate on, also by name or file; by default that of the plan. overlap: whether
    collectives run while other work is done; by default as the plan's options say. bucket_nbytes:
    where they do, gradients that are only to be summed are reduced in calls of at least so many
    bytes, as they become ready; by default as many as the emitted module reduces. Of a plan with
    stages it is a `PipelineTimeline`.

    Example: `print(timeline(plan, overlap=False))`
    """
    require_kind(plan, Plan, MAKE_ONE)
    if plan.pipeline is not None:
        return timeline_of_stages(plan, hardware, overlap, bucket_nbytes)
    if hardware is None:
        # A plan knows its hardware by name, and that of a file by the file.
        is_preset = plan.hardware in presets()
        hardware = plan.hardware if is_preset else plan.options.hardware
    if overlap is not None and overlap != plan.options.overlap:
        plan = replace(plan, options=replace(plan.options, overlap=overlap))
    return _simulation(plan, find_hardware(hardware), bucket_nbytes).run()


def step_and_waits(
    plan: Plan, hardware: Hardware, once: float = 1.0
) -> tuple[float, dict[str, float]]:
    """Return the predicted seconds of one step, and those in which nothing is computed, by what is
    waited for (PIECES, MOVED, REDUCED, or "" for anything else).

    once: the share that this step bears of what is done once for several of them, as micro-batches
    of a pipeline share the reduction of gradients, which begins when all have gone back.

    Example: `step_and_waits(plan, find_hardware("dgx-a100"))[0]`
    """
    if once != 1.0:
        simulation = StepSimulation(plan, hardware, None)
        passes = simulation.passes()
        # The rows of such a plan bear their share already.
        shared = once * (passes.reduction + passes.gathers) + simulation.optimizer(once)
        waited = simulation.streams.waited
        waited[REDUCED] = waited.get(REDUCED, 0.0) + once * passes.reduction
        return passes.forward + passes.backward + shared, waited
    simulation = _simulation(plan, hardware)
    _, _, seconds = simulation.simulate()
    return seconds, simulation.streams.waited


def passes_of_stage(plan: Plan, hardware: Hardware) -> StagePasses:
    """Return what a micro-batch takes on a stage. plan: of the stage, as `cut_plan` gives it.

    Example: `passes_of_stage(cut_plan(graph, plan)[0].plan, find_hardware("dgx-a100")).forward`
    """
    return StepSimulation(plan, hardware, None).passes()


def _simulation(plan: Plan, hardware: Hardware, bucket_nbytes: int | None = None) -> StepSimulation:
    """Return the simulation of a step. bucket_nbytes: as of `timeline`."""
    if bucket_nbytes is None:
        bucket_nbytes = module_bucket(sum(parameter.nbytes for parameter in plan.parameters))
    return StepSimulation(plan, hardware, bucket_nbytes if plan.options.overlap else None)
