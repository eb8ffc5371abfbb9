"""The least bytes that a plan takes on a rank, table by table: known before it is a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from autoparallel.strategy.cost_network import CostNetwork

__all__ = ["LeastBytes"]


class LeastBytes:
    """Bytes of parameters, their gradients and the optimizer's states by how each is stored, and of
    what each op saves for its backward pass by how it is split.

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

    def of(self, assignment: Mapping[str, int]) -> float:
        """Return the bytes of an assignment. assignment: the state of every variable."""
        tables = self.tables.items()
        return self.fixed_nbytes + math.fsum(table[assignment[name]] for name, table in tables)

    def among(self, states: Mapping[str, NDArray[np.bool_]]) -> float:
        """Return the least bytes of all assignments in the given states.

        states: by variable, whether each state is possible; of those left out, all are.
        """
        least: dict[tuple[int, int], float] = {}
        total = [self.fixed_nbytes]
        for name, table in self.tables.items():
            some = states.get(name)
            # Equal variables have the same arrays.
            key = (id(table), id(some))
            if key not in least:
                least[key] = float(np.min(table if some is None else table[some]))
            total.append(least[key])
        return math.fsum(total)
