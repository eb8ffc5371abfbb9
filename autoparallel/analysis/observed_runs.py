"""Runs of one rank's calls and moves on tensors without data, which show what those save."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from autoparallel.cost.fake_run import FakeTensorSpec, Observed, observe, runner, skeleton
from autoparallel.cost.hardware import device_planned_for
from autoparallel.cost.stand_in_group import StandInGroup, random_arguments
from autoparallel.graph.graph import Graph, Node, Ref, Value, hint
from autoparallel.graph.part_sizes import local_shape
from autoparallel.placement import Movement, Shard, Step
from autoparallel.plan import OpChoice, Plan
from autoparallel.rules.lookup import known_rule
from autoparallel.rules.rule import Kernel, OpCall, ShardingRule
from autoparallel.runtime import kernels as runtime_kernels
from autoparallel.runtime.moves import move

__all__ = ["ObservedRuns", "Seen"]

# What calls and moves save, by what they are and what they run on.
Seen = dict[Any, Observed]


class ObservedRuns:
    """The runs of calls and moves on one rank's parts without data; those that run alike run once.

    graph, plan: as of `AbstractExecution`. seen: what was seen before on the same mesh; it is added
    to.
    """

    def __init__(self, graph: Graph, plan: Plan, seen: Seen) -> None:
        self.graph, self.seen = graph, seen
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        self.device = device_planned_for(plan.hardware, plan.options.hardware)

    def move(
        self,
        value: Value,
        spec: FakeTensorSpec,
        expected: FakeTensorSpec,
        group: StandInGroup,
        step: Step,
        size: int,
    ) -> Observed:
        """Run one move of a value, and return what it saved.

        spec, expected: what is moved, and what comes of it. size: of the whole along the split dim
        of the source, 0 where that is not split.
        """
        source, target = step.source, step.target
        key = ("move", spec, group.world_size, source, target, size)
        if key not in self.seen:
            run = Movement.NONE if group.world_size == 1 else step.forward
            self.seen[key] = observe(
                lambda x: x if run is Movement.NONE else move(x, group, source, target, size),
                (Ref(value.name),),
                {},
                [spec],
                [expected],
                ("meta", "zeros"),
            )
        return self.seen[key]

    def call(
        self,
        node: Node,
        choice: OpChoice,
        operands: tuple[FakeTensorSpec, ...],
        expected: tuple[FakeTensorSpec, ...],
    ) -> Observed:
        """Run the call on this rank's parts without data, and return what it saved; calls that run
        alike run once.
        """
        split = choice.operands if any(choice.kernels) else ()
        written = (skeleton(node.args), skeleton(node.kwargs))
        key = (node.target, written, operands, expected, choice.kernels, split)
        if key in self.seen:
            return self.seen[key]
        call = OpCall.of(self.graph, node)
        rule = known_rule(call)
        args, kwargs = node.args, dict(node.kwargs)
        shards = any(isinstance(item, Shard) for layout in choice.results for item in layout)
        if rule is not None and rule.local_args is not None and shards:
            args = rule.local_args(call, tuple(result.shape for result in expected))
        if any(choice.kernels):
            assert rule is not None
            function = self._kernels(call, rule, choice)
            seen = observe(
                function, args, kwargs, operands, expected, ("meta", "zeros"), backward=True
            )
        else:
            if rule is not None and rule.random:
                kwargs |= random_arguments(expected[0].shape)
            function = runner(node.target, rule, self.device)
            seen = observe(function, args, kwargs, operands, expected, backward=True)
        self.seen[key] = seen
        return seen

    def _kernels(self, call: OpCall, rule: ShardingRule, choice: OpChoice) -> Callable[..., Any]:
        """Return the kernels of a call as one function: of several, those that run the op itself
        run the next one.
        """
        kernels: list[tuple[Kernel, dict[str, Any]]] = []
        for axis, name in enumerate(choice.kernels):
            if name:
                kernel, sizes = self._kernel(call, rule, choice, axis)
                group = StandInGroup(self.sizes[axis])
                kernels.append((kernel, {"group": group, **sizes, **dict(kernel.arguments)}))
        run: Callable[..., Any] | None = None
        # Of those that run another, that of the outermost axis is called first.
        kernels.reverse()
        for kernel, options in sorted(kernels, key=lambda item: item[0].wraps):
            inner = {} if run is None else {"run": run}
            run = partial(getattr(runtime_kernels, kernel.name), **options, **inner)
        assert run is not None
        return run

    def _kernel(
        self, call: OpCall, rule: ShardingRule, choice: OpChoice, axis: int
    ) -> tuple[Kernel, dict[str, int]]:
        """Return the kernel that splits a loop on an axis, and the sizes that it is told: the
        loop's, and that of a loop that it splits together with it, without that split.
        """
        name = choice.kernel(axis)
        kernel: Kernel | None = None
        sizes: dict[str, int] = {}
        others: tuple[str, ...] = ()
        for value, dims, layout in zip(call.operands, rule.operands, choice.operands, strict=True):
            shard = layout[axis]
            if not isinstance(shard, Shard):
                continue
            whole = tuple(hint(size) for size in value.shape)
            size = local_shape(whole, layout, self.sizes, without=axis)[shard.dim]
            for loop in dims[shard.dim]:
                by = rule.kernel_of(loop, name)
                if kernel is None and by is not None:
                    kernel, sizes["size"] = by, size
                    exchange = rule.exchanges.get(loop)
                    others = exchange.loops if exchange and exchange.kernel is by else ()
                elif loop in others:
                    sizes.setdefault("extent", size)
        if kernel is None:
            raise AssertionError(f"{call.node.name}: a kernel without a split operand")
        return kernel, sizes
