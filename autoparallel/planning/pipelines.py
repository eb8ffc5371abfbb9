"""Plans with stages: the splits of every tensor, and the cuts between ops.

A micro-batch is a place on an axis in time. What is split over that axis is split over the
micro-batches, as it would be over ranks, and what a later op needs of all of them cannot be had: no
collective crosses time. So the planner of splits finds out by itself how a model is computed in
parts of its batch, and whether that can be. Then the ops, in their order, are cut into stages.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from autoparallel.analysis.pipeline import schedule_seconds, send_seconds
from autoparallel.cost.hardware import find_hardware
from autoparallel.cost.op_costs import nbytes
from autoparallel.errors import CoupledBatchError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Graph, Sym, hint
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.graph.passes.equal_sizes import with_equal_sizes
from autoparallel.graph.passes.flattened_rows import unflatten_rows
from autoparallel.graph.passes.global_counts import split_loss_counts
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import MICROBATCH, PIPELINE, Mesh
from autoparallel.options import SCHEDULES, Options, rank_of_stage
from autoparallel.placement import Invariant, Layout, Replicate, Shard
from autoparallel.plan import Pipeline, Plan
from autoparallel.planning.coupled_batches import coupled_call
from autoparallel.planning.search import search
from autoparallel.rewrite.stages import Cut, cut_plan, holders_of
from planners import InfeasibleError, partition

__all__ = ["in_parts", "is_pipeline", "meshes_of_pipeline", "pipeline_plan", "stages_of"]

# Micro-batches for each stage, where the user gives no number: of the passes' time, the stages then
# wait a fifth.
_PER_STAGE = 4
# The share of the products' work that micro-batches may repeat.
_MOST_REPEATED = 0.05
# Plans of more ops than these are cut at the places that send least.
_MOST_PLACES = 1500


def is_pipeline(mesh: Mesh) -> bool:
    """Return whether a mesh has an axis of stages, of more than one.

    >>> is_pipeline(Mesh(pp=2, tp=2)), is_pipeline(Mesh(dp=4))
    (True, False)
    """
    return any(name == PIPELINE and size > 1 for name, size in mesh.axes)


def meshes_of_pipeline(mesh: Mesh) -> tuple[int, Mesh]:
    """Return the number of ranks that share out the stages, and the mesh of those of one stage.

    >>> ranks, inside = meshes_of_pipeline(Mesh(pp=4, dp=2))
    >>> print(ranks, inside)
    4 Mesh(dp=2)
    """
    axes = dict(mesh.axes)
    ranks = axes.pop(PIPELINE)
    return ranks, Mesh(**(axes or {"tp": 1}))


def stages_of(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the places on the axis of stages at which each parameter is read, by its path; empty
    for a plan without stages.

    plan: with its graph.
    """
    if plan.pipeline is None or plan.captured is None:
        return {}
    return holders_of(cut_plan(plan.captured.graph, plan), plan.pipeline)


def in_parts(captured: Captured) -> Captured:
    """Return a traced model as its micro-batches compute it; the same one if it is so already."""
    captured = with_equal_sizes(captured)
    graph = split_loss_counts(captured.graph).verify()
    graph = unflatten_rows(graph).verify()
    return captured if graph == captured.graph else replace(captured, graph=graph)


def pipeline_plan(
    captured: Captured,
    model: str,
    mesh: Mesh,
    options: Options,
    stored: Mapping[str, Layout] | None = None,
    holders: Mapping[str, Collection[int]] | None = None,
) -> Plan:
    """Return the plan of a traced model on a mesh with stages.

    model: the name that the plan gives it. stored: the layouts, by path, in which the ranks of a
    stage have parameters already, and holders: the places on the axis of stages that have each.
    Without them both are chosen.
    Raises PlanError where micro-batches cannot be computed one after the other, and where the model
    cannot be cut into so many stages, and the errors of `search`.
    """
    _refuse(captured, options)
    unknown = [
        node.target
        for node in captured.graph.nodes
        if holders is not None and node.kind == "parameter" and node.target not in holders
    ]
    if unknown:
        raise PlanError(
            f"{unknown[0]} is read now, and was not when the model was cut into stages",
            why="no stage has it alone, so that its gradient would differ between them",
            fix="plan with example inputs, and in the mode, for which the model reads all of its "
            "parameters",
        )
    ranks, inside = meshes_of_pipeline(mesh)
    captured = in_parts(captured)
    asked = options.microbatches
    if asked is not None and not _is_even(asked, ranks, options):
        rounds = "micro-batches go in rounds of equal size, of at least as many as there are ranks"
        many = "it takes no fewer micro-batches than there are stages"
        raise PlanError(
            f"microbatches={asked} for {options.stages_per_rank} stages on each of {ranks} ranks, "
            f"with schedule={options.schedule!r}",
            why=many if SCHEDULES[options.schedule].per_stage else rounds,
            fix=f"pass a multiple of {ranks * options.stages_per_rank}",
        )
    if stored is not None and asked is not None and _batch(captured.graph) == 1:
        asked = 1  # a call of a planned model with one row, which no number of others can share
    # As one micro-batch, everything can be computed.
    for count in (_suited(captured, ranks, options), 1) if asked is None else (asked,):
        layouts = Mesh(**{MICROBATCH: count}, **dict(inside.axes))
        kept = None if stored is None else _over_time(captured.graph, stored, count)
        failed: PlanError | None = None
        try:
            plan = search(captured, model, layouts, options, stored=kept)
        except CoupledBatchError:
            if asked is not None:
                raise
            continue
        except PlanError as error:
            failed = error
        if failed is None and (count == 1 or not _is_repeated(captured.graph, plan)):
            # With the sizes for which the plan is made.
            planned = with_larger_hints(captured, options.tokens)
            return _cut(planned, plan, ranks, count, holders)
        culprit = coupled_call(captured.graph, count, options) if count > 1 else None
        if failed is not None and culprit is None:
            raise failed
        if asked is None:
            continue
        place = f"{culprit.target} in {culprit.where or model}\n{culprit.line}" if culprit else ""
        raise CoupledBatchError(
            f"the batch cannot be computed as {count} micro-batches",
            where=place.rstrip(),
            why="the op needs all of the batch at once, and a stage sees one micro-batch after "
            "the other",
            fix="pass microbatches=1, or leave pp out of the mesh",
        ) from failed
    raise AssertionError("one micro-batch is no cut of a batch")


def _is_repeated(graph: Graph, plan: Plan) -> bool:
    """Return whether every micro-batch would compute much of the whole batch's work.

    That is right, and takes as much longer as there are micro-batches. Products of parameters alone
    do not count: there is no batch in them.
    """
    fed = {node.result.name for node in graph.nodes if node.kind == "input"}
    work = repeated = 0.0
    choices = {op.name: op for op in plan.ops}
    for node in graph.calls:
        if not any(name in fed for name in node.operands()):
            continue
        fed.update(value.name for value in node.results)
        op = choices[node.name]
        work += op.whole_flops
        if not any(isinstance(layout[0], Shard) for layout in (*op.operands, *op.results)):
            repeated += op.whole_flops
    return repeated > _MOST_REPEATED * work


def _refuse(captured: Captured, options: Options) -> None:
    """Raise PlanError for what no pipeline does."""
    what, why = "", ""
    if options.rng == "fast":
        what = 'rng="fast"'
        why = "the streams of several stages would draw the same numbers"
    elif options.memory_limit is not None:
        what, why = "memory_limit", "the memory of stages is not counted yet"
    elif captured.own:
        what = "a model that returns its own parameters or buffers"
        why = "the ranks of other stages do not hold them"
    else:
        inert = inert_calls(captured.graph)
        for node in captured.graph.calls:
            if node.target == BRANCH_TAKEN and node.name not in inert:
                what = f"a branch on a value that the model computes ({node.line or node.where})"
                why = "one stage alone would know which way it goes"
    if what:
        raise PlanError(f"{what}: not on a mesh with stages", why=why, fix="leave pp out")


def _suited(captured: Captured, ranks: int, options: Options) -> int:
    """Return a number of micro-batches that suits the batch of the example inputs."""
    batch = _batch(captured.graph)
    most = min(_PER_STAGE * ranks, batch)
    able = [count for count in range(1, most + 1) if _is_even(count, ranks, options)] or [1]
    even = [count for count in able if count >= ranks and batch % count == 0]
    return max(even, default=max(able))


def _is_even(count: int, ranks: int, options: Options) -> bool:
    """Return whether a schedule takes so many micro-batches: interleaved ones have equal rounds."""
    schedule = SCHEDULES[options.schedule]
    if schedule.folded:
        return not schedule.per_stage or count >= options.stages_per_rank * ranks
    in_rounds = options.stages_per_rank > 1 or schedule.alone == schedule.several
    return not in_rounds or count % max(1, count // ranks) == 0


def _batch(graph: Graph) -> int:
    """Return the size of the batch: of the inputs' first dim, where it is symbolic if any is."""
    first = [
        node.result.shape[0] for node in graph.nodes if node.kind == "input" and node.result.shape
    ]
    symbolic = [size for size in first if isinstance(size, Sym)]
    return max((hint(size) for size in symbolic or first), default=1)


def _over_time(graph: Graph, stored: Mapping[str, Layout], count: int) -> dict[str, Layout]:
    """Return layouts of parameters with a placement on the axis of micro-batches before them."""
    nodes = {node.target: node.result for node in graph.nodes if node.kind == "parameter"}
    return {
        path: (
            Replicate()
            if count > 1 and path in nodes and nodes[path].requires_grad
            else Invariant(),
            *layout,
        )
        for path, layout in stored.items()
    }


def _cut(
    graph: Graph,
    plan: Plan,
    ranks: int,
    microbatches: int,
    holders: Mapping[str, Collection[int]] | None,
) -> Plan:
    """Return the plan with the stages that its ops are cut into.

    The predicted step is that of the schedule with what each stage takes.
    """
    work = _Work(graph, plan)
    per_rank = plan.options.stages_per_rank
    stages = ranks * per_rank
    hardware = find_hardware(plan.options.hardware)
    devices = tuple(1 if name == MICROBATCH else size for name, size in plan.mesh.axes)
    link = hardware.links((ranks, *devices))[0]
    # A stage computes another micro-batch while it sends, most of the time.
    sends = [send_seconds(size, link) for size in work.nbytes]
    allowed = [
        math.inf if place and (not size or work.joined[place]) else seconds
        for place, (size, seconds) in enumerate(zip(work.nbytes, sends, strict=True))
    ]
    owners = None if holders is None else work.owners(holders, stages, ranks)
    try:
        places = partition(work.seconds, _few(allowed), stages, owners)
    except InfeasibleError as error:
        raise PlanError(
            f"{plan.model} cannot be cut into {stages} stages",
            why=f"its {len(work.names)} ops leave no {stages - 1} places where the work behind "
            "one goes on with what comes before it",
            fix="take a smaller pp, or leave it out",
        ) from error
    ends = (*places[1:], len(work.names))
    runs = list(zip(places, ends, strict=True))
    forwards = [float(sum(work.forward[start:end])) for start, end in runs]
    both = [float(sum(work.seconds[start:end])) for start, end in runs]
    backwards = [all_of - ahead for all_of, ahead in zip(both, forwards, strict=True)]
    send = max((sends[start] for start in places[1:]), default=0.0)
    schedule = plan.options.schedule
    # Those that put off gradients of weights wait less than this one.
    priced = schedule if schedule == "gpipe" else "1f1b"
    passes = schedule_seconds(
        ranks, microbatches, priced, forwards, backwards, send=send, per_rank=per_rank
    )
    work_of = [0.0] * ranks
    for stage, seconds in enumerate(both):
        work_of[rank_of_stage(stage, ranks, schedule)] += seconds
    busy = microbatches * max(work_of)
    # Parameters are updated once a step, each stage its own.
    updates = max(0.0, plan.seconds - sum(op.seconds for op in plan.ops) - work.converting)
    pipeline = Pipeline(
        stages,
        ranks,
        microbatches,
        schedule,
        tuple(work.names[place] for place in places),
        tuple(both),
        (*(int(work.nbytes[end]) for end in ends[:-1]), 0),
        max(0.0, 1 - busy / passes) if passes else 0.0,
    )
    # What was told of the whole model on all ranks is not told of its stages.
    return replace(
        plan,
        pipeline=pipeline,
        seconds=passes + updates / ranks,
        step_seconds=0.0,
        step_bound=0.0,
        device_nbytes=0,
        memory=(),
    )


def _few(sends: list[float]) -> list[float]:
    """Return the same costs with fewer places: those that send most are left out."""
    finite = sorted(seconds for seconds in sends if math.isfinite(seconds))
    if len(finite) <= _MOST_PLACES:
        return sends
    most = finite[_MOST_PLACES]
    # Equal blocks have equal places: all that send as little stay, even if they are a few more.
    return [
        seconds if place == 0 or seconds <= most else math.inf
        for place, seconds in enumerate(sends)
    ]


class _Work:
    """The ops that stages compute, in order, and what a cut before each of them sends.

    names: of the ops. seconds, forward: of each with the conversions that it is the first to read,
    in both passes and in the forward pass. nbytes: that a rank sends where a stage starts with the
    op. joined: whether the op is recomputed together with the one before it. converting: seconds of
    all conversions.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        inert = inert_calls(graph)
        self.graph, self.plan = graph, plan
        self.names = [node.name for node in graph.calls if node.name not in inert]
        place = {name: number for number, name in enumerate(self.names)}
        choices = {op.name: op for op in plan.ops}
        self.seconds = [choices[name].seconds for name in self.names]
        self.forward = [choices[name].forward_seconds for name in self.names]
        self.converting = sum(row.seconds for row in plan.conversions)
        for row in plan.conversions:
            reader = place.get(row.readers[0], len(self.names) - 1)
            self.seconds[reader] += row.seconds
            self.forward[reader] += row.seconds / 2 if row.requires_grad else row.seconds
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
        sizes = tuple(size for _, size in self.plan.mesh.axes)
        change = np.zeros(len(self.names) + 1)
        for name, (first, last) in cut.spans.items():
            if first == last:
                continue
            value = self.graph.values[name]
            layout = cut.travelling[name]
            part = nbytes(value) * layout_fraction(value.shape, layout, sizes)
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
        schedule = self.plan.options.schedule
        calls = {node.name: node for node in self.graph.calls}
        for name in self.names:
            able: Collection[int] | None = None
            for operand in calls[name].operands():
                node = self.graph.producers[operand]
                if node.kind == "parameter":
                    held = holders.get(node.target, ())
                    some = {s for s in range(stages) if rank_of_stage(s, ranks, schedule) in held}
                    able = some if able is None else some & set(able)
            owners.append(able)
        return owners
