"""A graph with few of its equal blocks, by which plans of the whole are compared quickly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from autoparallel.graph.graph import Graph
from autoparallel.graph.passes.editing import Rename, rebuilt, renamed
from autoparallel.graph.repeated_blocks import Block, find_repeats

__all__ = ["Shortened", "shortened"]

# Of a chain of equal blocks, the first two and the last one stay: what is in between is as the
# second one.
_FEWEST = 4


@dataclass(frozen=True)
class Shortened:
    """A graph of which blocks are left out, each as one that stays.

    graph: the shorter one. times: how often each run of calls stands in the whole graph, as (name
    of its first call, name of the call behind it, times); other calls stand once. chains: how many
    blocks of the whole each block of a chain stands for, as (name of the chain's first call, name
    of its last call, number).
    """

    graph: Graph
    times: tuple[tuple[str, str, int], ...]
    chains: tuple[tuple[str, str, float], ...]


def shortened(graph: Graph) -> Shortened | None:
    """Return a graph without the middle of its chains of equal blocks; None where it has none.

    A chain is of blocks of one kind, each of which reads what the one before it makes, and nothing
    else reads that. A chain of blocks that are read further on, as over skips, is none.
    """
    repeats = find_repeats(graph)
    by_kind: dict[int, list[Block]] = {}
    for block in repeats.blocks:
        by_kind.setdefault(block.kind, []).append(block)
    names: Rename = {}
    left_out: set[str] = set()
    times: list[tuple[str, str, int]] = []
    every: list[tuple[str, str, float]] = []
    for blocks in by_kind.values():
        for chain in _chains(graph, blocks):
            middle = chain[2:-1]
            for block in middle:
                left_out.update(node.name for node in graph.nodes[block.start : block.stop])
                left_out.update(block.own)
            last = middle[-1]
            names.update(zip(last.outputs, chain[1].outputs, strict=True))
            again = chain[1]
            times.append(
                (
                    graph.nodes[again.start].name,
                    graph.nodes[again.stop - 1].name,
                    len(middle) + 1,
                )
            )
            ends = graph.nodes[chain[0].start].name, graph.nodes[chain[-1].stop - 1].name
            every.append((*ends, len(chain) / 3))
    if not times:
        return None
    nodes = [renamed(node, names) for node in graph.nodes if node.name not in left_out]
    return Shortened(rebuilt(graph, nodes, names).verify(), tuple(times), tuple(every))


def _chains(graph: Graph, blocks: Sequence[Block]) -> list[list[Block]]:
    """Return the chains among blocks of one kind that are long enough to be shortened."""
    chains: list[list[Block]] = []
    for block in blocks:
        if chains and _follows(graph, chains[-1][-1], block):
            chains[-1].append(block)
        else:
            chains.append([block])
    return [chain for chain in chains if len(chain) >= _FEWEST and _is_even(graph, chain)]


def _follows(graph: Graph, one: Block, other: Block) -> bool:
    """Return whether one block stands right before another, which alone reads what it makes."""
    inside = {node.name for node in graph.nodes[other.start : other.stop]}
    returned = {*graph.outputs, *(name for _, name in graph.mutations)}
    return one.stop == other.start and all(
        name not in returned and all(reader.name in inside for reader in graph.readers[name])
        for name in one.outputs
    )


def _is_even(graph: Graph, chain: Sequence[Block]) -> bool:
    """Return whether the blocks behind the first read each other's results at the same places, and
    everything else alike.
    """
    wanted: Mapping[int, int | str] | None = None
    for before, block in pairwise(chain):
        made = {name: place for place, name in enumerate(before.outputs)}
        reads = {place: made.get(name, name) for place, name in enumerate(block.inputs)}
        if len(block.outputs) != len(before.outputs):
            return False
        if wanted is not None and reads != wanted:
            return False
        wanted = reads
    return True
