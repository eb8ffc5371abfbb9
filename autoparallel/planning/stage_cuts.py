"""Cuts of a planned model into stages, and the seconds and bytes that each stage then takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoparallel.analysis.memory_account import Account
from autoparallel.analysis.pipeline import send_seconds
from autoparallel.analysis.pipeline_step import link_of_stages, passes_of, step_of
from autoparallel.analysis.pipeline_walk import most_held
from autoparallel.analysis.stage_memory import memory_of_pipeline
from autoparallel.analysis.stage_paces import at_own_paces, busy_of
from autoparallel.analysis.timeline import StagePasses, passes_of_stage
from autoparallel.cost.hardware import Hardware, find_hardware
from autoparallel.cost.op_costs import nbytes
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import MICROBATCH
from autoparallel.parallel.pipeline_schedules import joins_weights_once
from autoparallel.plan import Pipeline, Plan
from autoparallel.planning.quickest_stages import StageTimes, quickest_starts
from autoparallel.planning.schedule_figures import figures_of
from autoparallel.planning.stage_work import StageWork, cut_within, fewer_places
from autoparallel.rewrite.stages import Stage, cut_plan
from autoparallel.runtime.schedule_orders import schedule_order
from autoparallel.strategy.stage_shares import StageShares
from planners import InfeasibleError

__all__ = ["cut_into_stages", "with_accounts", "with_memory"]


def cut_into_stages(
    graph: Graph,
    plan: Plan,
    shares: StageShares,
    microbatches: int,
    holders: Mapping[str, Collection[int]] | None = None,
    known: Sequence[int] = (),
) -> Plan:
    """Return a plan over micro-batches with the stages that its ops are cut into.

    graph: with the sizes planned for. shares: that the plan's rows were priced with. holders: the
    places on the axis of stages that have each parameter already, by path. known: where stages are
    said to start so that they fit, by the number of the op; taken if stages may start there.
    The predicted step is that of the schedule with what each stage takes. Under a memory limit,
    stages fit in it where they can.
    Raises PlanError where there is no such cut.
    """
    work = StageWork(graph, plan)
    ranks, per_rank = shares.ranks, plan.options.each_rank
    stages = ranks * per_rank
    hardware = find_hardware(plan.options.hardware)
    link = link_of_stages(plan, ranks, hardware)
    # A stage computes another micro-batch while it sends, most of the time.
    sends = [send_seconds(size, link) for size in work.nbytes]
    allowed = [
        math.inf if place and (not size or work.joined[place]) else seconds
        for place, (size, seconds) in enumerate(zip(work.nbytes, sends, strict=True))
    ]
    figures = figures_of(plan.options.order, ranks, per_rank, microbatches)
    rank_of, together = figures.ranks, figures.together
    able = all(place < len(allowed) and math.isfinite(allowed[place]) for place in known)
    if known and able:
        places = tuple(known)
    else:
        allowed = fewer_places(allowed, stages, work.seconds)
        owners = None if holders is None else work.owners(holders, rank_of)
        limit = plan.options.memory_limit
        sizes = None if limit is None else work.bytes_of()
        most = math.inf if limit is None else limit
        try:
            even = cut_within(work.seconds, allowed, together, rank_of, sizes, most, owners)
        except InfeasibleError as error:
            raise _no_cut(plan, stages, work) from error
        times = StageTimes(work.kinds(_devices(plan) == 1), work.nbytes, allowed, link)
        empty = Pipeline(stages, ranks, microbatches, plan.options.order, (), (), (), 0.0)
        places = quickest_starts(even, times, empty, sizes, most, owners)
    starts = tuple(work.names[place] for place in places)
    ends = (*places[1:], len(work.names))
    plan = replace(
        plan,
        pipeline=Pipeline(
            stages,
            ranks,
            microbatches,
            plan.options.order,
            starts,
            (0.0,) * stages,
            (*(int(work.nbytes[end]) for end in ends[:-1]), 0),
            0.0,
            in_flight=most_held(schedule_order(plan.options.order, ranks, per_rank, microbatches)),
        ),
    )
    return _told(graph, plan, shares, hardware, rank_of)


def _no_cut(plan: Plan, stages: int, work: StageWork) -> PlanError:
    """Return the error for a model that has no cut into so many stages."""
    return PlanError(
        f"{plan.model} cannot be cut into {stages} stages",
        why=f"its {len(work.names)} ops leave no {stages - 1} places where the work behind "
        "one goes on with what comes before it",
        fix="take a smaller pp, or leave it out",
    )


def _told(
    graph: Graph, plan: Plan, shares: StageShares, hardware: Hardware, ranks: Sequence[int]
) -> Plan:
    """Return a plan whose pipeline says what each stage takes. ranks: of each stage."""
    pipeline = plan.pipeline
    assert pipeline is not None
    stages = cut_plan(graph, plan)
    passes = [passes_of_stage(stage.plan, hardware) for stage in stages]
    sizes = tuple(size for _, size in plan.mesh.axes)
    # The optimizer's seconds go by the bytes that it updates.
    parts = {
        row.name: row.nbytes * layout_fraction(row.shape, row.state, sizes)
        for row in plan.parameters
        if graph.values[row.name].requires_grad
    }
    rows = sum(op.seconds for op in plan.ops) + sum(row.seconds for row in plan.conversions)
    updates = max(plan.seconds - rows, 0.0) / shares.once
    updates = max(updates - _gathers(stages, passes), 0.0)
    every = sum(parts.values())
    link = link_of_stages(plan, pipeline.ranks, hardware)
    tied = _tied(stages, plan, sizes, ranks)
    once = [
        each.reduction
        + each.gathers
        + updates * sum(parts.get(row.name, 0.0) for row in stage.plan.parameters) / max(every, 1.0)
        + (send_seconds(tied[stage.number], link) if tied[stage.number] else 0.0)
        for stage, each in zip(stages, passes, strict=True)
    ]
    devices = _devices(plan)
    alone = devices == 1
    pipeline = replace(
        pipeline,
        seconds=tuple(each.forward + each.backward for each in passes),
        forward_seconds=tuple(each.forward for each in passes),
        weight_seconds=tuple(
            _put_off(stage, each, alone) for stage, each in zip(stages, passes, strict=True)
        ),
        once_seconds=tuple(once),
        back_nbytes=tuple(int(_back(stage, sizes)) for stage in stages),
    )
    pipeline = at_own_paces(pipeline, [busy_of(each) for each in passes], hardware, devices)
    seconds, _, bubble = step_of(pipeline, passes_of(pipeline, link))
    return replace(
        plan,
        pipeline=replace(pipeline, bubble=max(bubble, 0.0)),
        # What was told of the whole model on all ranks is not told of its stages.
        seconds=seconds,
        step_seconds=seconds,
        step_bound=0.0,
        device_nbytes=0,
        memory=(),
    )


def _devices(plan: Plan) -> int:
    """Return the number of devices that compute a stage."""
    return math.prod(size for name, size in plan.mesh.axes if name != MICROBATCH)


def _put_off(stage: Stage, passes: StagePasses, alone: bool) -> float:
    """Return the seconds of a backward pass that a schedule may put off, as the stage is run.

    alone: it has one rank. Stages that cannot go back in halves put off nothing; those of which
    nothing that comes in has a gradient put off everything.
    """
    if not (alone and joins_weights_once(stage)):
        return 0.0
    back = any(stage.graph.values[name].requires_grad for name in stage.takes)
    return passes.weights if back else passes.backward


def _gathers(stages: Sequence[Stage], passes: Sequence[Any]) -> float:
    """Return the seconds of gathering updated parameters, each once."""
    total = 0.0
    counted: set[str] = set()
    for stage, each in zip(stages, passes, strict=True):
        names = {row.name for row in stage.plan.parameters}
        total += each.gathers * len(names - counted) / max(len(names), 1)
        counted |= names
    return total


def _back(stage: Stage, sizes: tuple[int, ...]) -> float:
    """Return the bytes of gradients that a rank sends to the stage before, for a micro-batch."""
    return sum(
        nbytes(value) * layout_fraction(value.shape, stage.entering[name], sizes)
        for name in stage.takes
        for value in (stage.graph.values[name],)
        if value.requires_grad
    )


def _tied(
    stages: Sequence[Stage], plan: Plan, sizes: tuple[int, ...], ranks: Sequence[int]
) -> list[float]:
    """Return the bytes of tied parameters' gradients that a rank of each stage sends to others.

    ranks: of each stage.
    """
    first: dict[str, dict[int, int]] = {}
    for stage in stages:
        for row in stage.plan.parameters:
            first.setdefault(row.name, {}).setdefault(ranks[stage.number], stage.number)
    sent = [0.0] * len(stages)
    rows = {row.name: row for row in plan.parameters}
    for name, places in first.items():
        row = rows[name]
        part = row.nbytes * layout_fraction(row.shape, row.storage, sizes)
        for number in places.values():
            sent[number] += part * (len(places) - 1)
    return sent


def with_memory(plan: Plan) -> Plan:
    """Return a plan with stages that tells the memory of its ranks, and of the one that needs most.

    Under a memory limit it is that for the sizes planned for, else for those of the example inputs.

    Example: `with_memory(plan).pipeline.memory`
    """
    if plan.pipeline is not None and plan.pipeline.memory:
        return plan
    assert plan.captured is not None
    limited = plan.options.memory_limit is not None
    graph = with_larger_hints(plan.captured, plan.options.tokens) if limited else None
    return with_accounts(plan, memory_of_pipeline(plan, graph))


def with_accounts(plan: Plan, accounts: Sequence[Account]) -> Plan:
    """Return a plan with stages that tells the memory of its ranks. accounts: of each of them.

    Example: `with_accounts(plan, memory_of_pipeline(plan)).pipeline.memory`
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    most = max(accounts, key=lambda account: account.total)
    each = tuple(account.total for account in accounts)
    device = find_hardware(plan.options.hardware).device_memory_bytes
    return replace(
        plan, memory=most.rows, device_nbytes=device, pipeline=replace(pipeline, memory=each)
    )
