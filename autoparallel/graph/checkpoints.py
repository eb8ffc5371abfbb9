"""Regions that the model itself checkpoints, as runs of calls of its graph."""

from __future__ import annotations

from dataclasses import dataclass

from autoparallel.graph.graph import Graph

__all__ = ["REGION", "CheckpointRegion", "find_checkpoints", "without_regions"]

# In a scope, the path of a module with this sign and a number behind it is a region that the
# module's forward checkpoints.
REGION = "#"


@dataclass(frozen=True)
class CheckpointRegion:
    """Calls that the model runs again in its backward pass: nodes[start:stop] of the graph.

    path: of the module that they are the call of, or else of the one whose forward has them.
    """

    path: str
    start: int
    stop: int


def without_regions(scope: tuple[str, ...]) -> tuple[str, ...]:
    """Return the module calls of a scope, without the regions.

    >>> without_regions(("layers.0", "layers.0#1", "layers.0.mlp"))
    ('layers.0', 'layers.0.mlp')
    """
    return tuple(entry for entry in scope if REGION not in entry)


def find_checkpoints(graph: Graph) -> tuple[CheckpointRegion, ...]:
    """Return the outermost regions, in the order of the program; none overlaps another.

    Where passes have put other calls amid a region, its runs are regions by themselves: each can be
    run again without the others.
    """
    runs: list[tuple[tuple[str, ...], int, int]] = []
    for index, node in enumerate(graph.nodes):
        depth = next((at for at, entry in enumerate(node.scope) if REGION in entry), None)
        if node.kind != "call" or depth is None:
            continue
        scope = node.scope[: depth + 1]
        if runs and runs[-1][0] == scope and runs[-1][2] == index:
            runs[-1] = (scope, runs[-1][1], index + 1)
        else:
            runs.append((scope, index, index + 1))
    regions: list[CheckpointRegion] = []
    used: dict[str, int] = {}
    for scope, start, stop in runs:
        below = {node.scope[len(scope) : len(scope) + 1] for node in graph.nodes[start:stop]}
        inside = next(iter(below)) if len(below) == 1 else ()
        path = inside[0] if inside else scope[-1].partition(REGION)[0]
        count = used[path] = used.get(path, -1) + 1
        regions.append(CheckpointRegion(f"{path}@{count}" if count else path, start, stop))
    return tuple(regions)
