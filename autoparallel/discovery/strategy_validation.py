"""The judge of rules: a strategy is right if split, run and join equal unsplit, both ways.

It runs the op through the emitter, one thread per rank, so that what it judges is what a plan
runs. Nothing here depends on how a strategy was found: derived from a rule, or guessed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy
import torch

from autoparallel.graph.graph import Graph, Node, Ref, Sym, Value, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Invariant, Partial, Placement, Shard, gradient
from autoparallel.plan import OpChoice, ParameterChoice, Plan
from autoparallel.rewrite.emit import emit
from autoparallel.rules.registry import find_rule
from autoparallel.rules.rule import (
    LoopSplit,
    OpCall,
    ShardingRule,
    Strategy,
    is_possible,
    strategies,
)
from autoparallel.runtime.collectives import take_part
from autoparallel.runtime.groups import Group, LocalGroup, SingleGroup, thread_groups
from autoparallel.runtime.ranks import one_axis

__all__ = [
    "Example",
    "derived",
    "difference",
    "make_example",
    "part_of",
    "tiles_of",
    "uneven_parts",
    "why_wrong",
]

_TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-4}
_PATIENCE_SECONDS = 60.0
_INVARIANT = Invariant()


@dataclass(frozen=True)
class Example:
    """One call of an op with real tensors, and what it gives unsplit.

    tensors: the operands by name. results: of the unsplit op. seeds: the gradients that come in,
    None for a result without one. gradients: of the operands that take one, by name; zeros for the
    unused, to which none comes. extents: an input whose sizes are the symbols of the program, if it
    has any.
    """

    graph: Graph
    node: Node
    tensors: Mapping[str, torch.Tensor]
    results: tuple[torch.Tensor, ...]
    seeds: tuple[torch.Tensor | None, ...]
    gradients: Mapping[str, torch.Tensor]
    unused: frozenset[str]
    extents: tuple[torch.Tensor, ...] = ()

    @cached_property
    def call(self) -> OpCall:
        """The call as a rule sees it."""
        return OpCall.of(self.graph, self.node)

    def __str__(self) -> str:
        return str(self.node)


def _numbers(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Of magnitude 0.5 to 2, of both signs: no zeros, and no two alike."""
    size = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return size * sign


def make_example(
    target: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    symbolic: Mapping[int, str] | None = None,
) -> Example:
    """A call of `target` on real tensors; those that require a gradient are given one.

    args: nested tuples with tensors, one that occurs twice being one operand twice. symbolic:
    sizes that the program is to take from its inputs, as expressions: {5: "s0", 10: "2*s0"}.
    """
    expressions = {size: Sym(sympy.sympify(e), size) for size, e in (symbolic or {}).items()}
    found: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def reference(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            name = found.setdefault(id(leaf), f"x{len(found)}")
            tensors[name] = leaf
            return Ref(name)
        if isinstance(leaf, int) and not isinstance(leaf, bool):
            return expressions.get(leaf, leaf)
        return leaf

    def value(name: str, tensor: torch.Tensor, grad: bool) -> Value:
        shape = tuple(expressions.get(size, size) for size in tensor.shape)
        return Value(name, shape, tensor.dtype, grad and _is_number(tensor.dtype))

    named = map_leaves(reference, args)
    options = tuple((key, map_leaves(reference, item)) for key, item in (kwargs or {}).items())
    flows = any(tensor.requires_grad for tensor in tensors.values())
    node = Node("y", "call", target, (), named, options)
    results = _run_whole(node, tensors)
    values = tuple(value(f"y{index}", result, flows) for index, result in enumerate(results))
    node = replace(node, results=values)
    nodes = [
        Node(name, "parameter", name, (value(name, tensor, tensor.requires_grad),))
        for name, tensor in tensors.items()
    ]
    extents = {size: sym for size, sym in expressions.items() if sym.expr.is_Symbol}
    sizes = (torch.empty(tuple(extents)),) if extents else ()
    if extents:
        empty = Value("extents", tuple(extents.values()), torch.float64)
        nodes.insert(0, Node("extents", "input", "0", (empty,)))
    graph = Graph((*nodes, node), tuple(result.name for result in values)).verify()
    author = find_rule(target)
    if author is not None and author(OpCall.of(graph, node)).random:
        names = node.operands()
        alone = Strategy((_INVARIANT,) * len(names), (_INVARIANT,) * len(values))
        results = _run(graph, node, alone, SingleGroup(), tensors, sizes)
    generator = torch.Generator().manual_seed(len(target))
    seeds = tuple(
        _numbers(result.shape, generator).to(result.dtype) if result.requires_grad else None
        for result in results
    )
    gradients = _gradients(tensors, results, seeds)
    return Example(
        graph,
        node,
        {name: tensor.detach() for name, tensor in tensors.items()},
        tuple(result.detach() for result in results),
        seeds,
        {
            name: torch.zeros_like(tensors[name]) if grad is None else grad
            for name, grad in gradients.items()
        },
        frozenset(name for name, grad in gradients.items() if grad is None),
        sizes,
    )


def _is_number(dtype: torch.dtype) -> bool:
    """Whether a gradient may flow through tensors of this type."""
    return dtype.is_floating_point or dtype.is_complex


def _run_whole(node: Node, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The op itself, as torch defines it."""

    def actual(leaf: Any) -> Any:
        return tensors[leaf.name] if isinstance(leaf, Ref) else leaf

    kwargs = {key: map_leaves(actual, item) for key, item in node.kwargs}
    made = operator_of(node.target)(*map_leaves(actual, _plain(node.args)), **_plain(kwargs))
    return (made,) if isinstance(made, torch.Tensor) else tuple(made)


def _plain(structure: Any) -> Any:
    """Arguments with the sizes that are symbolic in the program as numbers."""
    if isinstance(structure, dict):
        return {key: _plain(item) for key, item in structure.items()}
    return map_leaves(lambda leaf: leaf.hint if isinstance(leaf, Sym) else leaf, structure)


def _gradients(
    tensors: Mapping[str, torch.Tensor],
    results: tuple[torch.Tensor, ...],
    seeds: tuple[torch.Tensor | None, ...],
) -> dict[str, torch.Tensor | None]:
    """Gradient of every operand that requires one; None where none comes."""
    pairs = [
        (result, seed) for result, seed in zip(results, seeds, strict=True) if seed is not None
    ]
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    if not pairs or not wanted:
        return {}
    ends, starts = zip(*pairs, strict=True)
    made = torch.autograd.grad(ends, tuple(wanted.values()), starts, allow_unused=True)
    return dict(zip(wanted, made, strict=True))


def tiles_of(rule: ShardingRule, world_size: int) -> Iterator[LoopSplit]:
    """Every way to split every loop: into all blocks of runs of all units that its size allows."""
    for loop in rule.loops:
        size = rule.sizes[loop]
        yield LoopSplit(loop)
        if isinstance(size, Sym):
            continue
        for blocks in range(1, size // world_size + 1):
            for unit in range(1, size // (blocks * world_size) + 1):
                tile = LoopSplit(loop, blocks, unit)
                if (blocks, unit) != (1, 1) and is_possible(rule, tile, world_size):
                    yield tile


def derived(example: Example, rule: ShardingRule, world_size: int) -> tuple[Strategy, ...]:
    """Everything that `rule` allows for this call on `world_size` ranks, each once."""
    operands = tuple(operand.requires_grad for operand in example.call.operands)
    results = tuple(result.requires_grad for result in example.call.results)
    found = strategies(rule, tiles_of(rule, world_size), operands, results, world_size)
    return tuple({(str(choice), choice.kernel): choice for choice in reversed(found)}.values())[
        ::-1
    ]


def uneven_parts(
    whole: torch.Tensor, world_size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Tensors of both signs and of different sizes that add up to `whole`."""
    if whole.dtype == torch.bool:
        raise TypeError("truth values have no pending sum")
    parts = []
    for rank in range(1, world_size):
        noise = _numbers(whole.shape, generator) * (rank + 1)
        if not whole.dtype.is_floating_point:
            noise = (noise * 4).round()
        parts.append(noise.to(whole.dtype))
    rest = whole.clone()
    for part in parts:
        rest = rest - part
    return [rest, *parts]


def part_of(
    whole: torch.Tensor, placement: Placement, world_size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """What each rank holds of `whole`."""
    if isinstance(placement, Shard):
        return [take_part(whole, placement, world_size, rank) for rank in range(world_size)]
    if isinstance(placement, Partial):
        return uneven_parts(whole, world_size, generator)
    return [whole] * world_size


def why_wrong(
    example: Example,
    strategy: Strategy,
    world_size: int,
    rule: ShardingRule | None = None,
    tolerance: float | None = None,
) -> str:
    """What is wrong with running the call by `strategy` on `world_size` ranks; "" if nothing is.

    Every rank gets its part of the operands and of the incoming gradients; the parts that it
    returns must be those of the unsplit results and gradients. rule: the op's, where it is not to
    be the registered one. tolerance: relative and absolute; by default 1e-10 for float64, 1e-4
    where there are operands of float32.
    """
    if tolerance is None:
        kinds = [tensor.dtype for tensor in (*example.tensors.values(), *example.results)]
        tolerance = max((_TOLERANCE.get(kind, 0.0) for kind in kinds), default=0.0)
    generator = torch.Generator().manual_seed(world_size)
    storage = _storage(example.node, strategy)
    try:
        leaves = {
            name: part_of(tensor, storage[name], world_size, generator)
            for name, tensor in example.tensors.items()
        }
        seeds = [
            [None] * world_size
            if seed is None
            else part_of(seed, gradient(placement), world_size, generator)
            for seed, placement in zip(example.seeds, strategy.results, strict=True)
        ]
    except TypeError as error:
        return str(error)
    made: list[Any] = [None] * world_size
    errors: dict[int, BaseException] = {}

    def run(group: LocalGroup) -> None:
        try:
            mine = {
                name: parts[group.rank]
                .clone(memory_format=torch.contiguous_format)
                .requires_grad_(name in example.gradients)
                for name, parts in leaves.items()
            }
            arguments = (example.graph, example.node, strategy, group, mine, example.extents)
            results = _run(*arguments, rule)
            own = (parts[group.rank] for parts in seeds)
            incoming = tuple(None if part is None else part.contiguous() for part in own)
            made[group.rank] = (results, _gradients(mine, results, incoming))
        except BaseException as error:
            errors[group.rank] = error
            group.abort()

    groups = thread_groups(world_size)
    threads = [threading.Thread(target=run, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE_SECONDS)
        if thread.is_alive():
            groups[0].abort()
    if errors:
        own = {r: e for r, e in errors.items() if not isinstance(e, threading.BrokenBarrierError)}
        rank = min(own or errors)
        return f"rank {rank} failed: {type(errors[rank]).__name__}: {str(errors[rank])[:300]}"
    for index, (whole, placement) in enumerate(zip(example.results, strategy.results, strict=True)):
        wrong = difference([results[index] for results, _ in made], whole, placement, tolerance)
        if wrong:
            return f"result {index}: {wrong}"
    for name, whole in example.gradients.items():
        absent = [rank for rank, (_, gradients) in enumerate(made) if gradients[name] is None]
        if absent and name not in example.unused:
            return f"gradient of operand {name}: none comes on rank {absent[0]}"
        wrong = difference(
            [
                torch.zeros_like(leaves[name][rank]) if gradients[name] is None else gradients[name]
                for rank, (_, gradients) in enumerate(made)
            ],
            whole,
            gradient(storage[name]),
            tolerance,
        )
        if wrong:
            return f"gradient of operand {name}: {wrong}"
    return ""


def _storage(node: Node, strategy: Strategy) -> dict[str, Placement]:
    """How each operand lies before the call.

    One that is read in two ways starts as a copy, and the emitter converts it to each.
    """
    found: dict[str, Placement] = {}
    for name, placement in zip(node.operands(), strategy.operands, strict=True):
        found[name] = placement if found.get(name, placement) == placement else _INVARIANT
    return found


def _run(
    graph: Graph,
    node: Node,
    strategy: Strategy,
    group: Group,
    operands: Mapping[str, torch.Tensor],
    extents: tuple[torch.Tensor, ...],
    rule: ShardingRule | None = None,
) -> tuple[torch.Tensor, ...]:
    """The emitted program of one rank, run on its parts."""
    choice = OpChoice(
        node.name,
        node.target,
        node.where,
        node.line,
        tuple(node.operands()),
        tuple(value.name for value in node.results),
        tuple((placement,) for placement in strategy.operands),
        tuple((placement,) for placement in strategy.results),
        (strategy.kernel.name if strategy.kernel else "",),
    )
    plan = Plan(
        model="example",
        mesh=Mesh(axis=group.world_size),
        options=Options(),
        hardware="",
        fingerprint=graph.fingerprint,
        parameters=tuple(
            ParameterChoice(name, name, (), 0, (placement,), (placement,), (placement,))
            for name, placement in _storage(node, strategy).items()
        ),
        ops=(choice,),
        conversions=(),
        outputs=tuple((placement,) for placement in strategy.results),
        cost=0.0,
        lower_bound=0.0,
        method="",
        seconds=0.0,
        product_weight=1.0,
    )
    rules = None if rule is None else {node.name: rule}
    program = emit(graph, plan, one_axis(group), node.target, rules=rules)
    leaves = [operands[path] for path in program.parameters]
    results, _ = program.run(leaves, [], [], list(extents), torch.device("cpu"))
    return tuple(results)


def difference(
    parts: list[torch.Tensor],
    whole: torch.Tensor,
    placement: Placement,
    tolerance: float = _TOLERANCE[torch.float64],
) -> str:
    """Where what the ranks hold is not `whole` under `placement`; "" if it is."""
    parts = [part.detach() for part in parts]
    world_size = len(parts)
    if any(part.dtype != whole.dtype for part in parts):
        return f"dtype {[str(part.dtype) for part in parts]}, not {whole.dtype}"
    if isinstance(placement, Partial):
        if any(part.shape != whole.shape for part in parts):
            return f"shapes {[tuple(part.shape) for part in parts]}, not {tuple(whole.shape)}"
        total = torch.stack(parts).sum(0).to(whole.dtype)
        return _apart("the sum over ranks", total, whole, tolerance)
    for rank, part in enumerate(parts):
        expected = whole
        if isinstance(placement, Shard):
            expected = take_part(whole, placement, world_size, rank)
        wrong = _apart(f"rank {rank}", part, expected, tolerance)
        if wrong:
            return wrong
    return ""


def _apart(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    if actual.shape != expected.shape:
        return f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.is_floating_point() or actual.is_complex():
        if torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
            return ""
        return f"{what} is off by {(actual - expected).abs().max().item():.3g}"
    return "" if torch.equal(actual, expected) else f"{what} differs"
