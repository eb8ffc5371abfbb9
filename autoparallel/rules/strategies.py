"""All strategies of one op on one mesh axis, which follow from its rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from autoparallel.graph.graph import hint
from autoparallel.placement import Invariant, Partial, Placement, Replicate, Shard, local_size
from autoparallel.rules.loop_splits import LoopSplit, UnsplittableError, is_possible, place
from autoparallel.rules.rule import Dims, Kernel, ShardingRule

__all__ = ["Strategy", "strategies"]


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run an op on one mesh axis: a placement for every operand and result.

    operands, results: placements, in the call's order. tile: the split of a loop, None where
    nothing is split. fraction: the largest rank's share of the work. kernel: what runs in place of
    the op, None for the op itself. second: the loop that is split together with that of the tile,
    by an exchange.
    """

    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    tile: LoopSplit | None = None
    fraction: float = 1.0
    kernel: Kernel | None = None
    second: str = ""

    def __str__(self) -> str:
        sides = (", ".join(map(str, side)) for side in (self.operands, self.results))
        return " -> ".join(sides)


def _require_no_sums(tile: LoopSplit, results: tuple[Placement, ...]) -> None:
    """Raise UnsplittableError where ranks that share a part would add it up several times, or would
    have to add up what they share.
    """
    for placement in results:
        if isinstance(placement, Partial) and tile.repeat != 1:
            raise UnsplittableError
        if isinstance(placement, Shard) and placement.repeat != 1 and tile.into:
            raise UnsplittableError


def _share(rule: ShardingRule, tile: LoopSplit, world_size: int) -> float:
    """Return the largest rank's share of the work, for the example inputs."""
    if tile.into:
        return 1 / world_size
    blocks, unit = tile.blocks, tile.unit
    if not (isinstance(blocks, int) and isinstance(unit, int) and tile.repeat == 1):
        size = hint(rule.sizes[tile.loop])
        return local_size(size, tile.shard(0), world_size) / size
    runs = hint(rule.sizes[tile.loop]) // (blocks * unit)
    return -(-runs // world_size) / runs


def _exchanged(
    rule: ShardingRule,
    tile: LoopSplit,
    tiles: tuple[LoopSplit, ...],
    operand_grads: tuple[bool, ...],
    world_size: int,
) -> Iterator[Strategy]:
    """Yield the strategies that split a loop together with another one, by an exchange.

    tiles: the splits that are considered: one of the other loop must be among them, unless that
    loop is split in this way alone.
    """
    # A kernel knows where its part begins from the rank alone, so that it takes plain splits only.
    exchange = rule.exchanges.get(tile.loop) if tile.is_plain else None
    for other in exchange.loops if exchange is not None else ():
        second = LoopSplit(other)
        considered = second in tiles or other in rule.whole
        if not considered or not is_possible(rule, second, world_size):
            continue

        def placed(dims: Dims, whole: Placement, second: LoopSplit = second) -> Placement:
            """Return the placement of a tensor of `dims`; `whole` where it has neither loop."""
            first = place(rule, dims, tile, world_size)
            return first or place(rule, dims, second, world_size) or whole

        assert exchange is not None
        try:
            operands = tuple(
                placed(dims, Replicate() if grad else Invariant())
                for dims, grad in zip(rule.operands, operand_grads, strict=True)
            )
            results = tuple(placed(dims, exchange.kernel.result) for dims in rule.results)
        except UnsplittableError:
            continue
        share = _share(rule, tile, world_size)
        yield Strategy(operands, results, tile, share, exchange.kernel, other)


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
    tiles = tuple(tiles)
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
        if tile.loop in rule.whole or not is_possible(rule, tile, world_size):
            continue
        kernel = rule.kernels.get(tile.loop)
        try:
            operands = tuple(
                place(rule, dims, tile, world_size) or rep(grad)
                for dims, grad in zip(rule.operands, operand_grads, strict=True)
            )
            without = kernel.result if kernel else Partial()
            results = tuple(place(rule, dims, tile, world_size) or without for dims in rule.results)
            if tile.repeat != 1 or tile.into:
                _require_no_sums(tile, results)
        except UnsplittableError:
            continue
        unique[Strategy(operands, results, tile, _share(rule, tile, world_size), kernel)] = None
        for strategy in _exchanged(rule, tile, tiles, operand_grads, world_size):
            unique[strategy] = None
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
