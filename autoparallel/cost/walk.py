"""One rank's forward pass as the emitted program runs it, on tensors without data.

Every tensor is known by shape, strides and the storage that it lies in, so that what is kept for
the backward pass, and how long the rest lives, can be read off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from autoparallel.cost.observe import (
    Observed,
    Stand,
    StandInGroup,
    contiguous,
    observe,
    random_arguments,
    runner,
    skeleton,
)
from autoparallel.cost.saved import fitted, stand_in
from autoparallel.graph.graph import Graph, Node, Ref, Value, hint
from autoparallel.placement import Invariant, Movement, Placement, Shard, local_size, movement
from autoparallel.plan import Plan
from autoparallel.rules.registry import known_rule
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.runtime.collectives import move

__all__ = ["Local", "Moment", "Storage", "Walk", "local_shape"]

Layout = tuple[Placement, ...]


def local_shape(
    shape: tuple[int, ...], layout: Layout, sizes: tuple[int, ...], without: int = -1
) -> tuple[int, ...]:
    """Shape of the largest rank's part. sizes: of the mesh axes. without: an axis not to split."""
    found = list(shape)
    for axis, placement in enumerate(layout):
        if isinstance(placement, Shard) and axis != without:
            found[placement.dim] = local_size(found[placement.dim], placement, sizes[axis])
    return tuple(found)


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
class Local:
    """One tensor of a rank. storage: its number. gradient: bytes of its gradient, if it has its
    own (that of a view is a view)."""

    stand: Stand
    storage: int
    gradient: int


@dataclass(frozen=True, slots=True)
class Moment:
    """A call or one step of a conversion.

    node: the call's name, empty for a conversion. value: what is converted, empty for a call.
    reads, makes: tensors, by number. buffer: bytes that a collective needs besides what it reads
    and makes.
    """

    node: str
    value: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    buffer: int = 0


class Walk:
    """The forward pass of the first rank, which has the largest part of everything.

    storages, locals, moments: in the order in which they come. returned: tensors that the caller
    gets. assumed: calls that could not be run, and count as keeping all that they read and make.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.graph = graph
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        self.whole: Layout = (Invariant(),) * len(self.sizes)
        # Inputs of a whole model are data; what goes into a part comes from other parts.
        self.part = plan.captured is not None and plan.captured.part
        self.storages: list[Storage] = []
        self.locals: list[Local] = []
        self.moments: list[Moment] = []
        self.assumed: list[str] = []
        self._at: dict[tuple[str, Layout], int] = {}
        self._made: dict[str, Layout] = {}
        self._routes = {
            (conversion.value, self.layout(conversion.target)): conversion
            for conversion in plan.conversions
        }
        self._seen: dict[Any, Observed] = {}
        self._rules: dict[Any, ShardingRule | None] = {}
        self._choices = {op.name: op for op in plan.ops}
        self._storage = {p.path: self.layout(p.storage) for p in plan.parameters}
        for node in graph.nodes:
            if node.kind == "call":
                self._call(node)
            else:
                self._given(node)
        outputs = [self.layout(item) for item in plan.outputs]
        self.returned = tuple(
            self._read(name, layout) for name, layout in zip(graph.outputs, outputs, strict=True)
        )
        self.written = tuple(self._read(name, self.whole) for _, name in graph.mutations)
        for number in (*self.returned, *self.written):
            self.storages[self.locals[number].storage].read = len(self.moments)

    def layout(self, placed: Any) -> Layout:
        """A layout as the plan has it."""
        return placed if isinstance(placed, tuple) else (placed,)

    def _given(self, node: Node) -> None:
        """A tensor that is there before the program starts."""
        value = node.result
        layout = self._storage.get(node.target, self.whole)
        layout = layout if node.kind == "parameter" else self.whole
        whole = stand_in(value)
        shape = local_shape(whole.shape, layout, self.sizes)
        grad = whole.requires_grad and (node.kind != "input" or self.part)
        stand = contiguous(shape, whole.dtype, grad)
        kind = "buffer" if node.kind == "constant" else node.kind
        storage = self._new(node.target if kind == "parameter" else value.name, "", kind, stand)
        self._put(value.name, layout, stand, storage, 0)
        self._made[value.name] = layout

    def _new(self, name: str, where: str, kind: str, size: Stand | int) -> int:
        number = len(self.storages)
        nbytes = size if isinstance(size, int) else size.nbytes
        self.storages.append(Storage(name, where, kind, nbytes, len(self.moments), number))
        return number

    def _put(self, name: str, layout: Layout, stand: Stand, storage: int, gradient: int) -> int:
        self._at[name, layout] = len(self.locals)
        self.locals.append(Local(stand, storage, gradient if stand.requires_grad else 0))
        return len(self.locals) - 1

    def _read(self, name: str, layout: Layout) -> int:
        """The tensor of a value as `layout`, converted where it is not there yet."""
        if (name, layout) in self._at:
            return self._at[name, layout]
        made = self._made[name]
        conversion = self._routes.get((name, layout))
        steps = getattr(conversion, "steps", None)
        if steps is None:
            assert len(layout) == 1
            steps = ((0, made[0], layout[0]),)
        else:
            steps = tuple((step.axis, step.source, step.target) for step in steps)
        number, here = self._at[name, made], made
        value = self.graph.values[name]
        first = self.locals[number].storage
        for axis, _, target in steps:
            arrived = (*here[:axis], target, *here[axis + 1 :])
            number = self._step(value, number, here, arrived, axis)
            here = arrived
        assert here == layout, (name, here, layout)
        self._at[name, layout] = number
        last = self.locals[number].storage
        if getattr(conversion, "again", False) and last != first:
            self.storages[last].remade = first
        return number

    def _step(self, value: Value, number: int, here: Layout, there: Layout, axis: int) -> int:
        """One move on one axis."""
        local, source, target = self.locals[number], here[axis], there[axis]
        whole = stand_in(value)
        shape = local_shape(whole.shape, there, self.sizes)
        grad = local.stand.requires_grad
        expected = contiguous(shape, whole.dtype, grad)
        kind = movement(source, target)
        # Zeros take the place of the value on all ranks but the first.
        group = StandInGroup(self.sizes[axis], int(kind is Movement.KEEP_ON_FIRST))
        size = 0
        if isinstance(source, Shard):
            size = local_shape(whole.shape, here, self.sizes, without=axis)[source.dim]
        key = ("move", local.stand, group.world_size, source, target, size)
        if key not in self._seen:
            run = Movement.NONE if group.world_size == 1 else kind
            self._seen[key] = observe(
                lambda x: x if run is Movement.NONE else move(x, group, source, target, size),
                (Ref(value.name),),
                {},
                [local.stand],
                [expected],
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
        made = self._put(value.name, there, stand, storage, stand.nbytes if own else 0)
        self.moments.append(Moment("", value.name, (number,), (made,), buffer))
        return made

    def _call(self, node: Node) -> None:
        choice: Any = self._choices[node.name]
        names = node.operands()
        operands = [self.layout(item) for item in choice.operands]
        results = [self.layout(item) for item in choice.results]
        reads = tuple(map(self._read, names, operands))
        stands = tuple(self.locals[number].stand for number in reads)
        expected = []
        for value, layout in zip(node.results, results, strict=True):
            whole = stand_in(value)
            shape = local_shape(whole.shape, layout, self.sizes)
            expected.append(contiguous(shape, whole.dtype, whole.requires_grad))
        kernels = choice.kernels if hasattr(choice, "kernels") else (choice.kernel,)
        seen = self._observed(node, tuple(kernels), operands, results, stands, tuple(expected))
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
            node.results, results, seen.results, expected, seen.storages, strict=True
        ):
            stand = fitted(made, own)
            storage = self.storages[of[index]]
            if index >= len(reads):
                storage.name = value.name
                storage.nbytes = storage.nbytes if made.shape == own.shape else own.nbytes
            gradient = stand.nbytes
            if index < len(reads) and prod(stands[index].shape) == prod(own.shape):
                gradient = 0
            makes.append(self._put(value.name, layout, stand, of[index], gradient))
            self._made[value.name] = layout
        self.moments.append(Moment(node.name, "", reads, tuple(makes)))

    def _observed(
        self,
        node: Node,
        kernels: tuple[str, ...],
        operands: list[Layout],
        results: list[Layout],
        stands: tuple[Stand, ...],
        expected: tuple[Stand, ...],
    ) -> Observed:
        """The call on this rank's parts; calls that run alike are run once."""
        split = tuple(map(tuple, operands)) if any(kernels) else ()
        written = (skeleton(node.args), skeleton(node.kwargs))
        key = (node.target, written, stands, expected, kernels, split)
        if key in self._seen:
            return self._seen[key]
        values = self.graph.values
        call = OpCall(node, tuple(values[name] for name in node.operands()))
        rule = known_rule(call)
        arguments, named = node.args, dict(node.kwargs)
        axis = next((axis for axis, kernel in enumerate(kernels) if kernel), None)
        if axis is not None:
            assert rule is not None
            named |= self._kernel_arguments(call, rule, axis, kernels[axis], operands)
            function = runner(node.target, kernel=kernels[axis])
            seen = observe(function, arguments, named, stands, expected, ("meta", "zeros"))
        else:
            shards = any(isinstance(p, Shard) for layout in results for p in layout)
            if rule is not None and rule.local_args is not None and shards:
                arguments = rule.local_args(call, tuple(stand.shape for stand in expected))
            if rule is not None and rule.random:
                named |= random_arguments(expected[0].shape)
            function = runner(node.target, rule.random if rule is not None else "")
            seen = observe(function, arguments, named, stands, expected)
        self._seen[key] = seen
        return seen

    def _kernel_arguments(
        self, call: OpCall, rule: ShardingRule, axis: int, kernel: str, operands: list[Layout]
    ) -> Mapping[str, Any]:
        """What the kernel that splits a loop on an axis is told besides the op's arguments."""
        for value, dims, layout in zip(call.operands, rule.operands, operands, strict=True):
            shard = layout[axis]
            for loop in dims[shard.dim] if isinstance(shard, Shard) else ():
                if loop in rule.kernels and rule.kernels[loop].name == kernel:
                    whole = tuple(hint(size) for size in value.shape)
                    size = local_shape(whole, layout, self.sizes, without=axis)
                    return {
                        **dict(rule.kernels[loop].arguments),
                        "group": StandInGroup(self.sizes[axis]),
                        "size": size[layout[axis].dim],  # type: ignore[union-attr]
                    }
        raise AssertionError(f"{call.node.name}: a kernel without a split operand")
