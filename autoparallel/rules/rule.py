"""Sharding rules: the loops of which an op is made, and what a split of them must heed.

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

from autoparallel.graph.graph import Dim, Graph, Node, Value, numel_hint
from autoparallel.graph.row_program import parts_met
from autoparallel.placement import (
    Collective,
    Placement,
)
from autoparallel.rules.inner_work import InnerWork

__all__ = [
    "Exchange",
    "Kernel",
    "OpCall",
    "Shapes",
    "ShardingRule",
    "loop_per_dim",
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
    routed: choices and targets, where the collectives send what a token has to every rank that has
    one of so many chosen targets; (0, 0) where they send a tensor once. moved: bytes that are read
    and written in either pass to pack what is sent, and to add up what comes. merged: bytes
    that are read and written in either pass for each further part that is passed round. alone: its
    loop is split on one mesh axis alone, as who is whose neighbour is known of one axis. loops: of
    each of the collectives, the loops of what it sends, where that has not all of the op's: keys
    that several heads share have no loop of those heads, whose splits leave them as they are.
    """

    name: str
    result: Placement
    collectives: tuple[tuple[Collective, int], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    wraps: bool = False
    routed: tuple[int, int] = (0, 0)
    moved: int = 0
    merged: int = 0
    alone: bool = False
    loops: tuple[frozenset[str], ...] = ()

    def sends(self, at: int, loop: str) -> bool:
        """Return whether collective number `at` sends something that has a loop, so that there is
        less of it where another mesh axis splits the loop.
        """
        return not self.loops or loop in self.loops[at]

    def copies(self, ranks: int) -> float:
        """Return how often the collectives send what they send, for equally likely choices."""
        choices, targets = self.routed
        return parts_met(choices, targets, ranks) if targets else 1.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """A kernel that splits a loop and one of several others together, on the same ranks.

    kernel: what runs. loops: those that can be split with the loop that has this exchange; a tensor
    that has one of them is split along it.
    """

    kernel: Kernel
    loops: tuple[str, ...]


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
    words, if nobody wrote it. pieces: of loops that are parts of another one, laid end to end in
    it: that loop, and where they start and stop in it. Splitting it splits all of them, each by
    itself; they are not split alone. dealt: of the whole loops, those that the ranks of a group may
    split which shares one element of the loop around them. windows: loops along which windows of a
    product move, as a convolution's do.
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
    pieces: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    dealt: frozenset[str] = frozenset()
    windows: frozenset[str] = frozenset()
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    inner: InnerWork | None = None

    def kernel_of(self, loop: str, name: str) -> Kernel | None:
        """Return the kernel of that name that splits the loop, be it with another one; or None."""
        kernel = self.kernels.get(loop)
        if kernel is not None and kernel.name == name:
            return kernel
        exchange = self.exchanges.get(loop)
        if exchange is not None and exchange.kernel.name == name:
            return exchange.kernel
        return None

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
