"""Readable Python for one rank: the graph's ops on local tensors, conversions where they differ.

It knows no op by name: what an op's arguments become on a part is its rule's business.
"""

from __future__ import annotations

import keyword
import linecache
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.nn import functional
from torch.utils._sympy.printers import PythonPrinter

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value
from autoparallel.placement import (
    Invariant,
    Partial,
    Placement,
    Replicate,
    Shard,
    local_size,
    part_bounds,
)
from autoparallel.plan import OpChoice, Plan
from autoparallel.rules.registry import known_rule
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.runtime import collectives, draws, kernels
from autoparallel.runtime.groups import Group
from autoparallel.runtime.rng import op_key

__all__ = ["Program", "emit"]

_INVARIANT = Invariant()


class _Code(str):
    """An expression, printed without quotes."""

    __slots__ = ()


@dataclass(frozen=True)
class Program:
    """One rank's program. source: its text.

    run(parameters, buffers, constants, inputs, device) returns the local outputs and the values
    to write back. parameters, buffers, constants: paths, in the order in which run takes them.
    deferred: paths of parameters that the program reads as Replicate though they are Invariant:
    their gradients are to be summed over the ranks by whoever runs it (`sum_together`).
    outputs: (placement, shape) of what it returns; shape entries are ints or expressions in
    `symbols`, which names the input dims that define them: (symbol, input, dim).
    """

    source: str
    run: Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[tuple[Placement, tuple[Dim, ...]], ...]
    mutations: tuple[str, ...]
    deferred: tuple[str, ...]


def emit(
    graph: Graph,
    plan: Plan,
    group: Group,
    name: str = "model",
    alter: Callable[[str], str] | None = None,
    rules: Mapping[str, ShardingRule | None] | None = None,
) -> Program:
    """The program of one rank of `group`. alter: changes its text before it is compiled.

    rules: of calls, by node name, that are to be used in place of those that are known.

    Raises PlanError where the plan was made for another graph or another number of ranks.
    """
    if plan.fingerprint != graph.fingerprint:
        raise PlanError(
            "the plan was made for another model",
            why=f"the model's graph is {graph.fingerprint}, the plan's {plan.fingerprint}",
            fix="plan again with this model and these example inputs",
        )
    if plan.world_size != group.world_size:
        raise PlanError(
            f"a plan for {plan.world_size} ranks on {group.world_size}", fix="plan again"
        )
    return _Emitter(graph, plan, group, name, rules or {}).program(alter)


class _Emitter:
    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        group: Group,
        name: str,
        rules: Mapping[str, ShardingRule | None],
    ) -> None:
        self.graph, self.plan, self.group, self.name = graph, plan, group, name
        self.choices = {op.name: op for op in plan.ops}
        self.placements = _placements(graph, plan)
        self.lines: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        self.converted: dict[tuple[str, Placement], str] = {}
        self.constants: dict[str, Any] = {}
        self.symbols: dict[Any, str] = {}
        self.sizes: dict[Dim, str] = {}
        self.printer = PythonPrinter()
        self.rules = {
            node.name: rules[node.name] if node.name in rules else known_rule(self.call_of(node))
            for node in graph.calls
        }
        self.fused = self.find_fused()
        self.deferred = self.find_deferred()

    def program(self, alter: Callable[[str], str] | None) -> Program:
        kinds: dict[str, list[Node]] = {"parameter": [], "buffer": [], "constant": [], "input": []}
        for node in self.graph.nodes:
            if node.kind != "call":
                kinds[node.kind].append(node)
        head = []
        for kind, nodes in kinds.items():
            names = ", ".join(_identifier(node.result.name) for node in nodes)
            if nodes:
                head.append(f"[{names}] = {kind}s")
        for node in kinds["input"]:
            for dim, size in enumerate(node.result.shape):
                if isinstance(size, Sym) and size.expr.is_Symbol and size.expr not in self.symbols:
                    self.symbols[size.expr] = str(size.expr)
                    head.append(f"{size.expr} = {_identifier(node.result.name)}.size({dim})")
        for node in self.graph.calls:
            self.call(node)
        returned = []
        for value, placement in zip(self.graph.outputs, self.plan.outputs, strict=True):
            returned.append(self.read(value, placement))
        written = [self.read(value, _INVARIANT) for _, value in self.graph.mutations]
        body = [*head, *self.with_deletions((*returned, *written))]
        body.append(f"return [{', '.join(returned)}], [{', '.join(written)}]")
        source = "def forward(parameters, buffers, constants, inputs, device):\n" + "".join(
            f"    {line}\n" for line in body
        )
        source = alter(source) if alter is not None else source
        shapes = tuple(
            (placement, self.graph.values[value].shape)
            for value, placement in zip(self.graph.outputs, self.plan.outputs, strict=True)
        )
        return Program(
            source,
            self.compile(source),
            tuple(node.target for node in kinds["parameter"]),
            tuple(node.target for node in kinds["buffer"]),
            tuple(node.target for node in kinds["constant"]),
            shapes,
            tuple(path for path, _ in self.graph.mutations),
            tuple(node.target for node in kinds["parameter"] if node.name in self.deferred),
        )

    def compile(self, source: str) -> Callable[..., Any]:
        """The function, with its text known to tracebacks."""
        file = f"<autoparallel {self.name} rank {self.group.rank} of {self.group.world_size}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        world_size, rank = self.group.world_size, self.group.rank

        def part(size: int) -> int:
            start, stop = part_bounds(size, world_size, rank)
            return stop - start

        namespace: dict[str, Any] = {
            "torch": torch,
            "F": functional,
            "kernels": kernels,
            "rng": draws,
            "math": math,
            "convert": collectives.convert,
            "move": collectives.move,
            "pending_sum": collectives.pending_sum,
            "group": self.group,
            "part": part,
            **self.constants,
        }
        exec(compile(source, file, "exec"), namespace)
        made: Callable[..., Any] = namespace["forward"]
        return made

    def find_fused(self) -> dict[str, str]:
        """Products whose bias can be added in the same call: product's node -> add's node.

        Nothing may happen in between: one reader, and the product is read as it is made.
        """
        found: dict[str, str] = {}
        for node in self.graph.calls:
            addition = self.rules.get(node.name)
            if addition is None or not addition.adds:
                continue
            first, second = node.operands()
            product = self.graph.producers[first]
            rule = self.rules.get(product.name)
            if rule is None or not rule.takes_bias:
                continue
            choice, own = self.choices[product.name], self.choices[node.name]
            alone = len(self.graph.readers[first]) == 1 and first not in self.graph.outputs
            vector = len(self.graph.values[second].shape) == 1
            same = own.operands[0] == choice.results[0] and not isinstance(
                choice.results[0], Partial
            )
            wide = self.graph.values[second].shape == node.result.shape[-1:]
            if alone and vector and same and wide and first != second:
                found[product.name] = node.name
        return found

    def find_deferred(self) -> set[str]:
        """Parameters that are whole, and that every reader wants as Replicate."""
        wanted: dict[str, set[Placement]] = {}
        for op in self.plan.ops:
            for name, placement in zip(op.reads, op.operands, strict=True):
                wanted.setdefault(name, set()).add(placement)
        return {
            node.name
            for node in self.graph.nodes
            if node.kind == "parameter"
            and self.placements[node.name] == _INVARIANT
            and wanted.get(node.name) == {Replicate()}
            and node.name not in self.graph.outputs
        }

    def call(self, node: Node) -> None:
        """Emit one op: conversions of what it reads, then itself."""
        if node.name in self.fused:
            return
        choice = self.choices[node.name]
        reads = [
            self.read(name, placement)
            for name, placement in zip(node.operands(), choice.operands, strict=True)
        ]
        args, kwargs = node.args, dict(node.kwargs)
        target, rule = node.target, self.rules[node.name]
        pads = rule is not None and not rule.takes_empty and not choice.kernel
        if pads:
            reads = [
                self.some(read, self.graph.values[name], placement)
                for read, name, placement in zip(
                    reads, node.operands(), choice.operands, strict=True
                )
            ]
        producer = self.graph.producers[node.operands()[0]] if node.operands() else None
        if producer is not None and self.fused.get(producer.name) == node.name:
            inner = self.choices[producer.name]
            operands = [
                self.read(name, placement)
                for name, placement in zip(producer.operands(), inner.operands, strict=True)
            ]
            reads = [*operands, reads[1]]
            target, text = producer.target, ", ".join(reads)
        else:
            args = self.local_args(node, choice)
            text = self.arguments(args, {**kwargs, **_reduction(node)}, reads)
        results = [_identifier(value.name) for value in node.results]
        if choice.kernel:
            size = self.split_size(node, choice)
            extra = self.kernel_arguments(node, choice)
            expression = f"kernels.{choice.kernel}({text}, group=group, size={size}{extra})"
        elif rule is not None and rule.random:
            expression = f"rng.{rule.random}({text}, {self.random(node, choice)})"
        else:
            exact = any(isinstance(arg, tuple) and None in arg for arg in args)
            exact = exact or (rule is not None and bool(rule.discovered))  # just what was probed
            expression = f"torch.ops.{target}({text})" if exact else ""
            expression = expression or self.spelled(target, text, reads)
        if pads:
            expression = self.shortened(expression, node, choice)
        pending = choice.results == (Partial(),) and Partial() not in choice.operands
        if pending and not choice.kernel:
            expression = f"pending_sum({expression}, group)"
        made = ", ".join(results)
        if len(results) == 1 and not choice.kernel and _makes_list(target):
            made = f"[{made}]"
        line = f"{made} = {expression}"
        self.lines.append((line, tuple(reads), tuple(results)))

    def some(self, read: str, value: Value, placement: Placement) -> str:
        """The operand, with one place of zeros where inputs may be so short that it has none."""
        if not _may_be_empty(value, placement):
            return read
        assert isinstance(placement, Shard)
        name = f"{read}_some"
        line = f"{name} = kernels.some({read}, {placement.dim})"
        self.lines.append((line, (read,), (name,)))
        return name

    def shortened(self, expression: str, node: Node, choice: OpChoice) -> str:
        """The results without what came of such zeros."""
        for value, placement in zip(node.results, choice.results, strict=True):
            if _may_be_empty(value, placement):
                assert isinstance(placement, Shard)
                length = self.local_dim(value.shape[placement.dim], placement)
                return f"kernels.shortened({expression}, {placement.dim}, {length})"
        return expression

    def local_args(self, node: Node, choice: OpChoice) -> tuple[Any, ...]:
        """The call's args for this rank's part of its results."""
        rule = self.rules[node.name]
        split = any(isinstance(placement, Shard) for placement in choice.results)
        if rule is None or rule.local_args is None or not split:
            return node.args
        call = self.call_of(node)
        shapes = tuple(
            tuple(
                self.local_dim(size, placement if _splits(placement, dim) else None)
                for dim, size in enumerate(value.shape)
            )
            for value, placement in zip(node.results, choice.results, strict=True)
        )
        return rule.local_args(call, shapes)

    def call_of(self, node: Node) -> OpCall:
        return OpCall(node, tuple(self.graph.values[name] for name in node.operands()))

    def local_dim(self, size: Dim, placement: Placement | None) -> Any:
        if not isinstance(placement, Shard):
            return size
        if isinstance(size, Sym):
            return _Code(f"part({self.expression(size)})")
        return local_size(size, placement, self.group.world_size, self.group.rank)

    def split_size(self, node: Node, choice: OpChoice) -> str:
        """Size of the whole along the loop that the kernel splits."""
        for name, placement in zip(node.operands(), choice.operands, strict=True):
            if isinstance(placement, Shard):
                return self.expression(self.graph.values[name].shape[placement.dim])
        raise AssertionError(f"{node.name}: a kernel without a split operand")

    def kernel_arguments(self, node: Node, choice: OpChoice) -> str:
        """What the kernel of the split loop is called with besides."""
        rule = self.rules[node.name]
        assert rule is not None, node.name
        for dims, placement in zip(rule.operands, choice.operands, strict=True):
            for loop in dims[placement.dim] if isinstance(placement, Shard) else ():
                kernel = rule.kernels.get(loop)
                if kernel is not None and kernel.name == choice.kernel:
                    return "".join(f", {name}={value!r}" for name, value in kernel.arguments)
        raise AssertionError(f"{node.name}: a kernel without a split operand")

    def random(self, node: Node, choice: OpChoice) -> str:
        """What a random op must know to draw the same numbers for the same elements."""
        placement = choice.results[0]
        shape = "".join(f"{self.expression(size)}, " for size in node.result.shape)
        key = op_key(node.name)
        return f"key={key}, shape=({shape}), placement={self.constant(placement)}, group=group"

    def read(self, name: str, placement: Placement) -> str:
        """The identifier of a value as `placement`; emits its conversion at the first use."""
        made = self.placements[name]
        if made == placement or name in self.deferred:
            return _identifier(name)
        key = (name, placement)
        if key not in self.converted:
            value = self.graph.values[name]
            variant = f"{_identifier(name)}_{_suffix(placement)}"
            function = "convert" if value.requires_grad else "move"
            size = ""
            if isinstance(made, Shard):
                size = f", {self.expression(value.shape[made.dim])}"
            source, target = self.constant(made), self.constant(placement)
            line = f"{variant} = {function}({_identifier(name)}, group, {source}, {target}{size})"
            self.lines.append((line, (_identifier(name),), (variant,)))
            self.converted[key] = variant
        return self.converted[key]

    def constant(self, placement: Placement) -> str:
        """A placement by a short name in the program's namespace."""
        name = _suffix(placement)
        self.constants[name] = placement
        return name

    def expression(self, size: Any) -> str:
        if not isinstance(size, Sym):
            return repr(size)
        if size not in self.sizes:
            self.sizes[size] = self.printed(size)
        return self.sizes[size]

    def printed(self, size: Sym) -> str:
        """The expression in the names that the program gives to the inputs' sizes."""
        known = {symbol: sympy.Symbol(text) for symbol, text in self.symbols.items()}
        unknown = size.expr.free_symbols - set(known)
        if unknown:
            raise PlanError(f"size {size} does not follow from the inputs' sizes")
        return str(self.printer.doprint(size.expr.subs(known)))

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any], reads: list[str]) -> str:
        names = iter(reads)
        parts = [self.argument(arg, names) for arg in args]
        parts += [f"{key}={self.argument(value, names)}" for key, value in kwargs.items()]
        return ", ".join(parts)

    def argument(self, item: Any, names: Any) -> str:
        if isinstance(item, Ref):
            return str(next(names))
        if isinstance(item, _Code):
            return str(item)
        if isinstance(item, Sym):
            return self.expression(item)
        if isinstance(item, tuple):
            return "[" + ", ".join(self.argument(part, names) for part in item) + "]"
        if isinstance(item, torch.device):
            return "device"
        if isinstance(item, float) and not math.isfinite(item):
            return f"float('{item}')"
        if isinstance(item, (int, float, str, bool, type(None), torch.dtype)):
            return repr(item)
        if isinstance(item, (torch.layout, torch.memory_format)):
            return repr(item)
        key = f"constant_{len(self.constants)}"
        self.constants[key] = item
        return key

    def spelled(self, target: str, text: str, reads: list[str]) -> str:
        """The call of an op, as a person would write it where torch has such a function."""
        space, _, rest = target.partition(".")
        name, _, overload = rest.partition(".")
        if space == "aten" and overload not in _AS_IS and not name.startswith("_"):
            if hasattr(torch._C._nn, name):
                own = getattr(torch._C._nn, name)
                public = getattr(functional, name, None) is own
                return f"{'F' if public else 'torch._C._nn'}.{name}({text})"
            if hasattr(torch._C._VariableFunctions, name):
                return f"torch.{name}({text})"
            if name in _METHODS and reads and text.startswith(reads[0]):
                others = text[len(reads[0]) :].removeprefix(", ")
                return f"{reads[0]}.{name}({others})"
        return f"torch.ops.{target}({text})"

    def with_deletions(self, kept: tuple[str, ...]) -> list[str]:
        """The lines, with each value's name deleted after its last use, to free its memory."""
        last: dict[str, int] = {}
        for index, (_, reads, _) in enumerate(self.lines):
            for name in reads:
                last[name] = index
        made = {name for _, _, names in self.lines for name in names}
        done: dict[int, list[str]] = {}
        for name, index in last.items():
            if name in made and name not in kept:
                done.setdefault(index, []).append(name)
        rows = []
        for index, (line, _, _) in enumerate(self.lines):
            rows.append(line)
            if index in done:
                rows.append("del " + ", ".join(done[index]))
        return rows


_AS_IS = {"dtype_layout", "Tensor_Scalar_out"}
_METHODS = {"expand", "repeat", "to"}


def _placements(graph: Graph, plan: Plan) -> Mapping[str, Placement]:
    """How every value is made."""
    storage = plan.storage
    found: dict[str, Placement] = {}
    for node in graph.nodes:
        if node.kind != "call":
            found[node.result.name] = storage.get(node.target, _INVARIANT)
            if node.kind != "parameter":
                found[node.result.name] = _INVARIANT
    for op in plan.ops:
        found.update(zip(op.makes, op.results, strict=True))
    return found


def _makes_list(target: str) -> bool:
    """Whether an op returns a list, be it of one tensor."""
    operation: Any = torch.ops
    for part in target.split("."):
        operation = getattr(operation, part, None)
    returns: Any = operation._schema.returns if operation is not None else ()
    return len(returns) == 1 and str(returns[0].type).startswith("List[")


def _reduction(node: Node) -> dict[str, Any]:
    """The schema's default of `reduction`, written out where the call leaves it to the default.

    torch's Python bindings of losses have another default (none) than the ops (mean).
    """
    packet, _, overload = node.target.removeprefix("aten.").partition(".")
    op = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if op is None or not node.target.startswith("aten."):
        return {}
    for index, argument in enumerate(op._schema.arguments):
        if argument.name == "reduction" and len(node.args) <= index:
            return {} if "reduction" in dict(node.kwargs) else {"reduction": argument.default_value}
    return {}


def _may_be_empty(value: Value, placement: Placement) -> bool:
    """Whether a rank may hold nothing, for some inputs."""
    return isinstance(placement, Shard) and isinstance(value.shape[placement.dim], Sym)


def _splits(placement: Placement, dim: int) -> bool:
    return isinstance(placement, Shard) and placement.dim == dim


def _suffix(placement: Placement) -> str:
    if not isinstance(placement, Shard):
        return str(placement)
    extra = f"_blocks{placement.blocks}" if placement.blocks != 1 else ""
    extra += f"_unit{placement.unit}" if placement.unit != 1 else ""
    return f"S{placement.dim}{extra}"


def _identifier(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name
