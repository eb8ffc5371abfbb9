"""The call of an op on a rank's part: its sizes, its arguments, the kernels that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Dim, Graph, Node, Sym, Value
from autoparallel.placement import Layout, Shard, local_size
from autoparallel.plan import OpChoice
from autoparallel.rewrite.expressions import Code, ExpressionWriter
from autoparallel.rewrite.names import Names
from autoparallel.rules.rule import Dims, Exchange, Kernel, OpCall, ShardingRule
from autoparallel.runtime.kernels import kernel_arguments
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import op_key

__all__ = ["LocalCalls"]


class LocalCalls:
    """Writes calls on one rank's parts.

    graph: of the plan. ranks: the rank's place on each mesh axis. names, speller: of the program.
    rules: of the calls, by node name; None where a call has no rule and stays unsharded.
    """

    def __init__(
        self,
        graph: Graph,
        ranks: Ranks,
        names: Names,
        speller: ExpressionWriter,
        rules: Mapping[str, ShardingRule | None],
    ) -> None:
        self.graph, self.ranks, self.names = graph, ranks, names
        self.speller, self.rules = speller, rules
        # The keys of random ops, in the order in which they are written.
        self.drawn: dict[int, None] = {}

    def may_be_empty(
        self, value: Value, layout: Layout, choice: OpChoice, rule: ShardingRule, loops: Dims
    ) -> list[int]:
        """Return the dims of a value of which a rank may hold nothing, for some inputs, in order.

        loops: of the value's dims. Dims whose loops may be empty are left out, and those that a
        kernel splits: kernels take empty parts.
        """
        dims = {
            placement.dim
            for placement, kernel in zip(layout, _per_axis(choice), strict=True)
            if isinstance(placement, Shard)
            and isinstance(value.shape[placement.dim], Sym)
            and not kernel
            and any(map(rule.needs_elements, loops[placement.dim]))
        }
        return sorted(dims)

    def may_hold_nothing(self, node: Node, choice: OpChoice) -> bool:
        """Return whether a rank may hold nothing of an operand, for some inputs."""
        return any(
            isinstance(placement, Shard) and self._may_be_nothing(name, layout, placement.dim)
            for name, layout in zip(node.operands(), choice.operands, strict=True)
            for placement in layout
        )

    def _may_be_nothing(self, name: str, layout: Layout, dim: int) -> bool:
        """Return whether a rank's part of a split dim may be empty."""
        size = self.graph.values[name].shape[dim]
        if isinstance(size, Sym):
            return True
        sizes = {size}
        for cut, count in zip(layout, self.ranks.sizes, strict=True):
            if isinstance(cut, Shard) and cut.dim == dim:
                sizes = {local_size(n, cut, count, rank) for n in sizes for rank in range(count)}
        return 0 in sizes

    def args(self, node: Node, choice: OpChoice) -> tuple[Any, ...]:
        """Return the call's args for this rank's part of its results, by its rule's local_args."""
        rule = self.rules[node.name]
        split = any(isinstance(item, Shard) for layout in choice.results for item in layout)
        if rule is None or rule.local_args is None or not split:
            return node.args
        shapes = tuple(
            tuple(self.dim(value, dim, layout) for dim in range(len(value.shape)))
            for value, layout in zip(node.results, choice.results, strict=True)
        )
        return rule.local_args(OpCall.of(self.graph, node), shapes)

    def dim(self, value: Value, dim: int, layout: Layout, without: int = -1) -> Any:
        """Return this rank's size of a dim: a number, or an expression where the inputs decide it.

        value: the whole tensor. layout: of the rank's part. without: an axis whose cut does not
        count; -1 for none.
        """
        size: Dim = value.shape[dim]
        for axis, placement in enumerate(layout):
            if axis == without or not isinstance(placement, Shard) or placement.dim != dim:
                continue
            if isinstance(size, int):
                world_size, rank = self.ranks.sizes[axis], self.ranks.coordinates[axis]
                size = local_size(size, placement, world_size, rank)
            else:
                part = Code(f"part({self.speller.size(size)}, {self.names.axes[axis]})")
                size = part  # type: ignore[assignment]
        return size

    def exchanged(self, node: Node, choice: OpChoice, axis: int, exchange: Exchange | None) -> str:
        """Return the options of a kernel that splits a second loop: the dim of an operand that has
        it, and its size without that split. "" for other kernels.
        """
        name, rule = choice.kernel(axis), self.rules[node.name]
        if exchange is None or exchange.kernel.name != name or rule is None:
            return ""
        for operand, dims, layout in zip(
            node.operands(), rule.operands, choice.operands, strict=True
        ):
            cut = layout[axis]
            if isinstance(cut, Shard) and {*dims[cut.dim]} & {*exchange.loops}:
                extent = self.dim(self.graph.values[operand], cut.dim, layout, without=axis)
                return f", dim={cut.dim}, extent={self.speller.size(extent)}"
        raise AssertionError(f"{node.name}: an exchange without a second loop")

    def kernels(self, node: Node, choice: OpChoice) -> dict[int, tuple[Kernel, str]]:
        """Return, by mesh axis, the kernel that the op needs, and its options: the local size of
        the loop that it splits.
        """
        rule = self.rules[node.name]
        kernels: dict[int, tuple[Kernel, str]] = {}
        for axis, name in enumerate(_per_axis(choice)):
            if not name:
                continue
            assert rule is not None, node.name
            for value, dims, layout in zip(
                node.operands(), rule.operands, choice.operands, strict=True
            ):
                placement = layout[axis]
                for loop in dims[placement.dim] if isinstance(placement, Shard) else ():
                    kernel = rule.kernel_of(loop, name)
                    if kernel is not None and axis not in kernels:
                        assert isinstance(placement, Shard)
                        size = self.dim(
                            self.graph.values[value], placement.dim, layout, without=axis
                        )
                        options = f"size={self.speller.size(size)}"
                        options += self.exchanged(node, choice, axis, rule.exchanges.get(loop))
                        kernels[axis] = (kernel, options)
            assert axis in kernels, f"{node.name}: a kernel without a split operand"
        return kernels

    def kernel_call(
        self,
        node: Node,
        text: str,
        kernels: Mapping[int, tuple[Kernel, str]],
    ) -> str:
        """Return the call of the kernels: of several,
        those that run the op itself run the next one.

        kernels: as `LocalCalls.kernels` gives them. Raises PlanError where two of them cannot be
        nested.
        """
        run = ""
        # False sorts first: at most one kernel wraps nothing, and it is the innermost. Of the
        # others that of the outermost axis is called first.
        ordered = sorted(kernels, key=lambda axis: (kernels[axis][0].wraps, -axis))
        if any(not kernels[axis][0].wraps for axis in ordered[1:]):
            raise PlanError(
                f"{node.target} cannot be split on several axes at once in this way",
                where=node.where,
                why=f"none of {', '.join(kernels[axis][0].name for axis in ordered)} runs another",
                fix="constrain the op's tensors to be whole on one of the axes, and plan again",
            )
        for axis in ordered:
            kernel, sizes = kernels[axis]
            unknown = {name for name, _ in kernel.arguments} - kernel_arguments(kernel.name)
            if unknown:
                raise ValueError(f"{kernel.name} has no {min(unknown)!r:.60}")
            options = f"group={self.names.axes[axis]}, {sizes}{run}"
            options += "".join(f", {name}={value!r}" for name, value in kernel.arguments)
            run = f", run=functools.partial(kernels.{kernel.name}, {options})"
        return f"kernels.{kernel.name}({text}, {options})"

    def random(self, node: Node, choice: OpChoice) -> str:
        """Return the keywords by which a random op draws the same
        numbers for the same elements on every rank.
        """
        shape = self.speller.shape(node.result.shape)
        placements = self.speller.layout(choice.results[0])
        key = op_key(node.name)
        self.drawn[key] = None
        return f"key={key}, shape={shape}, placements={placements}, ranks=ranks"

    def split_dims(self, node: Node, choice: OpChoice, rule: ShardingRule) -> list[list[int]]:
        """Return, per operand, the dims of which a rank may hold nothing and the op needs some."""
        rows = zip(node.operands(), choice.operands, rule.operands, strict=True)
        return [
            self.may_be_empty(self.graph.values[name], layout, choice, rule, loops)
            for name, layout, loops in rows
        ]

    def without_stand_ins(
        self, expression: str, node: Node, choice: OpChoice, rule: ShardingRule
    ) -> str:
        """Return the results without what came of stand-ins, for which a rank has no place."""
        lengths_held: dict[str, None] = {}
        for name, layout, dims in zip(
            node.operands(), choice.operands, self.split_dims(node, choice, rule), strict=True
        ):
            value = self.graph.values[name]
            lengths_held.update(
                (self.speller.size(self.dim(value, dim, layout)), None) for dim in dims
            )
        if not lengths_held:
            return expression
        lengths = []
        for value, layout, loops in zip(node.results, choice.results, rule.results, strict=True):
            sizes = (
                f"{dim}: {self.speller.size(self.dim(value, dim, layout))}"
                for dim in self.may_be_empty(value, layout, choice, rule, loops)
            )
            lengths.append(f"{{{', '.join(sizes)}}}")
        held, sizes_of_results = ", ".join(lengths_held), ", ".join(lengths)
        return f"kernels.without_stand_ins({expression}, [{held}], [{sizes_of_results}])"


def _per_axis(choice: OpChoice) -> tuple[str, ...]:
    """Return the names of the op's kernels, one for each mesh axis; "" where it needs none."""
    layouts = (*choice.operands, *choice.results)
    return choice.kernels or ("",) * (len(layouts[0]) if layouts else 0)
