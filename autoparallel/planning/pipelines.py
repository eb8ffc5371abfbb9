"""Plans with stages: the splits of every tensor, and the cuts between ops.

A micro-batch is a place on an axis in time. What is split over that axis is split over the
micro-batches, as it would be over ranks, and what a later op needs of all of them cannot be had: no
collective crosses time. So the planner of splits finds out by itself how a model is computed in
parts of its batch, and whether that can be. Then the ops, in their order, are cut into stages.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from autoparallel.analysis.memory_account import Account
from autoparallel.analysis.stage_memory import memory_of_pipeline
from autoparallel.errors import CoupledBatchError, MemoryLimitError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import MICROBATCH, PIPELINE, Mesh
from autoparallel.options import SCHEDULES, Options
from autoparallel.placement import Layout, Shard
from autoparallel.plan import Plan
from autoparallel.planning.coupled_batches import coupled_call
from autoparallel.planning.eased_plans import Eased
from autoparallel.planning.pipeline_choices import (
    batch_of,
    chosen_of,
    in_parts,
    is_even,
    microbatch_counts,
    middle_of,
    over_time,
    refuse_pipeline,
)
from autoparallel.planning.pipeline_estimates import Estimator
from autoparallel.planning.schedule_figures import shares_of
from autoparallel.planning.search import search
from autoparallel.planning.stage_cuts import cut_into_stages, with_accounts
from autoparallel.rewrite.stages import cut_plan, holders_of

__all__ = [
    "is_pipeline",
    "meshes_of_pipeline",
    "pipeline_plan",
    "stages_of",
]

# The share of the products' work that micro-batches may repeat.
_MOST_REPEATED = 0.05


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


def pipeline_plan(
    captured: Captured,
    model: str,
    mesh: Mesh,
    options: Options,
    stored: Mapping[str, Layout] | None = None,
    holders: Mapping[str, Collection[int]] | None = None,
    pins: Mapping[str, Layout] | None = None,
    estimator: Estimator | None = None,
) -> Plan:
    """Return the plan of a traced model on a mesh with stages, of the shortest predicted step.

    model: the name that the plan gives it. stored: the layouts, by path, in which the ranks of a
    stage have parameters already, and holders: the places on the axis of stages that have each.
    Without them both are chosen. pins: layouts, by path, that parameters are to have on the mesh of
    the ranks of a stage. estimator: of this model, which knows some estimates already.
    Raises PlanError where micro-batches cannot be computed one after the other, and where the model
    cannot be cut into so many stages, MemoryLimitError where no stages fit, and the errors of
    `search`.
    """
    refuse_pipeline(captured, options)
    if estimator is not None:
        options = estimator.settled(mesh, options)
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
    if asked is not None and not is_even(asked, ranks, options):
        rounds = "micro-batches go in rounds of equal size, of at least as many as there are ranks"
        many = "it takes no fewer micro-batches than there are stages"
        raise PlanError(
            f"microbatches={asked} for {options.each_rank} stages on each of {ranks} ranks, "
            f"with schedule={options.order!r}",
            why=many if SCHEDULES[options.order].per_stage else rounds,
            fix=f"pass a multiple of {ranks * options.each_rank}",
        )
    if stored is not None and asked is not None and batch_of(captured.graph) == 1:
        asked = 1  # a call of a planned model with one row, which no number of others can share
    request = _Request(captured, model, ranks, inside, options, stored, holders, pins, estimator)
    if asked is not None:
        found = None
        if options.memory_limit is not None and stored is None:
            found = request.estimated([asked])
        return request.planned(asked, () if found is None else found[1])
    return request.best()


class _Request:
    """A pipeline that is asked for: what is planned, for any number of micro-batches.

    ranks: that share out the stages. inside: the mesh of those of one stage. Others: as of
    `pipeline_plan`.
    """

    def __init__(
        self,
        captured: Captured,
        model: str,
        ranks: int,
        inside: Mesh,
        options: Options,
        stored: Mapping[str, Layout] | None,
        holders: Mapping[str, Collection[int]] | None,
        pins: Mapping[str, Layout] | None,
        estimator: Estimator | None,
    ) -> None:
        self.estimator = estimator
        self.captured, self.model, self.ranks, self.inside = captured, model, ranks, inside
        self.options, self.stored, self.holders, self.pins = options, stored, holders, pins
        # With the sizes for which the plan is made.
        self.graph = with_larger_hints(captured, options.tokens)

    def best(self) -> Plan:
        """Return the plan with the number of micro-batches of the shortest step.

        More of them leave a smaller bubble and hold fewer activations, and their products are
        smaller. From the number that leaves a fifth of the time waiting, larger and smaller ones
        are tried as long as they are better. As one micro-batch, everything can be computed.
        """
        counts = microbatch_counts(self.captured.graph, self.ranks, self.inside, self.options)
        estimated = None if self.stored is not None else self.estimated(counts)
        if estimated is not None:
            chosen, eased = estimated
            try:
                return self.planned(chosen, eased)
            except CoupledBatchError:
                return self.planned(1)
            except MemoryLimitError:
                # The largest number of micro-batches holds least.
                counts = [count for count in counts if count > chosen]
                if not counts:
                    raise
        middle = middle_of(counts, self.ranks)
        best: Plan | None = None
        failed: PlanError | None = None
        plans: dict[int, Plan | None] = {}

        def tried(count: int) -> Plan | None:
            """Return the plan for a number of micro-batches; None where there is none."""
            nonlocal failed
            if count not in plans:
                try:
                    plans[count] = self.planned(count)
                except PlanError as error:
                    is_closer = getattr(error, "least", math.inf) < getattr(
                        failed, "least", math.inf
                    )
                    if failed is None or is_closer:
                        failed = error
                    plans[count] = None
            return plans[count]

        if self.stored is not None:
            # What a running model is given is planned in no time, and its step is run.
            counts = [middle]
        start = counts.index(middle)
        best = tried(middle)
        for way in (counts[start + 1 :], counts[:start][::-1]):
            for count in way:
                plan = tried(count)
                if isinstance(failed, CoupledBatchError):
                    break
                if plan is None and best is None:
                    continue
                if plan is None or (best is not None and plan.step >= best.step):
                    break
                best = plan
        if best is None and 1 not in plans:
            best = tried(1)
        if best is None:
            assert failed is not None
            raise failed
        return best

    def estimated(self, counts: list[int]) -> tuple[int, tuple[Eased, ...]] | None:
        """Return which of these numbers of micro-batches has the shortest step, by an estimate, and
        the ways in which its plan fits; None where there is none.
        """
        estimator = self.estimator or Estimator(self.captured, self.options)
        if estimator.short is None:
            return None
        best = chosen_of(estimator, counts, self.ranks, self.inside, self.options, self.pins)
        return None if best is None else (best[1], best[0].eased)

    def planned(self, count: int, eased: Sequence[Eased] = ()) -> Plan:
        """Return the plan for so many micro-batches. eased: as of `search`.

        Raises CoupledBatchError where the batch cannot be computed in so many parts.
        """
        options, graph = self.options, self.captured.graph
        layouts = Mesh(**{MICROBATCH: count}, **dict(self.inside.axes))
        kept = None if self.stored is None else over_time(graph, self.stored, count)
        pins = None if self.pins is None else over_time(graph, self.pins, count)
        shares = shares_of(self.ranks, count, options)

        # Plans that were said to fit, and their cuts; and the memory of the ranks of these.
        known: list[tuple[Plan, Plan]] = []
        told: list[tuple[Plan, tuple[Account, ...]]] = []

        def cut(plan: Plan, starts: Sequence[int] = ()) -> Plan:
            """Return the plan in stages, once and for all. starts: as of `Eased`."""
            key = replace(plan, memory=(), lower_bound=0.0, method="")
            for other, stages in known:
                if other == key:
                    return replace(stages, method=plan.method, lower_bound=plan.lower_bound)
            stages = cut_into_stages(self.graph, plan, shares, count, self.holders, starts)
            if eased:
                known.append((key, stages))
            return stages

        def judge(plan: Plan, starts: Sequence[int] = ()) -> Account:
            """Return the memory of the rank that needs most. starts: as of `Eased`."""
            stages = cut(plan, starts)
            accounts = memory_of_pipeline(stages, self.graph)
            told[:] = [(stages, accounts)]
            return max(accounts, key=lambda account: account.total)

        def searched(in_parts: bool) -> Plan:
            """Return the plan over micro-batches. in_parts: as of `StageShares`."""
            return search(
                self.captured,
                self.model,
                layouts,
                options,
                stored=kept,
                pins=pins,
                shares=replace(shares, in_parts=in_parts),
                judge=judge,
                eased=eased,
                step=lambda plan: cut(plan).step,
            )

        try:
            plan = searched(in_parts=True)
        except (CoupledBatchError, MemoryLimitError):
            raise
        except PlanError:
            try:
                plan = searched(in_parts=False)
            except PlanError as error:
                culprit = coupled_call(graph, count, options) if count > 1 else None
                if culprit is None or isinstance(error, CoupledBatchError | MemoryLimitError):
                    raise
                raise _coupled(count, culprit, self.model) from error
        if count > 1 and _is_repeated(graph, plan):
            raise _coupled(count, coupled_call(graph, count, options), self.model)
        stages = cut(plan)
        # Counting takes as long as cutting: the one that was judged last is mostly the one.
        same = [accounts for other, accounts in told if other.pipeline is stages.pipeline]
        return with_accounts(stages, same[0]) if same else stages


def _coupled(count: int, culprit: Node | None, model: str) -> CoupledBatchError:
    """Return the error for a batch that cannot be computed in so many parts. culprit: the op."""
    place = f"{culprit.target} in {culprit.where or model}\n{culprit.line}" if culprit else ""
    return CoupledBatchError(
        f"the batch cannot be computed as {count} micro-batches",
        where=place.rstrip(),
        why="the op needs all of the batch at once, and a stage sees one micro-batch after "
        "the other",
        fix="pass microbatches=1, or leave pp out of the mesh",
    )


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
