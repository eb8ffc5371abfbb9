"""A plan with stages that comes from elsewhere is checked before it runs."""

from __future__ import annotations

from itertools import pairwise

from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import MICROBATCH
from autoparallel.plan import Plan
from autoparallel.planning.solution_to_plan import layouts_together, solution_of_plan
from autoparallel.rewrite.stages import stages_of_calls
from autoparallel.strategy.build_network import build_network

__all__ = ["require_sound_stages"]


def require_sound_stages(plan: Plan, captured: Captured) -> None:
    """Raise PlanError unless a plan with stages is one that the planner could have made.

    captured: its graph, to which the plan's ops and conversions are known to belong. All placements
    must be states of the model's cost network, conversions must cross no micro-batches, and the
    stages must start one behind the other.
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    if dict(plan.mesh.axes).get(MICROBATCH) != pipeline.microbatches:
        raise _wrong("its mesh has another number of micro-batches than its stages")
    graph = with_larger_hints(captured, plan.options.tokens)
    hardware = find_hardware(plan.options.hardware)
    network = build_network(
        graph, plan.mesh, hardware, plan.options, None, captured.part,
        also=layouts_together(plan, graph),
    )  # fmt: skip
    solution_of_plan(network, plan)
    for row in plan.conversions:
        for step in row.steps:
            back = (step.backward,) if graph.values[row.value].requires_grad else ()
            crosses = any(move.collective is not None for move in (step.forward, *back))
            weight = graph.producers[row.value].kind == "parameter"
            if step.axis == 0 and pipeline.microbatches > 1 and (crosses or weight):
                raise _wrong(f"{row.value} would be exchanged by micro-batches")
    inert = inert_calls(captured.graph)
    names = [node.name for node in captured.graph.calls if node.name not in inert]
    places = {name: number for number, name in enumerate(names)}
    starts = [places.get(name, -1) for name in pipeline.starts]
    rising = all(one < other for one, other in pairwise(starts))
    shared = pipeline.ranks > 1 and pipeline.stages == pipeline.ranks * plan.options.each_rank
    if not shared or len(starts) != pipeline.stages or starts[:1] != [0] or not rising:
        raise _wrong("its stages do not start one behind the other")
    stages = stages_of_calls(captured.graph, pipeline.starts)
    for group in plan.recomputed:
        if len({stages[name] for name in group if name in stages}) > 1:
            raise _wrong("a stage starts among ops that are recomputed together")


def _wrong(why: str) -> PlanError:
    """Return the error for a plan that is not as the planner makes it."""
    return PlanError(
        "the plan cannot be followed",
        why=why,
        fix="plan again, or give the whole text that plan.to_json() wrote",
    )
