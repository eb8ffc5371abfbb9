"""What is kept for the backward pass, in closed form: seen as sizes double, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import sympy

from autoparallel.analysis.abstract_execution import AbstractExecution, Storage
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.symbolic_sizes import Algebra
from autoparallel.graph.graph import Graph
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan

__all__ = ["KeptForms"]

_ITEMSIZES = (1, 2, 4, 8)


class KeptForms:
    """Every storage that waits for the backward pass, with its bytes on the busiest rank.

    The plan's program is walked as planned, and once more per symbol with that size doubled. How a
    storage grows gives the power in which it has the symbol.
    """

    def __init__(self, plan: Plan, graph: Graph, algebra: Algebra) -> None:
        self.plan, self.graph, self.algebra = plan, graph, algebra

    def forms(self) -> Iterator[tuple[str, sympy.Expr]]:
        """(name of the value or node that it is of, bytes)."""
        plan, algebra = self.plan, self.algebra
        storages = _kept(self.graph, plan)
        powers: dict[tuple[str, int], dict[sympy.Symbol, int]] = {key: {} for key in storages}
        for symbol in (*algebra.inputs, *algebra.axes):
            grown = self.doubled(symbol)
            for key, storage in storages.items():
                power = key in grown and algebra.power(storage.nbytes, grown[key].nbytes)
                if power:
                    powers[key][symbol] = power
        for key, storage in storages.items():
            yield storage.name, self.form(storage, powers[key])

    def doubled(self, symbol: sympy.Symbol) -> dict[tuple[str, int], Storage]:
        """What is kept where one size is twice as large."""
        plan, graph = self.plan, self.graph
        if symbol in self.algebra.axes:
            axis = self.algebra.axes.index(symbol)
            sizes = [
                (name, size * 2 if at == axis else size)
                for at, (name, size) in enumerate(plan.mesh.axes)
            ]
            plan = replace(plan, mesh=Mesh(**dict(sizes)))
        else:
            graph = self.algebra.grown(graph, symbol, 2)
        return _kept(graph, plan)

    def form(self, storage: Storage, powers: dict[sympy.Symbol, int]) -> sympy.Expr:
        """A monomial that is what the storage takes; by its dims' names where it is a value's."""
        own, hints = sympy.Integer(1), sympy.Integer(1)
        for symbol, power in powers.items():
            own *= symbol**power
            hints *= sympy.Integer(self.algebra.values[symbol]) ** power
        value = self.graph.values.get(storage.name)
        if value is not None:
            shape = sympy.Integer(1)
            for dim in value.shape:
                shape *= self.algebra.size(dim)
            axes = {s: p for s, p in powers.items() if s in self.algebra.axes}
            for symbol, power in axes.items():
                shape *= symbol**power
            for itemsize in _ITEMSIZES:
                if self.algebra.at(itemsize * shape) == storage.nbytes:
                    return itemsize * shape
        rest = sympy.Integer(storage.nbytes) / hints
        return own * (self.algebra.named(int(rest)) if rest.is_integer else rest)


def _kept(graph: Graph, plan: Plan) -> dict[tuple[str, int], Storage]:
    """What is kept, by its name and how many of that name come before."""
    walk = AbstractExecution(graph, plan, plan.recomputed)
    found: dict[tuple[str, int], Storage] = {}
    for number in Liveness(walk).kept:
        storage = walk.storages[number]
        count = 0
        while (storage.name, count) in found:
            count += 1
        found[storage.name, count] = storage
    return found
