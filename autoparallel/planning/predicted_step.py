"""The predicted step of a plan, on the hardware that it was made for or on another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autoparallel.analysis.timeline import timeline as timeline_of
from autoparallel.analysis.training_step import Timeline
from autoparallel.cost.hardware import Hardware, find_hardware, presets
from autoparallel.errors import PlanError
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.plan import Plan
from autoparallel.planning.solution_to_plan import (
    layouts_together,
    plan_of_solution,
    solution_of_plan,
)
from autoparallel.strategy.build_network import build_network
from autoparallel.support.arguments import MAKE_ONE, require_kind
from planners import Solution

__all__ = ["repriced", "timeline"]


def timeline(
    plan: Plan,
    *,
    hardware: Hardware | str | Path | None = None,
    overlap: bool | None = None,
    bucket_nbytes: int | None = None,
    as_given: bool = False,
) -> Timeline:
    """Return the predicted timeline of one step.

    hardware: to run on, also by name or file; by default that of the plan. On another one, ops and
    collectives are priced again. overlap: whether collectives run while other work is done; by
    default as the plan's options say. bucket_nbytes: where they do, gradients that are only to be
    summed are reduced in calls of at least so many bytes, as they become ready; by default as many
    as the emitted module reduces. as_given: predict for the example inputs as they were given;
    where they are small, a plan is made for a larger batch, and that is what is predicted else.
    Of a plan with stages it is a `PipelineTimeline`, pass by pass, in the order of the plan's
    schedule.
    Raises PlanError for a plan without its graph, or in parts, on other hardware and as given.

    Example: `print(timeline(plan, hardware="dgx-h100"))`
    """
    require_kind(plan, Plan, MAKE_ONE)
    if plan.pipeline is not None:
        if as_given and any(item.given != item.planned for item in plan.inputs):
            plan.refuse_stages("a step for example inputs as they were given")
        found = None if hardware is None else find_hardware(hardware)
        return timeline_of(plan, hardware=found, overlap=overlap, bucket_nbytes=bucket_nbytes)
    if hardware is not None or as_given:
        planned_for = plan.hardware if plan.hardware in presets() else plan.options.hardware
        hardware = find_hardware(planned_for if hardware is None else hardware)
        plan = repriced(plan, hardware, as_given)
    return timeline_of(plan, hardware=hardware, overlap=overlap, bucket_nbytes=bucket_nbytes)


def repriced(plan: Plan, hardware: Hardware, as_given: bool = False) -> Plan:
    """Return the same plan with the seconds that it takes on other hardware, or for its inputs as
    they were given.

    What the plan decides stays: how much better another plan is there, planning again tells. Costs
    and bounds are those of the hardware planned for no more, and are left out: they are 0.
    Raises PlanError as `timeline` does.

    Example: `repriced(plan, find_hardware("dgx-h100")).seconds`
    """
    planned_for = plan.hardware if plan.hardware in presets() else plan.options.hardware
    as_given = as_given and any(item.given != item.planned for item in plan.inputs)
    if not as_given and hardware.name == plan.hardware and find_hardware(planned_for) == hardware:
        return plan
    if plan.captured is None:
        raise PlanError(
            f"the step of this plan on {hardware.name} cannot be told",
            why=f"it was made for {plan.hardware}, and to price its ops again takes their graph, "
            + ("which a plan in parts has one by one" if plan.parts else "which no text has"),
            fix=f'plan for it: make_plan(model, ..., hardware="{hardware.name}")',
        )
    graph = with_larger_hints(plan.captured, 1 if as_given else plan.options.tokens)
    network = build_network(
        graph, plan.mesh, hardware, plan.options, whole_outputs=plan.captured.part,
        also=layouts_together(plan, graph),
    )  # fmt: skip
    states = solution_of_plan(network, plan)
    problem = network.problem(plan.product_weight)
    told = plan_of_solution(
        plan.captured,
        plan.model,
        plan.mesh,
        network,
        Solution.of(problem, states, plan.method, 0.0),
        plan.product_weight,
    )
    new = {(each.value, each.target): each for each in told.conversions}
    conversions = []
    for conversion in plan.conversions:
        seconds = new[conversion.value, conversion.target].seconds
        # Copies that are made again are a choice that the states do not tell.
        if conversion.again:
            routes = network.values[conversion.value].routes
            place = routes.cells[conversion.source]
            seconds += float(routes.forward_seconds((conversion.target,))[place, 0])
        nbytes = new[conversion.value, conversion.target].nbytes
        conversions.append(replace(conversion, seconds=seconds, nbytes=nbytes))
    added = sum(c.seconds for c in conversions) - sum(c.seconds for c in told.conversions)
    return replace(
        plan,
        hardware=hardware.name,
        ops=tuple(
            replace(
                op,
                seconds=other.seconds,
                forward_seconds=other.forward_seconds,
                flops=other.flops,
                whole_flops=other.whole_flops,
            )
            for op, other in zip(plan.ops, told.ops, strict=True)
        ),
        conversions=tuple(conversions),
        inputs=tuple(
            replace(item, planned=item.given) if as_given else item for item in plan.inputs
        ),
        seconds=told.seconds + added,
        cost=0.0,
        lower_bound=0.0,
        step_seconds=0.0,
        step_bound=0.0,
    )
