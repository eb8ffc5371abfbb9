"""A cluster as figures: its devices, the nodes that hold them, and the links between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

from autoparallel.cost.links import Link, joined

__all__ = ["Hardware", "Matmul"]


@dataclass(frozen=True, slots=True)
class Matmul:
    """The speed of products of a given shape, as a share of the peak. See `product_seconds`.

    processors: units that each compute one tile of the result at a time. tiles: (rows, columns) to
    choose from. efficiency: share of the peak on the largest tile and a long sum. fill: length of
    sum that starting and finishing a tile costs. reload: length of a tile's side at which loading
    its operands takes as long as multiplying them. fused: share of that rate which products inside
    of fused attention reach, where its kernels use slower instructions.
    """

    processors: int = 1
    tiles: tuple[tuple[int, int], ...] = ((1, 1),)
    efficiency: float = 1.0
    fill: float = 0.0
    reload: float = 0.0
    fused: float = 1.0


@dataclass(frozen=True)
class Hardware:
    """A cluster of nodes of equal devices, one rank on each device.

    name, source: for people; source says where the figures come from. flops_per_second: (itemsize,
    peak) pairs of products. memory_bytes_per_second: peak, of which memory_efficiency is sustained.
    launch_seconds: of starting one kernel. spread: standard deviation, relative, of the time of
    equal work on the devices. inside: the link between devices of a node. network: between nodes,
    bytes_per_second being one device's share. memory_by_size: (bytes that a kernel moves, bytes per
    second) pairs, ascending, where caches make short arrays faster than long ones; sustained at all
    sizes if empty. functions_per_second: of exponentials and their like, element by element; 0
    where memory is always slower. exponentials_per_second: of those inside of fused attention,
    which has its elements at hand; 0 where they are not the matter. device: "gpu" or "cpu", by
    which torch has one kernel for an op or makes it of others, which save more.

    Example: `find_hardware("dgx-a100").device_memory_bytes`
    """

    name: str
    source: str
    devices_per_node: int
    device_memory_bytes: int
    flops_per_second: tuple[tuple[int, float], ...]
    memory_bytes_per_second: float
    memory_efficiency: float
    launch_seconds: float
    spread: float
    matmul: Matmul
    inside: Link
    network: Link
    memory_by_size: tuple[tuple[int, float], ...] = ()
    functions_per_second: float = 0.0
    exponentials_per_second: float = 0.0
    device: str = "gpu"

    def peak(self, itemsize: int) -> float:
        """Return the peak rate of products of elements of `itemsize` bytes, in FLOP/s.

        Sizes without a figure run at the rate of the next wider type that has one.

        >>> from autoparallel.cost.hardware import find_hardware
        >>> hardware = find_hardware("dgx-a100")
        >>> hardware.peak(1) == hardware.peak(2) > hardware.peak(4)
        True
        """
        rates = dict(self.flops_per_second)
        return rates[min((size for size in rates if size >= itemsize), default=max(rates))]

    @cached_property
    def sustained_bytes_per_second(self) -> float:
        """The rate that kernels reach which read and write long arrays."""
        return self.memory_bytes_per_second * self.memory_efficiency

    def links(self, axis_sizes: tuple[int, ...]) -> tuple[Link, ...]:
        """Return the link of every mesh axis, ranks being numbered with the last axis innermost.

        axis_sizes: of the mesh, outermost first. An axis of size n and stride s has m = min(n,
        devices_per_node // s) members in a node. An axis that stays inside a node has the node's
        link. Otherwise m network shares carry what passes between nodes, as far as the node's own
        link can follow.
        """
        links = []
        stride = math.prod(axis_sizes)
        for size in axis_sizes:
            # The stride of an axis is the number of ranks inside it.
            stride //= size
            links.append(self._link(size, min(size, max(self.devices_per_node // stride, 1))))
        return tuple(links)

    def slowest(self, devices: int) -> float:
        """Return by what factor the slowest of so many devices takes longer than the mean one.

        All wait for it. The largest of n draws from a normal distribution, as Blom (1958) puts it.

        >>> from autoparallel.cost.hardware import find_hardware
        >>> find_hardware("dgx-a100").slowest(1)
        1.0
        """
        if devices == 1:
            return 1.0
        return 1.0 + self.spread * NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))

    def at_pace_of(self, devices: int) -> Hardware:
        """Return hardware whose devices all work at the pace of the slowest of so many.

        In each step the others wait for the slowest, so that its pace is everyone's.
        """
        slower = self.slowest(devices)
        return replace(
            self,
            flops_per_second=tuple((size, rate / slower) for size, rate in self.flops_per_second),
            memory_bytes_per_second=self.memory_bytes_per_second / slower,
            memory_by_size=tuple((size, rate / slower) for size, rate in self.memory_by_size),
            functions_per_second=self.functions_per_second / slower,
            exponentials_per_second=self.exponentials_per_second / slower,
            launch_seconds=self.launch_seconds * slower,
            # The spread is in the rates now, and must not count twice.
            spread=0.0,
        )

    def _link(self, size: int, members: int) -> Link:
        """Return the link of an axis with `members` of its `size` ranks in one node."""
        if size == 1:
            return self.inside
        nodes = -(-size // members)
        if nodes == 1:
            return Link(tuple(joined(each, each, size, size, 1) for each in self.inside.regimes))
        outside = {each.way: each for each in self.network.regimes}
        regimes = []
        for near in self.inside.regimes:
            # A regime that one of the two parts lacks cannot cross nodes.
            far = outside.get(near.way)
            if far is not None:
                regimes.append(joined(near, far, size, members, nodes))
        return Link(tuple(regimes))
