"""The memory that each rank of a pipeline takes: its stages, and the micro-batches in flight.

A rank keeps the activations of every micro-batch that went forward through one of its stages and
not yet all the way back. How many those are is read off the schedule's own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from autoparallel.analysis.abstract_execution import AbstractExecution
from autoparallel.analysis.gradient_buckets import reducing_nbytes
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.memory_account import Account, Item, account_of, grouped, resident
from autoparallel.analysis.pipeline_walk import Held, StageMessages, held
from autoparallel.graph.graph import Graph, Value, hint
from autoparallel.graph.part_sizes import local_shape
from autoparallel.mesh import MICROBATCH
from autoparallel.parallel.pipeline_schedules import joins_weights_once, weights_met
from autoparallel.placement import Layout
from autoparallel.plan import ParameterChoice, Pipeline, Plan
from autoparallel.rewrite.stages import Stage, cut_plan
from autoparallel.rules.lookup import known_rule
from autoparallel.rules.rule import OpCall
from autoparallel.runtime.message_orders import Messages, messages_of, sends_by_table
from autoparallel.runtime.schedule_orders import BACKWARD, INPUTS, Pass, schedule_order
from autoparallel.support.torch_versions import KEEPS_WHAT_IS_SENT

__all__ = ["StageMemory", "memory_of_pipeline", "memory_of_ranks", "memory_of_stages"]


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one stage on one rank.

    items: of parameters, gradients, optimizer state, buffers and inputs, which are there all along.
    saved: what each micro-batch keeps until its backward pass: what autograd saves, what comes from
    the stage before, and what goes to the next one. sent: of the last, what is kept for that alone;
    in some schedules, some releases of torch let go of it when it has arrived.
    came: of what is saved, what comes from the stage before. messages: what comes and goes of one
    micro-batch, and what a pass takes beyond all these.
    returned: of the last stage, what the caller gets of one micro-batch. parameters: those of its
    plan. in_halves: whether it may compute gradients of weights later than others. assumed: see
    Account.
    """

    items: tuple[Item, ...]
    saved: tuple[Item, ...]
    sent: tuple[Item, ...]
    came: tuple[Item, ...]
    messages: StageMessages
    returned: int
    parameters: tuple[ParameterChoice, ...]
    in_halves: bool
    assumed: tuple[str, ...] = ()

    @property
    def activations(self) -> int:
        """The bytes that a micro-batch keeps."""
        return sum(item.nbytes for item in self.saved)

    def letting_go(self) -> StageMemory:
        """Return the bytes of a stage that no longer keeps what has arrived at the next one."""
        sent = sum(item.nbytes for item in self.sent)
        saved = tuple(item for item in self.saved if item not in self.sent)
        return replace(self, saved=saved, sent=(), messages=replace(self.messages, sent=sent))

    def behind_its_own(self) -> StageMemory:
        """Return the bytes of a stage behind one of the same rank: what comes from that one lies
        where that one keeps it.
        """
        return replace(self, saved=tuple(item for item in self.saved if item not in self.came))


def memory_of_stages(stages: Sequence[Stage]) -> tuple[StageMemory, ...]:
    """Return the bytes that each stage of a pipeline takes on one of its ranks.

    Example: `memory_of_stages(cut_plan(plan.captured.graph, plan))[0].activations`
    """
    # Equal stages run equal calls: each is run once.
    seen: dict[Any, Any] = {}
    return tuple(_memory_of(stage, stages, seen) for stage in stages)


def _memory_of(stage: Stage, stages: Sequence[Stage], seen: dict[Any, Any]) -> StageMemory:
    """Return the bytes of one stage. seen: calls that were run already."""
    plan, values = stage.plan, stage.graph.values
    sizes = tuple(size for _, size in plan.mesh.axes)
    entering = {name: stage.entering[name] for name in stage.takes}
    walk = AbstractExecution(stage.graph, plan, plan.recomputed, entering, seen, plan.remade)
    liveness = Liveness(walk)
    items: list[Item] = []
    for parameter in plan.parameters:
        # Micro-batches add up their gradients as the parameter is stored, whatever becomes of them.
        whole = replace(parameter, gradient=parameter.storage)
        items += resident(whole, plan, values[parameter.name].requires_grad)
    saved: list[Item] = []
    sent: list[Item] = []
    came: list[Item] = []
    received = back = gradients = 0
    is_last = stage.number == len(stages) - 1
    out = set() if is_last else {walk.locals[number].storage for number in walk.returned}
    saving = frozenset(liveness.saved)
    every = out | saving
    for number, storage in enumerate(walk.storages):
        item = Item("activations", storage.name, storage.where, 1, storage.nbytes)
        if storage.kind == "received":
            # The library holds on to what came in, of which it asks for the gradient.
            received += storage.nbytes
            back += storage.nbytes if values[storage.name].requires_grad else 0
            saved.append(item)
            came.append(item)
        elif storage.kind == "activation":
            # The library holds on to what was sent, at which the backward pass begins.
            if number in every:
                saved.append(item)
                sent += [] if number in saving else [item]
        elif storage.kind in ("buffer", "input"):
            items.append(replace(item, category=f"{storage.kind}s"))
    if not is_last:
        gradients = sum(
            _local_nbytes(values[name], layout, sizes)
            for name, layout in zip(stage.gives, plan.outputs, strict=True)
            if values[name].requires_grad
        )
    returned = 0
    if is_last:
        returned = sum(
            _local_nbytes(values[name], layout, sizes)
            for name, layout in zip(stage.gives, plan.outputs, strict=True)
        )
    held_nbytes = sum(item.nbytes for item in saved) - received
    beyond = [
        max(int(alive.max(initial=0)), liveness.activations) - held_nbytes
        for alive in (liveness.forward, liveness.backward)
    ]
    return StageMemory(
        tuple(items),
        tuple(saved),
        tuple(sent),
        tuple(came),
        StageMessages(
            received,
            gradients,
            back,
            _between_halves(stage, sizes),
            *(max(nbytes, 0) for nbytes in beyond),
        ),
        returned,
        plan.parameters,
        _goes_back_in_halves(stage),
        tuple(walk.assumed),
    )


def _goes_back_in_halves(stage: Stage) -> bool:
    """Return whether a schedule can have a stage put off the gradients of weights."""
    sizes = (size for name, size in stage.plan.mesh.axes if name != MICROBATCH)
    return all(size == 1 for size in sizes) and joins_weights_once(stage)


def _between_halves(stage: Stage, sizes: tuple[int, ...]) -> int:
    """Return the bytes of gradients that are kept between the halves of a backward pass.

    They are those of what is made of weights and of what came in; a sum hands its gradient on to
    what it adds up. Stages of several ranks, and those that know no halves, go back at once.
    """
    graph, plan = stage.graph, stage.plan
    back = any(graph.values[name].requires_grad for name in stage.takes)
    if not (back and _goes_back_in_halves(stage)):
        return 0
    ops, _ = weights_met(stage)
    handed: set[str] = set()
    for node in graph.calls:
        rule = known_rule(OpCall.of(graph, node)) if node.name in ops else None
        for group in rule.linear if rule is not None else ():
            handed |= {node.operands()[place] for place in group} if len(group) > 1 else set()
    layouts = {op.name: op.results for op in plan.ops}
    return sum(
        _local_nbytes(value, layout, sizes)
        for node in graph.calls
        if node.name in ops
        for value, layout in zip(node.results, layouts[node.name], strict=True)
        if value.requires_grad and value.name not in handed
    )


def _local_nbytes(value: Value, layout: Layout, sizes: tuple[int, ...]) -> int:
    """Return the bytes of the part of a value that a rank holds."""
    shape = local_shape(tuple(map(hint, value.shape)), layout, sizes)
    return prod(shape) * value.dtype.itemsize


def memory_of_ranks(
    plan: Plan,
    stages: Sequence[StageMemory],
    order: Sequence[Sequence[Pass]],
    messages: Sequence[Sequence[Messages]],
) -> tuple[Account, ...]:
    """Return the memory of each place on the axis of stages, at the worst moment of a step.

    plan: with its pipeline. stages: as of `memory_of_stages`. order: the passes of each rank.
    messages: of these passes, as of `messages_of`.

    Example: `memory_of_ranks(plan, memory_of_stages(stages), order, messages)[0].activations`
    """
    assert plan.pipeline is not None
    count = plan.pipeline.microbatches
    accounts = []
    if not KEEPS_WHAT_IS_SENT and not sends_by_table(*_numbers_of(plan.pipeline)):
        stages = [stage.letting_go() for stage in stages]
    rank_of = plan.pipeline.rank_of
    stages = [
        stage.behind_its_own() if number and rank_of(number) == rank_of(number - 1) else stage
        for number, stage in enumerate(stages)
    ]
    sizes = [stage.messages for stage in stages]
    order = [
        [
            work if work.kind != INPUTS or stages[work.stage].in_halves
            else replace(work, kind=BACKWARD)
            for work in passes
        ]
        for passes in order
    ]  # fmt: skip
    for moment in held(order, [stage.activations for stage in stages], messages, sizes):
        own = [stages[number] for number, _ in moment.stages]
        items = [item for stage in own for item in stage.items]
        # Inputs of the model and buffers are there once, whatever stages read them.
        once = {(i.category, i.name): i for i in items if i.category in ("inputs", "buffers")}
        items = [i for i in items if (i.category, i.name) not in once] + list(once.values())
        for (number, batches), stage in zip(moment.stages, own, strict=True):
            items += [
                replace(item, where=item.where or f"stage {number}", nbytes=batches * item.nbytes)
                for item in stage.saved
                if batches
            ]
        rows = grouped(items)
        activations = sum(row.nbytes for row in rows if row.category == "activations")
        made = count * sum(stage.returned for stage in own)
        passes = made + int(moment.messages)
        # When all have gone back, every rank gets what is returned, of the whole batch; then it
        # reduces gradients.
        parameters = {row.name: row for stage in own for row in stage.parameters}
        after = max(made, reducing_nbytes(plan, list(parameters.values())))
        end = count * max(stage.returned for stage in stages) + after - activations
        assumed = tuple(name for stage in own for name in stage.assumed)
        temporary, where = max(passes, end, 0), _told(moment, plan.pipeline)
        accounts.append(account_of(rows, temporary, assumed, where))
    return tuple(accounts)


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
    numbers = _numbers_of(pipeline)
    return memory_of_ranks(plan, stages, schedule_order(*numbers), messages_of(*numbers))


def _numbers_of(pipeline: Pipeline) -> tuple[str, int, int, int]:
    """Return the arguments of `schedule_order`, and of what goes by it."""
    per_rank = pipeline.stages // pipeline.ranks
    return pipeline.schedule, pipeline.ranks, per_rank, pipeline.microbatches


def _told(moment: Held, pipeline: Pipeline) -> str:
    """Return the stages of a rank, and what it holds of each, in words."""
    each = [
        f"stage {stage} of {pipeline.stages}, with {batches} micro-batches in flight"
        for stage, batches in moment.stages
    ]
    return "; ".join(each)
