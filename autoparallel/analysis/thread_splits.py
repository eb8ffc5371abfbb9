"""The threads that a plan splits, and the synchronizations that follow from them.

A plan chooses, for every op and mesh axis, a loop to split, or none. How every tensor then lies
follows from the threads, and where what one op makes does not lie as the next one needs it, the
ranks must talk. Nothing else is read off the plan here: neither its redistributions, nor how many
there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import repeat

from autoparallel.analysis.communication import late_axes
from autoparallel.analysis.synchronization import (
    Cause,
    Cut,
    State,
    Synchronization,
    ThreadSplits,
)
from autoparallel.graph.graph import Graph, hint
from autoparallel.placement import (
    Collective,
    Invariant,
    Layout,
    Movement,
    Partial,
    Placement,
    Replicate,
    Shard,
    gradient,
    movement,
)
from autoparallel.plan import OpChoice, Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.threads import Passage, Threads

__all__ = ["thread_splits"]


def thread_splits(plan: Plan) -> ThreadSplits:
    """Return which threads a plan splits, and the synchronizations that follow from that alone.

    Raises PlanError for a plan without its graph, and for one in parts, of which each part
    has its own (`plan.parts`).

    >>> import torch, autoparallel
    >>> layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
    >>> plan = autoparallel.make_plan(
    ...     layers, 2, example_inputs=torch.ones(8, 64), sequence_parallel=False
    ... )
    >>> splits = thread_splits(plan)
    >>> [splits.sentence(one) for one in splits.synchronizations]
    ['all-reduce of linear_1_product: feed-forward ends in a sum, of which each rank has a term']
    """
    require_kind(plan, Plan, MAKE_ONE)
    threads = plan.threads()
    return _Reading(plan, threads, threads.graph).splits()


class _Reading:
    """A reading of a plan's choices as splits of threads."""

    def __init__(self, plan: Plan, threads: Threads, graph: Graph) -> None:
        self.plan, self.threads, self.graph = plan, threads, graph
        self.axes = range(len(plan.mesh.axes))
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        whole: tuple[State, ...] = tuple(Invariant() for _ in self.axes)
        self.made: dict[str, tuple[State, ...]] = dict.fromkeys(graph.values, whole)
        self.read: dict[str, tuple[tuple[State, ...], ...]] = {}
        self.passages: dict[str, tuple[Passage | None, ...]] = {}
        self.makers = {value: op.name for op in plan.ops for value in op.makes}

    def splits(self) -> ThreadSplits:
        """Return the states of all values, and the synchronizations between them."""
        for parameter in self.plan.parameters:
            if parameter.name in self.made:
                self.made[parameter.name] = self.held(parameter.name, parameter.storage)
        for op in self.plan.ops:
            columns = [self.op_states(op, axis) for axis in self.axes]
            self.passages[op.name] = tuple(passage for passage, _, _ in columns)
            self.read[op.name] = tuple(
                tuple(states[position] for _, states, _ in columns)
                for position in range(len(op.reads))
            )
            for position, value in enumerate(op.makes):
                self.made[value] = tuple(states[position] for _, _, states in columns)
        return ThreadSplits(
            self.plan,
            self.threads,
            self.made,
            self.read,
            self.passages,
            tuple(self.synchronizations()),
        )

    def held(self, value: str, layout: Layout) -> tuple[State, ...]:
        """Return how a value lies that a layout says it for: a parameter, or what is returned."""
        return tuple(
            self.cut(value, placement, self.sizes[axis])
            if isinstance(placement, Shard)
            else placement
            for axis, placement in enumerate(layout)
        )

    def cut(self, value: str, shard: Shard, ranks: int) -> Cut:
        """Return the thread that a shard of a value cuts, and how."""
        row = self.threads.dims[value][shard.dim]
        blocks_of_dim, unit_of_dim = shard.blocks, shard.unit
        if not isinstance(blocks_of_dim, int) or not isinstance(unit_of_dim, int):
            return Cut(shard.dim, row[0] if row else -1, shard=shard)
        if shard.repeat != 1 or shard.pending:
            return Cut(shard.dim, row[0] if row else -1, shard=shard)
        sizes = [hint(self.threads.threads[number].size) for number in row]
        before = 1
        for at, (number, size) in enumerate(zip(row, sizes, strict=True)):
            last = at == len(row) - 1
            if blocks_of_dim % before == 0 and (blocks_of_dim < before * size or last):
                blocks = blocks_of_dim // before
                after = 1
                for inner in sizes[at + 1 :]:
                    after *= inner
                if unit_of_dim % after == 0:
                    return Cut(shard.dim, number, blocks, unit_of_dim // after)
                # A plain cut falls on the thread's bounds where these divide by the ranks.
                plain = blocks and (size // blocks) % ranks == 0
                return Cut(shard.dim, number, blocks, 1 if plain else -1)
            before *= size
        return Cut(shard.dim, row[0] if row else -1, blocks_of_dim, unit_of_dim)

    def op_states(
        self, op: OpChoice, axis: int
    ) -> tuple[Passage | None, tuple[State, ...], tuple[State, ...]]:
        """Return the loop that an op splits on an axis, how it needs its operands, and how it
        leaves its results.
        """
        tensors = (*op.reads, *op.makes)
        layouts = (*op.operands, *op.results)
        split: Passage | None = None
        for position, (value, layout) in enumerate(zip(tensors, layouts, strict=True)):
            shard = layout[axis]
            if not isinstance(shard, Shard):
                continue
            cut = self.cut(value, shard, self.sizes[axis])
            passage = self.passage(op, position, cut)
            split = split or passage
            if passage is not None and not any(map(_is_special, layouts, repeat(axis))):
                reads, makes = self.with_loop(op, passage, cut)
                states = zip(layouts, (*reads, *makes), strict=True)
                # Parts of unequal sizes, such as queries before keys and values, are cut at their
                # own bounds: more tensors are split than those that have the loop.
                if all(isinstance(lies[axis], Shard) == isinstance(s, Cut) for lies, s in states):
                    return passage, reads, makes
        # Nothing is split: a pending sum passes through, or its dual, or each rank does it all. Or
        # dims are split in blocks of several sizes, or held by several ranks, tensor by tensor.
        lie = [
            self.held(value, layout)[axis] for value, layout in zip(tensors, layouts, strict=True)
        ]
        count = len(op.reads)
        return split, tuple(lie[:count]), tuple(lie[count:])

    def passage(self, op: OpChoice, position: int, cut: Cut) -> Passage | None:
        """Return the passage of the loop that a cut of one of the op's tensors splits."""
        operands = position < len(op.reads)
        at = (position if operands else position - len(op.reads), cut.dim)
        for passage in self.threads.passages.get(op.name, ()):
            places = passage.operands if operands else passage.results
            if at in places and cut.thread in passage.threads:
                return passage
        return None

    def with_loop(
        self, op: OpChoice, passage: Passage, cut: Cut
    ) -> tuple[tuple[State, ...], tuple[State, ...]]:
        """Return how operands and results lie when a loop is split."""
        reads, makes = dict(passage.operands), dict(passage.results)

        def operand(position: int, value: str) -> State:
            if position in reads:
                return Cut(reads[position], cut.thread, cut.blocks, cut.unit)
            return Replicate() if self.graph.values[value].requires_grad else Invariant()

        def result(position: int) -> State:
            if position in makes:
                return Cut(makes[position], cut.thread, cut.blocks, cut.unit)
            return Partial() if passage.is_pending else Invariant()

        return (
            tuple(operand(position, value) for position, value in enumerate(op.reads)),
            tuple(result(position) for position in range(len(op.makes))),
        )

    # -- synchronizations

    def synchronizations(self) -> Iterator[Synchronization]:
        """Yield what must be synchronized between makers and readers, each once for all readers
        that need a value alike.
        """
        whole: tuple[State, ...] = tuple(Invariant() for _ in self.axes)
        wanted: dict[str, dict[tuple[State, ...], list[str]]] = {}
        for op in self.plan.ops:
            for value, states in zip(op.reads, self.read[op.name], strict=True):
                readers = wanted.setdefault(value, {}).setdefault(states, [])
                if op.name not in readers:
                    readers.append(op.name)
        for value, layout in zip(self.graph.outputs, self.plan.outputs, strict=True):
            states = self.held(value, layout)
            wanted.setdefault(value, {}).setdefault(states, []).append("return")
        for _, value in self.graph.mutations:
            wanted.setdefault(value, {}).setdefault(whole, []).append("return")
        for op in self.plan.ops:
            yield from self.inside(op)
        parameters = {parameter.name: parameter for parameter in self.plan.parameters}
        for value, by_states in wanted.items():
            late = late_axes(parameters.get(value))
            for states, readers in by_states.items():
                for axis in self.axes:
                    yield from self.between(value, axis, states[axis], tuple(readers), axis in late)
            for axis in late:
                if self.sizes[axis] > 1:
                    yield Synchronization(
                        value, axis, "update", Collective.ALL_GATHER, Cause.WHOLE,
                        None, None, "", ("optimizer",),
                    )  # fmt: skip

    def inside(self, op: OpChoice) -> Iterator[Synchronization]:
        """Yield what an op's kernels synchronize."""
        for axis, passage in enumerate(self.passages[op.name]):
            for collective in passage.collectives if passage and self.sizes[axis] > 1 else ():
                yield Synchronization(
                    op.makes[0], axis, "kernel", collective, Cause.KERNEL,
                    self.split_of(op.name, axis), None, op.name, (op.name,),
                )  # fmt: skip

    def between(
        self, value: str, axis: int, target: State, readers: tuple[str, ...], late: bool
    ) -> Iterator[Synchronization]:
        """Yield the synchronizations between the maker of a value and readers that need it so."""
        source = self.made[value][axis]
        if source == target or self.sizes[axis] == 1:
            return
        maker = self.makers.get(value, "")
        carried = source.thread if isinstance(source, Cut) else self.summed(maker, axis)
        wanted = target.thread if isinstance(target, Cut) else None
        ends = _placement(source), _placement(target)
        forward = _movement(*ends)
        if forward.collective is not None:
            yield Synchronization(
                value, axis, "forward", forward.collective, _cause(source, target),
                carried, wanted, maker, readers,
            )  # fmt: skip
        if not self.graph.values[value].requires_grad:
            return
        backward = _movement(gradient(ends[1]), gradient(ends[0]))
        collective = backward.collective
        together = value in self.stored and collective is Collective.ALL_REDUCE
        if collective is Collective.ALL_REDUCE and late:
            collective = Collective.REDUCE_SCATTER
        if collective is None:
            return
        if isinstance(target, Replicate):
            # The thread for whose parts the readers use the value.
            splits = (self.split_of(reader, axis) for reader in readers)
            cause, carried = Cause.SHARED, next((n for n in splits if n is not None), None)
        else:
            # The gradient goes the other way.
            cause, carried = _cause(target, source), wanted
        wanted = source.thread if isinstance(source, Cut) else None
        yield Synchronization(
            value, axis, "backward", collective, cause, carried, wanted, maker, readers, together
        )

    @cached_property
    def stored(self) -> frozenset[str]:
        """The parameters, whose gradients are needed at the end of the backward pass alone."""
        return frozenset(n.result.name for n in self.graph.nodes if n.kind == "parameter")

    def summed(self, maker: str, axis: int) -> int | None:
        """Return the thread whose split has left a pending sum, followed back through the ops that
        it passes.
        """
        while maker:
            split = self.split_of(maker, axis)
            if split is not None:
                return split
            op = self.ops[maker]
            maker = next(
                (
                    self.makers.get(value, "")
                    for value, states in zip(op.reads, self.read[maker], strict=True)
                    if isinstance(states[axis], Partial)
                ),
                "",
            )
        return None

    def split_of(self, op: str, axis: int) -> int | None:
        """Return the number of the thread that an op splits on an axis."""
        passages = self.passages.get(op)
        passage = passages[axis] if passages else None
        if passage is None:
            return None
        states = (*self.read[op], *(self.made[value] for value in self.ops[op].makes))
        return next((cut.thread for one in states if isinstance(cut := one[axis], Cut)), None)

    @cached_property
    def ops(self) -> Mapping[str, OpChoice]:
        """The plan's ops, by name."""
        return {op.name: op for op in self.plan.ops}


def _is_special(layout: Layout, axis: int) -> bool:
    """Return whether a tensor is split on an axis in a way that no single thread says."""
    shard = layout[axis]
    if not isinstance(shard, Shard):
        return False
    return shard.repeat != 1 or shard.pending or not isinstance(shard.blocks, int)


def _placement(state: State) -> Placement:
    """Return a placement of the state's kind: what the table of moves looks at."""
    return (state.shard or Shard(state.dim)) if isinstance(state, Cut) else state


def _movement(source: Placement, target: Placement) -> Movement:
    """Return the move between two states that differ; cuts of one dim differ in how they cut."""
    if source == target:
        return Movement.ALL_TO_ALL
    return movement(source, target)


def _cause(source: State, target: State) -> Cause:
    """Return why what lies as `source` must be moved to lie as `target`."""
    if isinstance(source, Partial):
        return Cause.SUM
    return Cause.CONFLICT if isinstance(target, Cut) else Cause.WHOLE
