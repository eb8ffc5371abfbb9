"""The least that a step of a pipeline takes: each rank's share of what all ranks compute, and the
wait of ranks while the pipeline fills and drains.
"""

from __future__ import annotations

from dataclasses import replace

from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.graph import Graph
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.strategy.build_network import build_network

__all__ = ["least_seconds", "seconds_alone"]

# Schedules in which ranks have nothing else to do while the pipeline fills and drains.
_WITH_BUBBLE = ("gpipe", "1f1b")


def seconds_alone(graph: Graph, options: Options) -> float:
    """Return the seconds that one mean device would compute for the whole step of a model, with
    nothing sent, updated or computed again; 0 where parts may take less than their share.

    graph: with the sizes that are planned for.

    Example: `seconds_alone(captured.graph, Options())`
    """
    hardware = find_hardware(options.hardware)
    # Parts that a cache holds are read faster than the whole is.
    if hardware.memory_by_size:
        return 0.0
    free = replace(options, memory_limit=None, recompute="none", data_parallel=True)
    network = build_network(graph, Mesh(tp=1), hardware, free)
    return sum(min(cost.seconds for cost in costs) for costs in network.costs.values())


def least_seconds(
    alone: float, options: Options, ranks: int, inside: Mesh, microbatches: int
) -> float:
    """Return the least that a step of a pipeline takes, whatever its stages and layouts are.

    alone: as of `seconds_alone`. options: with the schedule and the number of stages on each rank.
    ranks: that share out the stages. inside: the mesh of those of one stage.
    Parts of an op take no less than their shares of it. While a rank waits for others, they work at
    the pace of their own devices; the one that all wait for has the slowest device.

    >>> options = Options(hardware="dgx-a100", stages_per_rank=1)
    >>> one, two = (least_seconds(8.0, options, 2, Mesh(tp=2), count) for count in (4, 1))
    >>> one < two
    True
    """
    hardware = find_hardware(options.hardware)
    devices = inside.world_size
    share = alone / (ranks * devices)
    waits = (ranks - 1) / options.each_rank / microbatches if options.order in _WITH_BUBBLE else 0.0
    return share * (hardware.slowest(ranks * devices) + waits * hardware.slowest(devices))
