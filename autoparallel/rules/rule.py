"""Sharding rules: the loops of which an op is made, and all strategies that follow from them.

Every dimension of every operand and result is a product of loops, outermost first, as in einsum.
Splitting one loop over a mesh axis fixes all placements: an operand that has the loop is Shard, one
without it is Replicate; a result that has it is Shard, one without it is Partial. (Alpa,
arXiv:2201.12023, and Shardy state rules alike.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from autoparallel.graph.graph import Dim, Graph, Node, Sym, Value, hint, numel_hint
from autoparallel.placement import (
    Collective,
    Invariant,
    Partial,
    Placement,
    Replicate,
    Shard,
)

__all__ = [
    "Kernel",
    "LoopSplit",
    "OpCall",
    "Shapes",
    "ShardingRule",
    "Strategy",
    "UnsplittableError",
    "is_possible",
    "loop_per_dim",
    "normalized",
    "place",
    "strategies",
    "tile_of",
]

# A dim's loops, outermost first; a tensor's dims; the local shapes of several tensors.
Loops = tuple[str, ...]
Dims = tuple[Loops, ...]
Shapes = tuple[tuple[Any, ...], ...]


def loop_per_dim(shape: tuple[Dim, ...]) -> tuple[Dims, dict[str, Dim]]:
    """Return a loop d0, d1, .. for each dim, none for one of size 1, whose split would leave ranks
    without work; and the loops' sizes.

    >>> loop_per_dim((4, 1, 6))
    ((('d0',), (), ('d2',)), {'d0': 4, 'd2': 6})
    """
    sizes = {f"d{i}": size for i, size in enumerate(shape) if size != 1}
    return tuple((f"d{i}",) if f"d{i}" in sizes else () for i in range(len(shape))), sizes


@dataclass(frozen=True, slots=True)
class OpCall:
    """One call of an op as rules see it: the node, and the tensors that it reads, repeats kept.

    operands: in the order of the node's arguments; a value that is read twice is there twice.
    """

    node: Node
    operands: tuple[Value, ...]

    @classmethod
    def of(cls, graph: Graph, node: Node) -> OpCall:
        """Return the call that a node of the graph is."""
        return cls(node, tuple([graph.values[name] for name in node.operands()]))

    @property
    def results(self) -> tuple[Value, ...]:
        """The tensors that the call produces."""
        return self.node.results

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by keyword;
        the default where the call leaves it out.
        """
        return self.node.argument(position, name, default)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of autoparallel.runtime.kernels that runs the op on a part and communicates.

    name: of the function. result: the placement of every result without the loop. collectives:
    pairs of a kind and the bytes of the full tensor, backward ones among them, for the cost model.
    arguments: what else it is called with, by name. wraps: it runs the op itself on its part, which
    may be the kernel of another mesh axis (of all kernels of one call, all but one must).
    """

    name: str
    result: Placement
    collectives: tuple[tuple[Collective, int], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    wraps: bool = False


@dataclass(frozen=True)
class ShardingRule:
    """The loop nest of one op call, and what a split of it must heed.

    operands, results: per tensor, per dim, the loops that make it up. sizes: of each loop. whole:
    loops that cannot be split. linear: sets of operands through which, jointly, a pending sum
    passes. kernels: for loops that need one to be split. flops: floating point operations per point
    of the loop nest (2 for a product); 0 where moving bytes is all the work. skipped: the share of
    these that the op's kernel leaves out, as what a causal mask hides. exponentials: computed per
    point between fused products. free: the op is a
    view, no work at all. local_args: a function to the call's args for given local shapes of its
    results. random: the function of autoparallel.runtime.random_ops that runs the op, if it draws
    numbers. function: that of autoparallel.runtime.kernels that runs the op where no kernel does,
    as torch's own is slow for some memory layouts. takes_bias: the op adds a vector over the
    result's last dim if it is given one more operand. adds: the op is such an addition. grain: of
    loops whose parts must have a multiple of so many elements. replicates: the backward pass is
    linear, so that it may work on summands of a gradient: false of an op that clips gradients, say.
    takes_empty: the op also runs on a part without elements, which ranks are left with where a loop
    is shorter than they are many. occupied: loops of which every part must have elements even so.
    reasons: why loops are whole, where there is more to say. discovered: the rule in einsum-like
    words, if nobody wrote it.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: Mapping[str, Dim]
    whole: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    flops: float = 0
    skipped: float = 0.0
    exponentials: float = 0.0
    free: bool = False
    local_args: Callable[[OpCall, Shapes], tuple[Any, ...]] | None = None
    random: str = ""
    function: str = ""
    takes_bias: bool = False
    adds: bool = False
    grain: Mapping[str, int] = field(default_factory=dict)
    replicates: bool = True
    takes_empty: bool = True
    occupied: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)
    discovered: str = ""

    def needs_elements(self, loop: str) -> bool:
        """Return whether the op runs only on parts of the loop that have elements."""
        return not self.takes_empty or loop in self.occupied

    @staticmethod
    def parse(
        notation: str,
        call: OpCall,
        *,
        whole: Iterable[str] = (),
        linear: Iterable[Iterable[int]] = (),
        kernels: Mapping[str, Kernel] | None = None,
        flops: float = 0,
    ) -> ShardingRule:
        """Return the rule of a call in einsum-like notation: "... k, n k -> ... n".

        Names are loops; "..." stands for the dims that are left; "1" is a dim without a loop, and
        so is any dim of size 1. Sizes are read off the call's tensors. The keywords are fields of
        the rule. Raises ValueError where the notation has another number of tensors or dims than
        the call: the author of the rule sees it.
        """
        left, _, right = notation.partition("->")
        tensors = [*call.operands, *call.results]
        texts = [text.split() for text in (left + "," + right).split(",")]
        if len(texts) != len(tensors):
            raise ValueError(
                f"{notation!r} names {len(texts)} tensors, the call has {len(tensors)}"
            )
        sizes: dict[str, Dim] = {}
        dims: list[Dims] = []
        for words, tensor in zip(texts, tensors, strict=True):
            rank = len(tensor.shape)
            if "..." in words:
                at = words.index("...")
                extra = rank - len(words) + 1
                # Numbered from the right, so that batches of different ranks are broadcast as in
                # numpy.
                words = [*words[:at], *(f"_{extra - i}" for i in range(extra)), *words[at + 1 :]]
            if len(words) != rank:
                raise ValueError(f"{notation!r} names {len(words)} dims for {tensor}")
            row: list[Loops] = []
            for word, size in zip(words, tensor.shape, strict=True):
                if word == "1" or size == 1:
                    row.append(())
                else:
                    row.append((word,))
                    sizes.setdefault(word, size)
            dims.append(tuple(row))
        count = len(call.operands)
        return ShardingRule(
            tuple(dims[:count]),
            tuple(dims[count:]),
            sizes,
            whole=frozenset(whole),
            linear=tuple(frozenset(group) for group in linear),
            kernels=kernels or {},
            flops=flops,
        )

    @cached_property
    def loops(self) -> tuple[str, ...]:
        """Every loop of an operand or a result, in order of appearance."""
        loops: dict[str, None] = {}
        for dims in (*self.operands, *self.results):
            for names in dims:
                loops.update(dict.fromkeys(names))
        return tuple(loops)

    @cached_property
    def points(self) -> int:
        """The number of points of the loop nest, for the example inputs."""
        return numel_hint(tuple(self.sizes[name] for name in self.loops))


@dataclass(frozen=True, slots=True)
class LoopSplit:
    """A way to split one loop: into `blocks` equal blocks, each in runs of `unit` elements, as
    `Shard` splits a dim.
    """

    loop: str
    blocks: int = 1
    unit: int = 1


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run an op on one mesh axis: a placement for every operand and result.

    operands, results: placements, in the call's order. tile: the split of a loop, None where
    nothing is split. fraction: the largest rank's share of the work. kernel: what runs in place of
    the op, None for the op itself.
    """

    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    tile: LoopSplit | None = None
    fraction: float = 1.0
    kernel: Kernel | None = None

    def __str__(self) -> str:
        sides = (", ".join(map(str, side)) for side in (self.operands, self.results))
        return " -> ".join(sides)


def normalized(shard: Shard, size: Dim, world_size: int) -> Shard:
    """Return the shard with unit 1 where that gives the same parts: where the runs of each block
    divide by the number of ranks.

    One placement must have one form, or equal layouts would be redistributed into each other. size:
    of the whole dim.

    >>> print(normalized(Shard(0, unit=64), 12 * 64, 4), normalized(Shard(0, unit=64), 25 * 64, 4))
    S(0) S(0, unit=64)
    """
    if isinstance(size, Sym) or shard.unit == 1:
        return shard
    if (size // (shard.blocks * shard.unit)) % world_size == 0:
        return Shard(shard.dim, shard.blocks)
    return shard


def place(rule: ShardingRule, dims: Dims, tile: LoopSplit, world_size: int) -> Shard | None:
    """Return the placement of a tensor of `dims` when `tile` is split;
    None where it has no such loop.

    Loops outside of the split one in the same dim become blocks, and loops inside of it become the
    unit. Raises UnsplittableError where no Shard says it: a symbolic size inside a merged dim.

    >>> merged = ShardingRule(((("heads", "width"),),), (), {"heads": 12, "width": 64})
    >>> print(place(merged, merged.operands[0], LoopSplit("heads"), 8))
    S(0, unit=64)
    """
    for index, names in enumerate(dims):
        if tile.loop not in names:
            continue
        at = names.index(tile.loop)
        blocks, unit = tile.blocks, tile.unit
        total = 1
        for position, name in enumerate(names):
            size = rule.sizes[name]
            if isinstance(size, Sym):
                # A part of a symbolic inner loop is no fixed number of blocks or runs of the dim.
                if len(names) > 1:
                    raise UnsplittableError
                return Shard(index)
            total *= size
            if position < at:
                blocks *= size
            elif position > at:
                unit *= size
        if not total:
            raise UnsplittableError  # of no repetitions, no part has any
        return normalized(Shard(index, blocks, unit), total, world_size)
    return None


class UnsplittableError(Exception):
    """This loop cannot be split in this way. Strategies that would need it are left out."""


def tile_of(rule: ShardingRule, dims: Dims, shard: Shard, world_size: int) -> LoopSplit | None:
    """Return the split of a loop that gives a tensor of `dims` the placement `shard`; None where
    there is none. Inverse of `place`.

    >>> merged = ShardingRule(((("heads", "width"),),), (), {"heads": 12, "width": 64})
    >>> tile_of(merged, merged.operands[0], Shard(0, unit=64), 8)
    LoopSplit(loop='heads', blocks=1, unit=1)
    """
    names = dims[shard.dim]
    before = 1
    sizes = [rule.sizes[name] for name in names]
    if any(isinstance(size, Sym) for size in sizes):
        plain = len(names) == 1 and shard.blocks == 1 and shard.unit == 1
        return LoopSplit(names[0]) if plain else None
    whole = 1
    for size in sizes:
        assert isinstance(size, int)
        whole *= size
    if not whole:
        return None  # there is nothing to split
    after = whole
    for name, size in zip(names, sizes, strict=True):
        assert isinstance(size, int)
        # `before` loops lie outside of this one, runs of `after` elements inside.
        after //= size
        if shard.blocks % before == 0 and size % (shard.blocks // before) == 0:
            blocks = shard.blocks // before
            if size // blocks > 1:
                if shard.unit % after == 0 and (size // blocks) % (shard.unit // after) == 0:
                    return LoopSplit(name, blocks, shard.unit // after)
                # A shard that `normalized` has put in its plain form is cut at this loop's runs all
                # the same.
                if shard.unit == 1 and (whole // shard.blocks) % (world_size * after) == 0:
                    return LoopSplit(name, blocks)
        before *= size
    return None


def is_possible(rule: ShardingRule, tile: LoopSplit, world_size: int) -> bool:
    """Return whether the loop divides into such blocks and runs, at least two of them, and into
    parts that the op takes.

    A symbolic dim may turn out shorter than the number of ranks; the last ones then get nothing.
    Nor is it known what its parts are multiples of, so that a loop with a grain is not split.
    """
    size = rule.sizes[tile.loop]
    grain = rule.grain.get(tile.loop, 1)
    if isinstance(size, Sym):
        return tile.blocks == tile.unit == grain == 1
    runs, rest = divmod(size, tile.blocks * tile.unit)
    # One run cannot be shared.
    if rest or runs < 2:
        return False
    # Parts are those of torch.chunk: `step` runs each, and what is left for the last one.
    step = -(-runs // world_size)
    if any(count * tile.blocks * tile.unit % grain for count in (step, runs % step)):
        return False
    # The last rank's part begins at (world_size - 1) * step; beyond the end, it is empty.
    return not rule.needs_elements(tile.loop) or (world_size - 1) * step < runs


def _share(rule: ShardingRule, tile: LoopSplit, world_size: int) -> float:
    """Return the largest rank's share of the work, for the example inputs."""
    runs = hint(rule.sizes[tile.loop]) // (tile.blocks * tile.unit)
    return -(-runs // world_size) / runs


def strategies(
    rule: ShardingRule,
    tiles: Iterable[LoopSplit],
    operand_grads: tuple[bool, ...],
    result_grads: tuple[bool, ...],
    world_size: int,
) -> tuple[Strategy, ...]:
    """Return all strategies of one op on one mesh axis, the plainest first, each once.

    rule: of the call. tiles: the splits of loops to consider. operand_grads, result_grads: whether
    a gradient flows through each tensor; a tensor without one is Invariant where one with a
    gradient would be Replicate, because I and R differ in their gradient alone. world_size: ranks
    on the mesh axis; with one rank nothing is split.
    """
    replicate = Replicate()

    def rep(grad: bool) -> Placement:
        """Return R for a tensor with a gradient, and I for one without."""
        return replicate if grad else Invariant()

    # A dict in place of a set keeps the order, and with it determinism.
    unique: dict[Strategy, None] = {}
    whole = Strategy(
        tuple([Invariant()] * len(operand_grads)), tuple([Invariant()] * len(result_grads))
    )
    unique[whole] = None
    if world_size == 1:
        return (whole,)
    # R and I differ in gradients alone: with R, each rank's gradient is its summand.
    if any(operand_grads) and rule.replicates:
        unique[Strategy(tuple(map(rep, operand_grads)), tuple(map(rep, result_grads)))] = None
    for tile in tiles:
        kernel = rule.kernels.get(tile.loop)
        # A kernel knows where its part begins from the rank alone, so that it takes plain splits
        # only.
        if tile.loop in rule.whole or (kernel is not None and (tile.blocks, tile.unit) != (1, 1)):
            continue
        if not is_possible(rule, tile, world_size):
            continue
        try:
            operands = tuple(
                place(rule, dims, tile, world_size) or rep(grad)
                for dims, grad in zip(rule.operands, operand_grads, strict=True)
            )
            without = kernel.result if kernel else Partial()
            results = tuple(place(rule, dims, tile, world_size) or without for dims in rule.results)
        except UnsplittableError:
            continue
        unique[Strategy(operands, results, tile, _share(rule, tile, world_size), kernel)] = None
    # f(a + b) = f(a) + f(b): each rank may run the op on its summand, and the sum stays pending.
    for group in rule.linear:
        # Constants alone are no pending sums: their product with a whole tensor may become one.
        if any(operand_grads) and not any(operand_grads[index] for index in group):
            continue
        operands = tuple(
            Partial() if index in group else rep(grad) for index, grad in enumerate(operand_grads)
        )
        unique[Strategy(operands, tuple([Partial()] * len(result_grads)))] = None
    return tuple(unique)
