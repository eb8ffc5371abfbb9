"""Calls of one op on real tensors: unsplit, and run by a strategy as one rank's emitted program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
import torch

from autoparallel.graph.graph import Graph, Node, Ref, Sym, Value, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Invariant, Placement
from autoparallel.plan import OpChoice, ParameterChoice, Plan
from autoparallel.rewrite.emit import emit
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.rules.strategies import Strategy
from autoparallel.runtime.groups import Group, SingleGroup
from autoparallel.runtime.ranks import one_axis

__all__ = [
    "Example",
    "gradients_of",
    "make_example",
    "program_of",
    "random_numbers",
    "run_by_strategy",
    "second_gradients_of",
    "storage_of",
]

_INVARIANT = Invariant()


@dataclass(frozen=True)
class Example:
    """One call of an op with real tensors, and its results and gradients unsplit.

    graph, node: a program of that one call. tensors: the operands by name. results: of the unsplit
    op. seeds: the gradients that come in, None for a result without one. gradients: of the operands
    that take one, by name; zeros for the unused, to which none comes. extents: an input whose sizes
    are the symbols of the program, if it has any. slack: errors beyond rounding that results and
    gradients may have, by name: of an ill-conditioned call, rounding is magnified.
    """

    graph: Graph
    node: Node
    tensors: Mapping[str, torch.Tensor]
    results: tuple[torch.Tensor, ...]
    seeds: tuple[torch.Tensor | None, ...]
    gradients: Mapping[str, torch.Tensor]
    unused: frozenset[str]
    extents: tuple[torch.Tensor, ...] = ()
    slack: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def call(self) -> OpCall:
        """The call as a rule sees it."""
        return OpCall.of(self.graph, self.node)

    @cached_property
    def second_derivatives(
        self,
    ) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor | None] | None]:
        """Directions of the operands' gradients, by name, and the unsplit derivatives of the
        gradients along them; None where torch has none.
        """
        # The same numbers in every process, so that a fault can be seen again.
        generator = torch.Generator().manual_seed(0)
        directions = {
            name: random_numbers(whole.shape, generator, whole.dtype)
            for name, whole in self.gradients.items()
        }
        alone = Strategy(
            (_INVARIANT,) * len(self.node.operands()), (_INVARIANT,) * len(self.results)
        )
        tensors = {
            name: tensor.clone().requires_grad_(name in self.gradients)
            for name, tensor in self.tensors.items()
        }
        incoming = tuple(None if seed is None else seed.clone() for seed in self.seeds)
        arguments = (self.graph, self.node, alone, SingleGroup(), tensors, self.extents)
        try:
            results = run_by_strategy(*arguments)
            return directions, second_gradients_of(tensors, results, incoming, directions)
        except RuntimeError:  # torch has no second derivative of this op
            return directions, None

    def __str__(self) -> str:
        return str(self.node)


def random_numbers(
    shape: torch.Size, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return numbers of magnitude 0.5 to 2 and of both signs: no zeros, and no two alike.

    dtype: of a floating point or complex type; complex ones have both parts so.
    """
    if dtype.is_complex:
        real, imaginary = (random_numbers(shape, generator) for _ in range(2))
        return torch.complex(real, imaginary).to(dtype)
    size = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (size * sign).to(dtype)


def make_example(
    target: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    symbolic: Mapping[int, str] | None = None,
) -> Example:
    """Return a call of `target` on real tensors, run unsplit;
    tensors that require a gradient are given one.

    target: the op. args, kwargs: nested tuples with tensors, of which one that occurs twice is one
    operand twice. symbolic: sizes that the program is to take from its inputs, as expressions: {5:
    "s0", 10: "2*s0"}. Gradients come in as random numbers.

    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> example = make_example("aten.sum.default", (x,))
    >>> print(example.results[0])
    tensor(3.)
    """
    expressions = {size: Sym(sympy.sympify(e), size) for size, e in (symbolic or {}).items()}
    operand_names: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def reference(leaf: Any) -> Any:
        """Return one argument of the node: a use of a tensor, or a size that may be symbolic."""
        if isinstance(leaf, torch.Tensor):
            name = operand_names.setdefault(id(leaf), f"x{len(operand_names)}")
            tensors[name] = leaf
            return Ref(name)
        if isinstance(leaf, int) and not isinstance(leaf, bool):
            return expressions.get(leaf, leaf)
        return leaf

    def value(name: str, tensor: torch.Tensor, grad: bool) -> Value:
        """Return the value that stands for a tensor in the program."""
        shape = tuple(expressions.get(size, size) for size in tensor.shape)
        return Value(name, shape, tensor.dtype, grad and _is_number(tensor.dtype))

    named = map_leaves(reference, args)
    options = tuple((key, map_leaves(reference, item)) for key, item in (kwargs or {}).items())
    flows = any(tensor.requires_grad for tensor in tensors.values())
    # First without results, whose shapes only running the op tells.
    node = Node("y", "call", target, (), named, options)
    results = _run_unsplit(node, tensors)
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
    # A random op's numbers are those that the emitted program draws by place, not torch's.
    if author is not None and author(OpCall.of(graph, node)).random:
        names = node.operands()
        alone = Strategy((_INVARIANT,) * len(names), (_INVARIANT,) * len(values))
        results = run_by_strategy(graph, node, alone, SingleGroup(), tensors, sizes)
    # The same numbers in every process, whatever was drawn before.
    generator = torch.Generator().manual_seed(len(target))
    seeds = tuple(
        random_numbers(result.shape, generator, result.dtype) if result.requires_grad else None
        for result in results
    )
    gradients = gradients_of(tensors, results, seeds)
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
    """Return whether a gradient may flow through tensors of this type."""
    return dtype.is_floating_point or dtype.is_complex


def _run_unsplit(node: Node, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the results of the op itself, as torch computes them."""

    def actual(leaf: Any) -> Any:
        """Return one argument as the op is called with it."""
        return tensors[leaf.name] if isinstance(leaf, Ref) else leaf

    kwargs = {key: map_leaves(actual, item) for key, item in node.kwargs}
    returned = operator_of(node.target)(*map_leaves(actual, _plain(node.args)), **_plain(kwargs))
    return (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)


def _plain(structure: Any) -> Any:
    """Return arguments in which the sizes that are symbolic in the program are numbers."""
    if isinstance(structure, dict):
        return {key: _plain(item) for key, item in structure.items()}
    return map_leaves(lambda leaf: leaf.hint if isinstance(leaf, Sym) else leaf, structure)


def gradients_of(
    tensors: Mapping[str, torch.Tensor],
    results: tuple[torch.Tensor, ...],
    seeds: tuple[torch.Tensor | None, ...],
) -> dict[str, torch.Tensor | None]:
    """Return the gradient of every operand that requires one; None where none comes."""
    pairs = [
        (result, seed) for result, seed in zip(results, seeds, strict=True) if seed is not None
    ]
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    if not pairs or not wanted:
        return {}
    ends, starts = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(ends, tuple(wanted.values()), starts, allow_unused=True)
    return dict(zip(wanted, gradients, strict=True))


def second_gradients_of(
    tensors: Mapping[str, torch.Tensor],
    results: tuple[torch.Tensor, ...],
    seeds: tuple[torch.Tensor | None, ...],
    directions: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor | None] | None:
    """Return the gradients of the operands' gradients, along `directions`; None where there are
    none, because no gradient depends on anything.

    Gradients depend on the operands, by whose names theirs are returned, and on the gradients that
    come in, whose own have the names "seed 0" and so on. directions: what comes in as the gradient
    of each operand's gradient. Raises RuntimeError where torch cannot differentiate twice.
    """
    incoming = {f"seed {index}": seed for index, seed in enumerate(seeds) if seed is not None}
    for seed in incoming.values():
        seed.requires_grad_()
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    ends = tuple(result for result, seed in zip(results, seeds, strict=True) if seed is not None)
    if not ends or not wanted:
        return None
    gradients = torch.autograd.grad(
        ends, tuple(wanted.values()), tuple(incoming.values()), create_graph=True, allow_unused=True
    )
    pairs = [
        (gradient, directions[name])
        for name, gradient in zip(wanted, gradients, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not pairs:
        return None
    twice = {**wanted, **incoming}
    starts = tuple(direction for _, direction in pairs)
    seconds = torch.autograd.grad(
        tuple(gradient for gradient, _ in pairs), tuple(twice.values()), starts, allow_unused=True
    )
    return dict(zip(twice, seconds, strict=True))


def storage_of(node: Node, strategy: Strategy) -> dict[str, Placement]:
    """Return the placement of each operand before the call.

    One that is read in two ways starts as a copy, and the emitter converts it to each.
    """
    placements: dict[str, Placement] = {}
    for name, placement in zip(node.operands(), strategy.operands, strict=True):
        placements[name] = placement if placements.get(name, placement) == placement else _INVARIANT
    return placements


def program_of(
    graph: Graph,
    node: Node,
    strategy: Strategy,
    group: Group,
    rule: ShardingRule | None = None,
) -> Callable[[Mapping[str, torch.Tensor], tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """Return the emitted program of one rank, as a function of the operands and extents.

    Example: `program_of(graph, node, strategy, group)(operands, ())`.
    """
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
    # A plan of one op: nothing is converted, because storage and outputs lie as the strategy says.
    plan = Plan(
        model="example",
        mesh=Mesh(axis=group.world_size),
        options=Options(),
        hardware="",
        fingerprint=graph.fingerprint,
        parameters=tuple(
            ParameterChoice(name, name, (), 0, (placement,), (placement,), (placement,))
            for name, placement in storage_of(node, strategy).items()
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

    def run(
        operands: Mapping[str, torch.Tensor], extents: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        leaves = [operands[path] for path in program.parameters]
        results, _ = program.run(leaves, [], [], list(extents), torch.device("cpu"))
        return tuple(results)

    return run


def run_by_strategy(
    graph: Graph,
    node: Node,
    strategy: Strategy,
    group: Group,
    operands: Mapping[str, torch.Tensor],
    extents: tuple[torch.Tensor, ...],
    rule: ShardingRule | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return the results of the emitted program of one rank on its parts."""
    return program_of(graph, node, strategy, group, rule)(operands, extents)
