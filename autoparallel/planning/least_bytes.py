"""The least bytes that a plan takes on a rank, table by table: known before it is a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.op_costs import nbytes
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.strategy.cost_network import CostNetwork

__all__ = ["LeastBytes"]

# Per op, by the op's states.
_Tables = tuple[tuple[str, NDArray[np.float64]], ...]


class LeastBytes:
    """Bytes of parameters, their gradients and the optimizer's states by how each is stored, and of
    what each op saves for its backward pass by how it is split: what it makes, and what it reads.

    A plan has all of these at once when its backward pass begins, beside copies in other layouts.
    So where these alone are over a limit, a plan is out before its memory is counted, and a family
    of plans before it is solved.
    network: of the plans. counted: the network of the same graph and mesh that counts bytes; None
    for parameters alone.

    Example: `LeastBytes(network, counted).of(solution.assignment) <= limit`
    """

    def __init__(self, network: CostNetwork, counted: CostNetwork | None = None) -> None:
        self.fixed_nbytes = counted.fixed_nbytes if counted is not None else 0.0
        self.tables: dict[str, NDArray[np.float64]] = {}
        for name, table in network.updates.items():
            assert table.usage is not None
            self.tables[name] = table.usage
        for name, usage in counted.usage.items() if counted is not None else ():
            # What a block saves that is run again in every plan is made again.
            if name not in network.repeats:
                assert len(usage) == len(network.strategies[name])
                self.tables[name] = usage
        # Of readers that save one value, the one that saves most counts: they may share a copy.
        self.read: tuple[_Tables, ...] = ()
        if counted is not None:
            self.read = tuple(_read(network, counted).values())

    def of(self, assignment: Mapping[str, int]) -> float:
        """Return the bytes of an assignment. assignment: the state of every variable."""
        own = [table[assignment[name]] for name, table in self.tables.items()]
        read = [max(table[assignment[name]] for name, table in saved) for saved in self.read]
        return self.fixed_nbytes + math.fsum(own) + math.fsum(read)

    def among(self, states: Mapping[str, NDArray[np.bool_]]) -> float:
        """Return the least bytes of all assignments in the given states.

        states: by variable, whether each state is possible; of those left out, all are.
        """
        known: dict[tuple[int, int], float] = {}

        def least(name: str, table: NDArray[np.float64]) -> float:
            """Return the least of a table in the states of its variable."""
            some = states.get(name)
            # Equal variables have the same arrays.
            key = (id(table), id(some))
            if key not in known:
                known[key] = float(np.min(table if some is None else table[some]))
            return known[key]

        own = [least(name, table) for name, table in self.tables.items()]
        read = [max(least(name, table) for name, table in saved) for saved in self.read]
        return self.fixed_nbytes + math.fsum(own) + math.fsum(read)


def _read(network: CostNetwork, counted: CostNetwork) -> dict[str, _Tables]:
    """Return, per value that ops compute and others save, the bytes of it that each of these saves,
    by how that op is split.

    network, counted: as of `LeastBytes`. Left out is what its own producer saves, which the tables
    of ops count; what is run again in every plan; and what kernels save, each in its own way.
    """
    assert counted.recomputation is not None
    saved, graph = counted.recomputation.saved, network.graph
    assert saved is not None
    sizes = tuple(size for _, size in network.mesh.axes)
    tables: dict[tuple[object, ...], NDArray[np.float64]] = {}

    def places() -> Iterator[tuple[str, str, str, int]]:
        """Yield the root, the value, and the op and the place at which it is read and saved."""
        order = {node.name: place for place, node in enumerate(graph.nodes)}
        for node in graph.calls:
            # Tables of ops count what is there at one moment, which is then that of all.
            if order[node.name] > counted.moment.place:
                continue
            flags = saved.of(node.name).operands if node.name not in network.repeats else ()
            for place, (value, is_saved) in enumerate(zip(node.operands(), flags, strict=False)):
                root = saved.storage_of(value)
                producer = graph.producers[root]
                if not is_saved or producer.kind != "call" or producer.name in network.repeats:
                    continue
                names = [result.name for result in producer.results]
                if not saved.of(producer.name).results[names.index(root)]:
                    yield root, value, node.name, place

    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for root, name, reader, place in places():
        value = graph.values[name]
        # What is expanded has more elements than there is memory.
        if nbytes(value) > nbytes(graph.values[root]):
            continue
        joints = network.strategies[reader]
        key = id(joints), place, value.shape, value.dtype
        if key not in tables:
            tables[key] = np.array(
                [
                    0.0
                    if any(joint.kernels)
                    else nbytes(value) * layout_fraction(value.shape, joint.operands[place], sizes)
                    for joint in joints
                ]
            )
        readers = found.setdefault(root, {})
        known = readers.get(reader)
        # An op that reads one value twice saves it once, or twice in two layouts.
        readers[reader] = tables[key] if known is None else np.maximum(known, tables[key])
    return {root: tuple(readers.items()) for root, readers in found.items()}
