"""The splits of each op that are worth considering: its own, and those its neighbours need."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from autoparallel.graph.graph import Graph, Node, Sym
from autoparallel.options import Options
from autoparallel.placement import Shard
from autoparallel.rules.loop_splits import (
    LoopSplit,
    UnsplittableError,
    is_possible,
    own_split,
    place,
    tile_of,
    tiles_of_piece,
)
from autoparallel.rules.rule import Dims, ShardingRule

__all__ = ["CandidateSplits"]


class CandidateSplits:
    """The candidate splits of every call, and the shards of every value, for one number of ranks.

    tiles: per call, the ways to split one of its loops. shards: per value, the ways in which it may
    be split.
    rules: per call node; calls without one are left unsplit. weights: see `graph.weight_values`.
    world_size: the number of ranks of one mesh axis. sparing: only products, and ops with kernels,
    suggest ways of their own; the others take those that these spread, and along symbolic dims
    those that products may not be split in. batch: nothing but the batch
    of the inputs is split: their first dim, and all of its size where that is symbolic.
    """

    def __init__(
        self,
        graph: Graph,
        rules: Mapping[str, ShardingRule | None],
        weights: set[str],
        options: Options,
        world_size: int,
        sparing: bool = False,
        batch: bool = False,
    ) -> None:
        self.graph, self.rules, self.weights = graph, rules, weights
        self.options, self.world_size = options, world_size
        self.reads = {node.name: node.operands() for node in graph.calls}
        self.tensors = {
            node.name: (*self.reads[node.name], *(value.name for value in node.results))
            for node in graph.calls
        }
        self.shards: dict[str, dict[Shard, None]] = {name: {} for name in graph.values}
        self.tiles: dict[str, dict[LoopSplit, None]] = {}
        products = [name for name, rule in rules.items() if rule is not None and rule.flops]
        self.sparing = sparing and bool(products)
        if world_size > 1 and batch:
            self.find_batch()
        elif world_size > 1:
            self.find_tiles()

    def find_batch(self) -> None:
        """Find the splits of ops that follow from a split of the inputs' batch."""
        inputs = [node.result for node in self.graph.nodes if node.kind == "input"]
        batch = [value.shape[0] for value in inputs if value.shape]
        sizes = [size for size in batch if isinstance(size, Sym)]
        calls = {node.name: node for node in self.graph.calls}
        for name, rule in self.rules.items():
            if rule is not None:
                self.tiles[name] = {}
        work: list[tuple[str, LoopSplit]] = []
        for value in inputs:
            for dim, size in enumerate(value.shape):
                # A loss may have fixed the sizes of the inputs that it compares, and no others.
                if not (size in sizes or (dim == 0 and not isinstance(size, Sym))):
                    continue
                shard = Shard(dim)
                self.shards[value.name][shard] = None
                for reader in self.graph.readers[value.name]:
                    work += self.receive(reader, value.name, shard)
        self.follow(calls, work)

    def find_tiles(self) -> None:
        """Find the splits, from every loop's own to those its neighbours need, until none is new.

        A view that divides a dim, or cuts it into blocks, asks the product that made the value to
        split the same way; so do readers of what the producers offer.
        """
        work: list[tuple[str, LoopSplit]] = []
        for node in self.graph.calls:
            rule = self.rules[node.name]
            if rule is None:
                continue
            tiles = self.tiles.setdefault(node.name, {})
            symbolic = [loop for loop in rule.loops if isinstance(rule.sizes[loop], Sym)]
            static = [loop for loop in rule.loops if loop not in symbolic]
            if self.sparing and not (rule.flops or rule.kernels or rule.pieces):
                # Without data parallelism products are split along no batch or sequence, and would
                # not suggest them: the ops between are split so of their own (arXiv:2205.05198).
                if self.options.data_parallel:
                    continue
                static = []
            # Candidates that are listed first win ties. Where two symbolic dims cost the same, the
            # inner one (the sequence) is preferred to the outer one (the batch).
            for loop in (*static, *reversed(symbolic)):
                tile = own_split(rule, loop)
                if self.is_allowed(node, rule, tile):
                    tiles[tile] = None
                    work.append((node.name, tile))
            for tile in self.in_groups(rule):
                if self.is_allowed(node, rule, tile):
                    tiles[tile] = None
                    work.append((node.name, tile))
        self.follow({node.name: node for node in self.graph.calls}, work)

    def follow(self, calls: Mapping[str, Node], work: list[tuple[str, LoopSplit]]) -> None:
        """Tell neighbours of new splits, and these their neighbours, until none is new."""
        while work:
            fresh: list[tuple[str, LoopSplit]] = []
            for name, tile in work:
                fresh += self.spread(calls[name], tile)
            work = fresh

    def in_groups(self, rule: ShardingRule) -> list[LoopSplit]:
        """Return the splits of loops of a product that have fewer elements than there are ranks,
        such as heads of keys, together with the loop inside of each, such as the heads of queries
        that read the same keys.
        """
        pairs = {
            pair: None
            for dims in (*rule.operands, *rule.results)
            for names in dims
            for pair in pairwise(names)
        }
        return [LoopSplit(outer, into=inner) for outer, inner in pairs if rule.flops]

    def spread(self, node: Node, tile: LoopSplit) -> list[tuple[str, LoopSplit]]:
        """Tell the neighbours how the tensors of `node` lie when it is split by `tile`.

        Returns the calls and tiles that are new thereby.
        """
        rule = self.rules[node.name]
        assert rule is not None
        fresh: list[tuple[str, LoopSplit]] = []
        for name, dims in zip(
            self.tensors[node.name], (*rule.operands, *rule.results), strict=True
        ):
            try:
                shard = place(rule, dims, tile, self.world_size)
            except UnsplittableError:
                continue
            # A shard that is known has been told to the neighbours already, so the search ends.
            if shard is None or shard in self.shards[name]:
                continue
            self.shards[name][shard] = None
            for neighbour in (self.graph.producers[name], *self.graph.readers[name]):
                if neighbour.kind == "call" and neighbour.name != node.name:
                    fresh += self.receive(neighbour, name, shard)
        return fresh

    def receive(self, node: Node, name: str, shard: Shard) -> list[tuple[str, LoopSplit]]:
        """Return the tiles of `node` that give its tensor `name` that shard, if they are new."""
        rule = self.rules[node.name]
        if rule is None:
            return []
        fresh: list[tuple[str, LoopSplit]] = []
        for tensor, dims in zip(
            self.tensors[node.name], (*rule.operands, *rule.results), strict=True
        ):
            if tensor != name:
                continue
            for tile in self.asked(node, rule, dims, shard):
                if tile not in self.tiles[node.name] and self.is_allowed(node, rule, tile):
                    self.tiles[node.name][tile] = None
                    fresh.append((node.name, tile))
        return fresh

    def asked(self, node: Node, rule: ShardingRule, dims: Dims, shard: Shard) -> list[LoopSplit]:
        """Return the tiles of `node` that give a tensor of `dims` that shard: one at most, but for
        a piece of a loop, which is combined with what the other pieces may be.
        """
        names = dims[shard.dim]
        if shard.repeat != 1:
            shared = [tile for tile in self.in_groups(rule) if tile.loop in names]
            if shared:
                return [
                    tile
                    for tile in shared
                    if is_possible(rule, tile, self.world_size)
                    and _placed(rule, dims, tile, self.world_size) == shard
                ]
        if len(names) != 1 or names[0] not in rule.pieces:
            tile = tile_of(rule, dims, shard, self.world_size)
            return [] if tile is None else [tile]
        known = {
            loops[shard.dim][0]: [at for at in self.shards[tensor] if at.dim == shard.dim]
            for tensor, loops in zip(
                self.tensors[node.name], (*rule.operands, *rule.results), strict=True
            )
            if loops[shard.dim] and loops[shard.dim][0] in rule.pieces
        }
        return list(tiles_of_piece(rule, names[0], shard, known))

    def is_allowed(self, node: Node, rule: ShardingRule, tile: LoopSplit) -> bool:
        """Say whether the options and the sizes let this call be split so."""
        if tile.loop in rule.whole or not is_possible(rule, tile, self.world_size):
            return False
        # Symbolic dims are batch and sequence: to split them is data or sequence parallelism.
        if isinstance(rule.sizes[tile.loop], Sym) and not (
            self.options.sequence_parallel or self.options.data_parallel
        ):
            return False
        if self.options.data_parallel:
            return True
        # Without data parallelism each rank computes its part of every product for the whole batch,
        # and uses a weight matrix only as it is split.
        if rule.flops and isinstance(rule.sizes[tile.loop], Sym) and not self.is_stuck(node, rule):
            return False
        for operand, dims in zip(self.reads[node.name], rule.operands, strict=True):
            matrix = operand in self.weights and sum(bool(names) for names in dims) >= 2
            if matrix and not any(tile.loop in names for names in dims):
                return False
        return True

    def is_stuck(self, node: Node, rule: ShardingRule) -> bool:
        """Return whether a product of activations alone has nothing but symbolic dims to split.

        Attention with one head is such a product: every rank would compute all of it, unless each
        takes some of the queries.
        """
        if not self.options.sequence_parallel or self.weights & set(self.reads[node.name]):
            return False
        return not any(
            loop not in rule.whole and is_possible(rule, LoopSplit(loop), self.world_size)
            for loop in rule.loops
            if not isinstance(rule.sizes[loop], Sym)
        )


def _placed(rule: ShardingRule, dims: Dims, tile: LoopSplit, world_size: int) -> Shard | None:
    """Return the placement of a tensor; None, too, where none says it."""
    try:
        return place(rule, dims, tile, world_size)
    except UnsplittableError:
        return None
