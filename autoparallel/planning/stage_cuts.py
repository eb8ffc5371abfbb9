"""Where a planned model is cut into stages, and what each of them then takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.abstract_execution import AbstractExecution
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.memory import Account, resident
from autoparallel.analysis.pipeline import send_seconds
from autoparallel.analysis.pipeline_step import link_of_stages, passes_of, step_of
from autoparallel.analysis.pipeline_walk import most_held
from autoparallel.analysis.stage_memory import memory_of_ranks, memory_of_stages
from autoparallel.analysis.timeline import passes_of_stage
from autoparallel.cost.hardware import Hardware, find_hardware
from autoparallel.cost.op_costs import nbytes
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.plan import Pipeline, Plan
from autoparallel.rewrite.stages import Cut, Stage, cut_plan
from autoparallel.runtime.pipeline_schedules import schedule_order
from autoparallel.strategy.stage_shares import StageShares
from planners import InfeasibleError, partition

__all__ = ["cut_into_stages", "memory_of_pipeline", "with_memory"]

# Plans of more ops than these, for each stage, are cut at the places that send least.
_PLACES_EACH, _FEWEST_PLACES = 8, 400


def cut_into_stages(
    graph: Graph,
    plan: Plan,
    shares: StageShares,
    microbatches: int,
    holders: Mapping[str, Collection[int]] | None = None,
) -> Plan:
    """Return a plan over micro-batches with the stages that its ops are cut into.

    graph: with the sizes planned for. shares: that the plan's rows were priced with. holders: the
    places on the axis of stages that have each parameter already, by path.
    The predicted step is that of the schedule with what each stage takes. Under a memory limit,
    stages fit in it where they can.
    Raises PlanError where there is no such cut.
    """
    work = _Work(graph, plan)
    ranks, per_rank = shares.ranks, plan.options.stages_per_rank
    stages = ranks * per_rank
    hardware = find_hardware(plan.options.hardware)
    link = link_of_stages(plan, ranks, hardware)
    # A stage computes another micro-batch while it sends, most of the time.
    sends = [send_seconds(size, link) for size in work.nbytes]
    allowed = [
        math.inf if place and (not size or work.joined[place]) else seconds
        for place, (size, seconds) in enumerate(zip(work.nbytes, sends, strict=True))
    ]
    allowed = _few(allowed, max(_PLACES_EACH * stages, _FEWEST_PLACES))
    owners = None if holders is None else work.owners(holders, stages, ranks)
    order = schedule_order(plan.options.schedule, ranks, per_rank, microbatches)
    held = most_held(order)
    limit = plan.options.memory_limit
    fits = None if limit is None else work.fits(held, limit / per_rank, microbatches)
    try:
        places = partition(work.seconds, allowed, stages, owners, fits)
    except InfeasibleError as error:
        if fits is None:
            raise _no_cut(plan, stages, work) from error
        # None fits: by how much the most even one does not is told by its account.
        try:
            places = partition(work.seconds, allowed, stages, owners)
        except InfeasibleError as other:
            raise _no_cut(plan, stages, work) from other
    starts = tuple(work.names[place] for place in places)
    ends = (*places[1:], len(work.names))
    plan = replace(
        plan,
        pipeline=Pipeline(
            stages,
            ranks,
            microbatches,
            plan.options.schedule,
            starts,
            (0.0,) * stages,
            (*(int(work.nbytes[end]) for end in ends[:-1]), 0),
            0.0,
            in_flight=held,
        ),
    )
    return _told(graph, plan, shares, hardware)


def _no_cut(plan: Plan, stages: int, work: _Work) -> PlanError:
    """Return the error for a model that has no cut into so many stages."""
    return PlanError(
        f"{plan.model} cannot be cut into {stages} stages",
        why=f"its {len(work.names)} ops leave no {stages - 1} places where the work behind "
        "one goes on with what comes before it",
        fix="take a smaller pp, or leave it out",
    )


def _told(graph: Graph, plan: Plan, shares: StageShares, hardware: Hardware) -> Plan:
    """Return a plan whose pipeline says what each stage takes."""
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
    tied = _tied(stages, plan, sizes)
    once = [
        each.reduction
        + each.gathers
        + updates * sum(parts.get(row.name, 0.0) for row in stage.plan.parameters) / max(every, 1.0)
        + (send_seconds(tied[stage.number], link) if tied[stage.number] else 0.0)
        for stage, each in zip(stages, passes, strict=True)
    ]
    pipeline = replace(
        pipeline,
        seconds=tuple(each.forward + each.backward for each in passes),
        forward_seconds=tuple(each.forward for each in passes),
        weight_seconds=tuple(each.weights for each in passes),
        once_seconds=tuple(once),
        back_nbytes=tuple(int(_back(stage, sizes)) for stage in stages),
    )
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


def _tied(stages: Sequence[Stage], plan: Plan, sizes: tuple[int, ...]) -> list[float]:
    """Return the bytes of tied parameters' gradients that a rank of each stage sends to others."""
    assert plan.pipeline is not None
    holders: dict[str, dict[int, int]] = {}
    for stage in stages:
        for row in stage.plan.parameters:
            holders.setdefault(row.name, {}).setdefault(stage.number % plan.pipeline.ranks,
                                                        stage.number)  # fmt: skip
    sent = [0.0] * len(stages)
    rows = {row.name: row for row in plan.parameters}
    for name, places in holders.items():
        row = rows[name]
        part = row.nbytes * layout_fraction(row.shape, row.storage, sizes)
        for number in places.values():
            sent[number] += part * (len(places) - 1)
    return sent


def memory_of_pipeline(plan: Plan, graph: Graph | None = None) -> tuple[Account, ...]:
    """Return the memory of each place on the axis of stages.

    plan: with its graph. graph: with the sizes to count for; by default those of the example
    inputs.

    Example: `max(account.total for account in memory_of_pipeline(plan))`
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    assert plan.captured is not None
    stages = memory_of_stages(cut_plan(graph or plan.captured.graph, plan))
    per_rank = pipeline.stages // pipeline.ranks
    order = schedule_order(pipeline.schedule, pipeline.ranks, per_rank, pipeline.microbatches)
    return memory_of_ranks(plan, stages, order)


def with_memory(plan: Plan) -> Plan:
    """Return a plan with stages that tells the memory of its ranks, and of the one that needs most.

    Under a memory limit it is that for the sizes planned for, else for those of the example inputs.

    Example: `with_memory(plan).pipeline.memory`
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    assert plan.captured is not None
    limited = plan.options.memory_limit is not None
    graph = with_larger_hints(plan.captured, plan.options.tokens) if limited else None
    accounts = memory_of_pipeline(plan, graph)
    most = max(accounts, key=lambda account: account.total)
    each = tuple(account.total for account in accounts)
    device = find_hardware(plan.options.hardware).device_memory_bytes
    return replace(
        plan, memory=most.rows, device_nbytes=device, pipeline=replace(pipeline, memory=each)
    )


def _few(sends: list[float], most: int) -> list[float]:
    """Return the same costs with fewer places: those that send most are left out, and of many that
    send alike, every second, third, ... one.
    """
    finite = sorted(seconds for seconds in sends if math.isfinite(seconds))
    if len(finite) <= most:
        return sends
    bound = finite[most]
    cheaper = sum(seconds < bound for seconds in finite)
    alike = [place for place, seconds in enumerate(sends) if place and seconds == bound]
    step = -(-len(alike) // max(most - cheaper, 1))
    kept = set(alike[::step])
    return [
        seconds if place == 0 or seconds < bound or place in kept else math.inf
        for place, seconds in enumerate(sends)
    ]


class _Work:
    """The ops that stages compute, in order, and what a cut before each of them sends.

    names: of the ops. seconds: of each with the conversions that it is the first to read, and its
    share of what is done once a step. nbytes: that a rank sends where a stage starts with the op.
    joined: whether the op is recomputed together with the one before it.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        inert = inert_calls(graph)
        self.graph, self.plan = graph, plan
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        self.names = [node.name for node in graph.calls if node.name not in inert]
        self.place = {name: number for number, name in enumerate(self.names)}
        choices = {op.name: op for op in plan.ops}
        self.seconds = [choices[name].seconds for name in self.names]
        for row in plan.conversions:
            reader = self.place.get(row.readers[0], len(self.names) - 1)
            self.seconds[reader] += row.seconds
        self.readers = {
            node.target: [
                self.place[reader.name]
                for reader in graph.readers[node.result.name]
                if reader.name in self.place
            ]
            for node in graph.nodes
            if node.kind == "parameter"
        }
        self.nbytes = self._crossing()
        groups = {name: number for number, group in enumerate(plan.recomputed) for name in group}
        pairs = zip([None, *self.names], self.names, strict=False)
        self.joined = [
            other is not None and name in groups and groups.get(other) == groups[name]
            for other, name in pairs
        ]

    def _crossing(self) -> list[float]:
        """Return, for each op, the bytes of the values that are made before it and read from it on.

        Each op is a stage of its own here: a cut between two of them sends what goes from one side
        to the other.
        """
        cut = Cut(self.graph, self.plan, self.names)
        change = np.zeros(len(self.names) + 1)
        for name, (first, last) in cut.spans.items():
            if first == last:
                continue
            value = self.graph.values[name]
            layout = cut.travelling[name]
            part = nbytes(value) * layout_fraction(value.shape, layout, self.sizes)
            change[first + 1] += part
            change[last + 1] -= part
        running = np.cumsum(change)[:-1]
        return [float(size) if size > 0.5 else 0.0 for size in running]

    def owners(
        self, holders: Mapping[str, Collection[int]], stages: int, ranks: int
    ) -> list[Collection[int] | None]:
        """Return the stages that may compute each op: those on ranks with the parameters it reads.

        holders: those ranks, by path. stages, ranks: their numbers.
        """
        owners: list[Collection[int] | None] = []
        calls = {node.name: node for node in self.graph.calls}
        for name in self.names:
            able: Collection[int] | None = None
            for operand in calls[name].operands():
                node = self.graph.producers[operand]
                if node.kind == "parameter":
                    held = holders.get(node.target, ())
                    some = {stage for stage in range(stages) if stage % ranks in held}
                    able = some if able is None else some & set(able)
            owners.append(able)
        return owners

    def fits(
        self, held: Sequence[int], limit: float, microbatches: int
    ) -> Callable[[int, NDArray[np.intp], NDArray[np.intp]], NDArray[np.bool_]]:
        """Return a function that says which runs of ops fit in a limit as a stage.

        held: micro-batches of which each stage keeps activations. limit: bytes of a stage.
        microbatches: for each of which there is a buffer of what comes in, and of its gradient.
        """
        count = len(self.names)
        stays, kept = np.zeros(count + 1), np.zeros(count + 1)
        twice: list[tuple[int, int, float]] = []
        for row in self.plan.parameters:
            whole = replace(row, gradient=row.storage)
            trained = self.graph.values[row.name].requires_grad
            size = sum(item.nbytes for item in resident(whole, self.plan, trained))
            readers = sorted(self.readers[row.path])
            for reader in readers:
                stays[reader + 1] += size
            # A stage with several readers has the parameter once.
            twice += [(one, other, size) for one, other in pairwise(readers)]
        walk = AbstractExecution(self.graph, self.plan, self.plan.recomputed)
        liveness = Liveness(walk)
        place = 0
        places = []
        for moment in walk.moments:
            place = max(place, self.place.get(moment.node, 0))
            places.append(place)
        for number in liveness.saved:
            storage = walk.storages[number]
            if storage.born < len(places):
                kept[places[storage.born] + 1] += storage.nbytes
        there = sum(s.nbytes for s in walk.storages if s.kind in ("input", "buffer"))
        stays, kept = np.cumsum(stays), np.cumsum(kept)
        limit -= there + liveness.temporary
        buffers = microbatches * np.array([*self.nbytes, 0.0])
        buffers[0] = 0.0

        def able(run: int, starts: NDArray[np.intp], ends: NDArray[np.intp]) -> NDArray[np.bool_]:
            """Say which of these runs fit."""
            size = stays[ends] - stays[starts] + held[run] * (kept[ends] - kept[starts])
            size = size + buffers[starts] + buffers[ends]
            for one, other, again in twice:
                size = size - again * ((starts <= one) & (other < ends))
            fits: NDArray[np.bool_] = size <= limit
            return fits

        return able
