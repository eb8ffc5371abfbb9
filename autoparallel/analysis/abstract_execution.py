"""One rank's forward pass as the emitted program runs it, on tensors without data.

Every tensor is known by shape, strides and the storage that it lies in, so that the activations
saved for the backward pass, and the lifetimes of all others, can be read off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from autoparallel.analysis.observed_runs import ObservedRuns, Seen
from autoparallel.cost.fake_run import (
    FakeTensorSpec,
    contiguous,
)
from autoparallel.cost.saved_tensors import fitted, stand_in
from autoparallel.cost.stand_in_group import StandInGroup
from autoparallel.graph.graph import Graph, Node, Value, hint
from autoparallel.graph.part_sizes import local_shape
from autoparallel.placement import Layout, Movement, Shard, Step, whole_layout
from autoparallel.plan import Conversion, Plan
from autoparallel.plan.plan_cuts import cuts_of
from autoparallel.rewrite.conversions import begun_ahead, begun_steps
from autoparallel.rewrite.gaps import find_gaps
from autoparallel.runtime.recompute import cuts_are_alike

__all__ = ["AbstractExecution", "LocalTensor", "Moment", "Storage"]


@dataclass(slots=True)
class Storage:
    """Memory that one or several tensors lie in.

    name: of the value that it was allocated for. where: in the model. kind: "parameter", "buffer",
    "input", "received" from other ranks, or "activation". nbytes: its size. born, read: the moments
    at which it is allocated and last read, -1 where it is never read. savers: the moments whose
    backward needs it. remade: the numbers of the storages that it is recomputed from in the
    backward pass, if it is dropped after the forward pass; empty if it is not.
    """

    name: str
    where: str
    kind: str
    nbytes: int
    born: int
    remade: tuple[int, ...] = ()
    read: int = -1
    savers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One tensor of a rank.

    spec: its shape, strides and element type. storage: the number of the storage that it lies in.
    gradient: bytes of its gradient, if that has memory of its own, else 0 (the gradient of a view
    is a view).
    """

    spec: FakeTensorSpec
    storage: int
    gradient: int


@dataclass(frozen=True, slots=True)
class Moment:
    """A call, or one step of a redistribution.

    node: the call's name, empty for a redistribution. region: the number of the recomputed region
    that it belongs to, -1 if it is not run again in the backward pass. reads, makes: numbers of
    tensors. forward, backward: bytes that it needs in either pass besides the tensors that it reads
    and makes. filled: of a product, the redistribution during whose backward the gradient of its
    weight is computed, so that the first operand and the result's gradient are kept until then; -1
    where that is computed at once.
    """

    node: str
    region: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    forward: int = 0
    backward: int = 0
    filled: int = -1


class AbstractExecution:
    """The forward pass of the first rank, which has the largest part of every tensor.

    graph: with the sizes to execute for, as hints. plan: of that graph. recomputed: regions, as
    names of calls, that run again in the backward pass. received: layouts of inputs that other
    ranks have computed. seen: what calls on the same mesh save, as it was seen before; it is added
    to. remade: names of calls whose results are made again one by one. storages, locals, moments:
    in the order in which the program makes them; their numbers are places in these lists. returned,
    written: numbers of the tensors that the caller gets, and that buffers become. assumed: names of
    calls that could not be run, and are taken to save all that they read and make. ahead: numbers
    of the storages that are gathered again ahead of their use, with their distances (see
    `Conversion`), in the order in which the program first reads them.

    Example: `AbstractExecution(graph, plan, plan.recomputed, remade=plan.remade).storages`
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        recomputed: Sequence[Iterable[str]] = (),
        received: Mapping[str, Layout] | None = None,
        seen: Seen | None = None,
        remade: Iterable[str] = (),
    ) -> None:
        self._remade = frozenset(remade)
        self.graph, self.received = graph, received or {}
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        self.whole = whole_layout(len(self.sizes))
        # Inputs of a whole model are data; those of a traced part come from other parts, and may
        # need gradients.
        self.part = plan.captured is not None and plan.captured.part
        self.storages: list[Storage] = []
        self.locals: list[LocalTensor] = []
        self.moments: list[Moment] = []
        self.assumed: list[str] = []
        self.ahead: list[tuple[int, int]] = []
        self._begins = begun_ahead(plan)
        # The moment of each gap's redistribution, as it was made last.
        self._gaps, self._gap_moments = find_gaps(plan), dict[int, int]()
        self._begun: dict[tuple[str, tuple[Step, ...], str], int] = {}
        self._regions = {name: at for at, names in enumerate(recomputed) for name in names}
        # The region under way, and the values that have been made in it.
        self._inside: tuple[int, set[str]] = (-1, set())
        # The number of each value's tensor and its layout, and those of its redistributed copies by
        # their steps and the scope that may read them.
        self._at: dict[str, int] = {}
        self._converted: dict[tuple[str, tuple[Step, ...], str], int] = {}
        self._layouts: dict[str, Layout] = {}
        self._routes = {(item.value, item.target): item for item in plan.conversions}
        self._drops = any(item.again for item in plan.conversions) and self._parts_are_alike(plan)
        self._observed = ObservedRuns(graph, plan, {} if seen is None else seen)
        self._specs: dict[Any, FakeTensorSpec] = {}
        self._choices = {op.name: op for op in plan.ops}
        self._storage = plan.storage
        for node in graph.nodes:
            if node.kind == "call":
                self._call(node)
            else:
                self._given(node)
        self.returned = tuple(
            self._read(name, layout, -1)
            for name, layout in zip(graph.outputs, plan.outputs, strict=True)
        )
        self.written = tuple(self._read(name, self.whole, -1) for _, name in graph.mutations)
        # The caller holds these to the end of the forward pass.
        for number in (*self.returned, *self.written):
            self.storages[self.locals[number].storage].read = len(self.moments)

    def _parts_are_alike(self, plan: Plan) -> bool:
        """Return whether the program drops copies: it drops none where its ranks would make
        different ones again.
        """
        cuts = dict.fromkeys((hint(size), *splits) for size, splits in cuts_of(self.graph, plan))
        return cuts_are_alike(self.sizes, cuts)

    def _fake_spec(self, value: Value, layout: Layout) -> FakeTensorSpec:
        """Return the part of a value that the rank holds, with its elements in order."""
        # The name plays no part: equal blocks share these.
        key = (value.shape, value.dtype, value.requires_grad, layout)
        if key not in self._specs:
            whole = stand_in(value)
            shape = local_shape(whole.shape, layout, self.sizes)
            self._specs[key] = contiguous(shape, whole.dtype, whole.requires_grad)
        return self._specs[key]

    def _given(self, node: Node) -> None:
        """Add a tensor that is there before the program starts: a parameter, buffer or input."""
        value = node.result
        layout = self._storage.get(node.target, self.whole)
        layout = layout if node.kind == "parameter" else self.received.get(value.name, self.whole)
        spec = self._fake_spec(value, layout)
        if node.kind == "input" and not self.part and value.name not in self.received:
            spec = replace(spec, requires_grad=False)
        kind = "buffer" if node.kind == "constant" else node.kind
        kind = "received" if value.name in self.received else kind
        storage = self._new(node.target if kind == "parameter" else value.name, "", kind, spec)
        self._at[value.name] = self._put(spec, storage, 0)
        self._layouts[value.name] = layout

    def _new(self, name: str, where: str, kind: str, size: FakeTensorSpec | int) -> int:
        """Add a storage of so many bytes, or of the size of a tensor, and return its number."""
        number = len(self.storages)
        nbytes = size if isinstance(size, int) else size.nbytes
        self.storages.append(Storage(name, where, kind, nbytes, len(self.moments)))
        return number

    def _put(self, spec: FakeTensorSpec, storage: int, gradient: int) -> int:
        """Add a tensor that lies in a storage, and return its number."""
        self.locals.append(LocalTensor(spec, storage, gradient if spec.requires_grad else 0))
        return len(self.locals) - 1

    def _read(self, name: str, layout: Layout, region: int) -> int:
        """Return the tensor of a value as `layout`, redistributed step by step where it is not
        there yet.

        region: that of the reader.
        """
        number, here = self._at[name], self._layouts[name]
        if here == layout:
            return number
        conversion = self._routes.get((name, layout))
        ends = enumerate(zip(here, layout, strict=True))
        steps = tuple(
            Step(axis, source, target) for axis, (source, target) in ends if source != target
        )
        steps = steps if conversion is None else conversion.steps
        again = conversion is not None and conversion.again
        scope, region = self._scope(name, again, region)
        first = self.locals[number].storage
        for count, step in enumerate(steps):
            key = (name, steps[: count + 1], scope)
            if key not in self._converted:
                if key in self._begun:
                    copy = self._end(self._begun[key], region)
                else:
                    copy = self._step(self.graph.values[name], number, here, key[1], region)
                self._converted[key] = copy
                storage = self.locals[copy].storage
                if again and self._drops and storage != first:
                    self.storages[storage].remade = (first,)
                    distance = conversion.distance if conversion is not None else 0
                    if distance and key in self._begun:
                        self.ahead.append((storage, distance))
            number, here = self._converted[key], step.applied(here)
        assert here == layout, (name, here, layout)
        return number

    def _begin(self, conversion: Conversion) -> None:
        """Begin a conversion that is ended where its copy is first read."""
        name, steps = conversion.value, conversion.steps
        reader = next(reader for reader in conversion.readers if reader in self._choices)
        scope, region = self._scope(name, conversion.again, self._regions.get(reader, -1))
        number, here = self._at[name], self._layouts[name]
        count = begun_steps(steps)
        for at, step in enumerate(steps[:count], 1):
            key = (name, steps[:at], scope)
            there = self._converted if at < count else self._begun
            if key not in self._converted and key not in there:
                there[key] = self._step(
                    self.graph.values[name], number, here, key[1], region, begun=at == count
                )
            number, here = there.get(key, -1), step.applied(here)

    def _end(self, copy: int, region: int) -> int:
        """Add the end of a move that has begun, and return the number of its result: backward, the
        gradient's move begins there.
        """
        nbytes = self.locals[copy].spec.nbytes
        self.storages[self.locals[copy].storage].read = len(self.moments)
        self.moments.append(Moment("", region, (copy,), (), nbytes, nbytes))
        return copy

    def _scope(self, name: str, again: bool, region: int) -> tuple[str, int]:
        """Return a name for the readers that share a redistribution, and the region that it belongs
        to.

        A copy that is dropped and recomputed is made for each region; a value that only one region
        reads is redistributed in it; any other before it, for all.
        """
        if region == -1:
            return ("again" if again else ""), -1
        if again:
            return f"region {region}", region
        if self._inside[0] == region and name in self._inside[1]:
            return "", region
        graph = self.graph
        alone = all(self._regions.get(reader.name) == region for reader in graph.readers[name])
        if alone and name not in graph.outputs:
            return f"region {region}", region
        return "", -1

    def _step(
        self,
        value: Value,
        number: int,
        here: Layout,
        steps: tuple[Step, ...],
        region: int,
        begun: bool = False,
    ) -> int:
        """Add one move on one axis, and return the number of its result.

        number, here: the tensor and its layout. steps: of its redistribution up to this move.
        region: that of the redistribution. begun: the move is ended later, where what came is
        unpacked.
        """
        step = steps[-1]
        local, there = self.locals[number], step.applied(here)
        axis, source = step.axis, step.source
        grad = local.spec.requires_grad
        expected = self._fake_spec(value, there)
        if expected.requires_grad != grad:
            expected = replace(expected, requires_grad=grad)
        kind = step.forward
        # On all ranks but the first, zeros take the place of the value: the second rank's program
        # is the larger one, so it is the one to run.
        group = StandInGroup(self.sizes[axis], int(kind is Movement.KEEP_ON_FIRST))
        size = 0
        if isinstance(source, Shard):
            whole = tuple(map(hint, value.shape))
            size = local_shape(whole, here, self.sizes, without=axis)[source.dim]
        seen = self._observed.move(value, local.spec, expected, group, step, size)
        is_copy = seen.storages[0] >= 1
        storage = local.storage
        if is_copy:
            storage = self._new(value.name, "", "activation", seen.size(seen.storages[0]))
        # Collectives pack what they send and unpack what they get: one more tensor for that moment.
        buffer = 0
        if begun:
            pass
        elif kind is Movement.ALL_GATHER:
            buffer = expected.nbytes
        elif kind in (Movement.REDUCE_SCATTER, Movement.ALL_TO_ALL):
            buffer = local.spec.nbytes
        result = fitted(replace(seen.results[0], requires_grad=grad), expected)
        self.storages[local.storage].read = len(self.moments)
        has_own_gradient = step.backward is not Movement.NONE
        moved = self._put(result, storage, result.nbytes if has_own_gradient else 0)
        if gap := self._gaps.conversions.get((value.name, steps)):
            self._gap_moments[gap] = len(self.moments)
        self.moments.append(Moment("", region, (number,), (moved,), buffer, buffer))
        return moved

    def _call(self, node: Node) -> None:
        """Add a call: its operands as the plan redistributes them, and its results."""
        choice = self._choices[node.name]
        region = self._regions.get(node.name, -1)
        if self._inside[0] != region:
            self._inside = (region, set())
        for conversion in self._begins.get(node.name, ()):
            self._begin(conversion)
        reads = tuple(
            self._read(name, layout, region)
            for name, layout in zip(node.operands(), choice.operands, strict=True)
        )
        operands = tuple(self.locals[number].spec for number in reads)
        expected = tuple(map(self._fake_spec, node.results, choice.results))
        seen = self._observed.call(node, choice, operands, expected)
        if seen.assumed:
            self.assumed.append(node.name)
        now = len(self.moments)
        # `seen` counts storages from 0: first those of the operands, then the new ones.
        storage_numbers: list[int] = [self.locals[number].storage for number in reads]
        for index in storage_numbers:
            self.storages[index].read = now
        for size in seen.sizes:
            storage_numbers.append(self._new(node.name, node.where, "activation", size))
        for index in seen.saved:
            self.storages[storage_numbers[index]].savers.append(now)
        makes = []
        for value, layout, observed, expected_result, index in zip(
            node.results, choice.results, seen.results, expected, seen.storages, strict=True
        ):
            result = fitted(observed, expected_result)
            storage = self.storages[storage_numbers[index]]
            if index >= len(reads):
                storage.name = value.name
                # What the op's own backward pass saves stays.
                if node.name in self._remade and index not in seen.saved:
                    storage.remade = tuple(dict.fromkeys(storage_numbers[: len(reads)]))
                storage.nbytes = (
                    storage.nbytes
                    if observed.shape == expected_result.shape
                    else expected_result.nbytes
                )
            gradient = result.nbytes
            # A view of an operand with all of its elements: its gradient is the operand's, seen
            # otherwise.
            if index < len(reads) and prod(operands[index].shape) == prod(expected_result.shape):
                gradient = 0
            makes.append(self._put(result, storage_numbers[index], gradient))
            self._at[value.name], self._layouts[value.name] = makes[-1], layout
            self._inside[1].add(value.name)
        filled = self._gap_moments.get(self._gaps.products.get(node.name, 0), -1)
        backward = seen.backward
        self.moments.append(Moment(node.name, region, reads, tuple(makes), 0, backward, filled))
