"""One rank's forward pass as the emitted program runs it, on tensors without data.

Every tensor is known by shape, strides and the storage that it lies in, so that what is kept for
the backward pass, and how long the rest lives, can be read off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

from autoparallel.cost.fake_run import (
    FakeTensorSpec,
    Observed,
    StandInGroup,
    contiguous,
    observe,
    random_arguments,
    runner,
    skeleton,
)
from autoparallel.cost.saved_tensors import fitted, stand_in
from autoparallel.graph.graph import Graph, Node, Ref, Value, hint
from autoparallel.graph.part_sizes import local_shape
from autoparallel.placement import Layout, Movement, Shard, Step, whole_layout
from autoparallel.plan import OpChoice, Plan
from autoparallel.rules.registry import known_rule
from autoparallel.rules.rule import Kernel, OpCall, ShardingRule
from autoparallel.runtime.collectives import move

__all__ = ["AbstractExecution", "LocalTensor", "Moment", "Storage"]


@dataclass(slots=True)
class Storage:
    """Memory that one or several tensors lie in.

    name: of the value that it was made for. where: in the model. kind: "parameter", "buffer",
    "input" or "activation". born, read: the moments at which it is made and last read. savers: the
    moments whose backward needs it. remade: the storage that it is made of once more in the
    backward pass, if it is dropped after the forward pass; its own number if it is not.
    """

    name: str
    where: str
    kind: str
    nbytes: int
    born: int
    remade: int
    read: int = -1
    savers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One tensor of a rank. storage: its number. gradient: bytes of its gradient, if it has its
    own (that of a view is a view)."""

    stand: FakeTensorSpec
    storage: int
    gradient: int


@dataclass(frozen=True, slots=True)
class Moment:
    """A call or one step of a conversion.

    node: the call's name, empty for a conversion. region: number of the ops that are run again in
    the backward pass and that it belongs to, -1 if it is not run again. reads, makes: tensors, by
    number. forward, backward: bytes that it needs in either pass besides what it reads and makes.
    """

    node: str
    region: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    forward: int = 0
    backward: int = 0


class AbstractExecution:
    """The forward pass of the first rank, which has the largest part of everything.

    storages, locals, moments: in the order in which they come. returned: tensors that the caller
    gets. assumed: calls that could not be run, and count as keeping all that they read and make.
    """

    def __init__(self, graph: Graph, plan: Plan, recomputed: Sequence[Iterable[str]] = ()) -> None:
        self.graph = graph
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        self.whole = whole_layout(len(self.sizes))
        # Inputs of a whole model are data; what goes into a part comes from other parts.
        self.part = plan.captured is not None and plan.captured.part
        self.storages: list[Storage] = []
        self.locals: list[LocalTensor] = []
        self.moments: list[Moment] = []
        self.assumed: list[str] = []
        self._regions = {name: at for at, names in enumerate(recomputed) for name in names}
        self._inside: tuple[int, set[str]] = (-1, set())
        self._at: dict[str, int] = {}
        self._converted: dict[tuple[str, tuple[Step, ...], str], int] = {}
        self._made: dict[str, Layout] = {}
        self._routes = {(item.value, item.target): item for item in plan.conversions}
        self._seen: dict[Any, Observed] = {}
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
        for number in (*self.returned, *self.written):
            self.storages[self.locals[number].storage].read = len(self.moments)

    def _fake_spec(self, value: Value, layout: Layout) -> FakeTensorSpec:
        """The part of a value that the rank holds, with its elements in order."""
        key = (value.shape, value.dtype, value.requires_grad, layout)
        if key not in self._specs:
            whole = stand_in(value)
            shape = local_shape(whole.shape, layout, self.sizes)
            self._specs[key] = contiguous(shape, whole.dtype, whole.requires_grad)
        return self._specs[key]

    def _given(self, node: Node) -> None:
        """A tensor that is there before the program starts."""
        value = node.result
        layout = self._storage.get(node.target, self.whole)
        layout = layout if node.kind == "parameter" else self.whole
        stand = self._fake_spec(value, layout)
        if node.kind == "input" and not self.part:
            stand = replace(stand, requires_grad=False)
        kind = "buffer" if node.kind == "constant" else node.kind
        storage = self._new(node.target if kind == "parameter" else value.name, "", kind, stand)
        self._at[value.name] = self._put(stand, storage, 0)
        self._made[value.name] = layout

    def _new(self, name: str, where: str, kind: str, size: FakeTensorSpec | int) -> int:
        number = len(self.storages)
        nbytes = size if isinstance(size, int) else size.nbytes
        self.storages.append(Storage(name, where, kind, nbytes, len(self.moments), number))
        return number

    def _put(self, stand: FakeTensorSpec, storage: int, gradient: int) -> int:
        self.locals.append(LocalTensor(stand, storage, gradient if stand.requires_grad else 0))
        return len(self.locals) - 1

    def _read(self, name: str, layout: Layout, region: int) -> int:
        """The tensor of a value as `layout`, converted step by step where it is not there yet."""
        number, here = self._at[name], self._made[name]
        if here == layout:
            return number
        conversion = self._routes.get((name, layout))
        ends = enumerate(zip(here, layout, strict=True))
        steps = tuple(Step(axis, one, two) for axis, (one, two) in ends if one != two)
        steps = steps if conversion is None else conversion.steps
        again = conversion is not None and conversion.again
        scope, region = self._scope(name, again, region)
        first = self.locals[number].storage
        for count, step in enumerate(steps):
            key = (name, steps[: count + 1], scope)
            if key not in self._converted:
                made = self._step(self.graph.values[name], number, here, step, region)
                self._converted[key] = made
                storage = self.locals[made].storage
                if again and storage != first:
                    self.storages[storage].remade = first
            number, here = self._converted[key], step.applied(here)
        assert here == layout, (name, here, layout)
        return number

    def _scope(self, name: str, again: bool, region: int) -> tuple[str, int]:
        """Who may read a conversion that is made now, and the region that it belongs to.

        What is dropped and made again is made for each region; a value that only one region reads
        is converted in it; any other before it, for all.
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

    def _step(self, value: Value, number: int, here: Layout, step: Step, region: int) -> int:
        """One move on one axis."""
        local, there = self.locals[number], step.applied(here)
        axis, source, target = step.axis, step.source, step.target
        grad = local.stand.requires_grad
        expected = self._fake_spec(value, there)
        if expected.requires_grad != grad:
            expected = replace(expected, requires_grad=grad)
        kind = step.forward
        # Zeros take the place of the value on all ranks but the first.
        group = StandInGroup(self.sizes[axis], int(kind is Movement.KEEP_ON_FIRST))
        size = 0
        if isinstance(source, Shard):
            whole = tuple(map(hint, value.shape))
            size = local_shape(whole, here, self.sizes, without=axis)[source.dim]
        key = ("move", local.stand, group.world_size, source, target, size)
        if key not in self._seen:
            run = Movement.NONE if group.world_size == 1 else kind
            self._seen[key] = observe(
                lambda x: x if run is Movement.NONE else move(x, group, source, target, size),
                (Ref(value.name),),
                {},
                [local.stand],
                [expected],
                ("meta", "zeros"),
            )
        seen = self._seen[key]
        own = seen.storages[0] >= 1
        storage = local.storage
        if own:
            storage = self._new(value.name, "", "activation", seen.size(seen.storages[0]))
        buffer = 0
        if kind is Movement.ALL_GATHER:
            buffer = expected.nbytes
        elif kind in (Movement.REDUCE_SCATTER, Movement.ALL_TO_ALL):
            buffer = local.stand.nbytes
        stand = fitted(replace(seen.results[0], requires_grad=grad), expected)
        self.storages[local.storage].read = len(self.moments)
        apart = own or step.backward is not Movement.NONE
        made = self._put(stand, storage, stand.nbytes if apart else 0)
        self.moments.append(Moment("", region, (number,), (made,), buffer, buffer))
        return made

    def _call(self, node: Node) -> None:
        choice = self._choices[node.name]
        region = self._regions.get(node.name, -1)
        if self._inside[0] != region:
            self._inside = (region, set())
        reads = tuple(
            self._read(name, layout, region)
            for name, layout in zip(node.operands(), choice.operands, strict=True)
        )
        stands = tuple(self.locals[number].stand for number in reads)
        expected = tuple(map(self._fake_spec, node.results, choice.results))
        seen = self._observed(node, choice, stands, expected)
        if seen.assumed:
            self.assumed.append(node.name)
        now = len(self.moments)
        of: list[int] = [self.locals[number].storage for number in reads]
        for index in of:
            self.storages[index].read = now
        for size in seen.sizes:
            of.append(self._new(node.name, node.where, "activation", size))
        for index in seen.saved:
            self.storages[of[index]].savers.append(now)
        makes = []
        for value, layout, made, own, index in zip(
            node.results, choice.results, seen.results, expected, seen.storages, strict=True
        ):
            stand = fitted(made, own)
            storage = self.storages[of[index]]
            if index >= len(reads):
                storage.name = value.name
                storage.nbytes = storage.nbytes if made.shape == own.shape else own.nbytes
            gradient = stand.nbytes
            if index < len(reads) and prod(stands[index].shape) == prod(own.shape):
                gradient = 0
            makes.append(self._put(stand, of[index], gradient))
            self._at[value.name], self._made[value.name] = makes[-1], layout
            self._inside[1].add(value.name)
        moment = Moment(node.name, region, reads, tuple(makes), backward=seen.backward)
        self.moments.append(moment)

    def _observed(
        self,
        node: Node,
        choice: OpChoice,
        stands: tuple[FakeTensorSpec, ...],
        expected: tuple[FakeTensorSpec, ...],
    ) -> Observed:
        """The call on this rank's parts; calls that run alike are run once."""
        split = choice.operands if any(choice.kernels) else ()
        written = (skeleton(node.args), skeleton(node.kwargs))
        key = (node.target, written, stands, expected, choice.kernels, split)
        if key in self._seen:
            return self._seen[key]
        call = OpCall.of(self.graph, node)
        rule = known_rule(call)
        args, kwargs = node.args, dict(node.kwargs)
        shards = any(isinstance(item, Shard) for layout in choice.results for item in layout)
        if rule is not None and rule.local_args is not None and shards:
            args = rule.local_args(call, tuple(stand.shape for stand in expected))
        if any(choice.kernels):
            assert rule is not None
            function = self._kernels(call, rule, choice)
            seen = observe(
                function, args, kwargs, stands, expected, ("meta", "zeros"), backward=True
            )
        else:
            if rule is not None and rule.random:
                kwargs |= random_arguments(expected[0].shape)
            function = runner(node.target, rule.random if rule is not None else "")
            seen = observe(function, args, kwargs, stands, expected, backward=True)
        self._seen[key] = seen
        return seen

    def _kernels(self, call: OpCall, rule: ShardingRule, choice: OpChoice) -> Callable[..., Any]:
        """The kernels of a call: of several, those that run the op itself run the next one."""
        found: list[tuple[Kernel, dict[str, Any]]] = []
        for axis, name in enumerate(choice.kernels):
            if name:
                kernel, size = self._kernel(call, rule, choice, axis)
                group = StandInGroup(self.sizes[axis])
                found.append((kernel, {"group": group, "size": size, **dict(kernel.arguments)}))
        run: Callable[..., Any] | None = None
        for kernel, options in sorted(found, key=lambda item: item[0].wraps):
            inner = {} if run is None else {"run": run}
            run = partial(runner(call.node.target, kernel=kernel.name), **options, **inner)
        assert run is not None
        return run

    def _kernel(
        self, call: OpCall, rule: ShardingRule, choice: OpChoice, axis: int
    ) -> tuple[Kernel, int]:
        """The kernel that splits a loop on an axis, and the loop's size without that split."""
        name = choice.kernels[axis]
        for value, dims, layout in zip(call.operands, rule.operands, choice.operands, strict=True):
            shard = layout[axis]
            for loop in dims[shard.dim] if isinstance(shard, Shard) else ():
                if loop in rule.kernels and rule.kernels[loop].name == name:
                    assert isinstance(shard, Shard)
                    whole = tuple(hint(size) for size in value.shape)
                    shape = local_shape(whole, layout, self.sizes, without=axis)
                    return rule.kernels[loop], shape[shard.dim]
        raise AssertionError(f"{call.node.name}: a kernel without a split operand")
