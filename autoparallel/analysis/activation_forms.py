"""Saved activations in closed form, found by doubling one size after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import sympy

from autoparallel.analysis.abstract_execution import AbstractExecution, Storage
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.symbolic_sizes import Algebra
from autoparallel.graph.graph import Graph
from autoparallel.mesh import Mesh
from autoparallel.placement import Layout
from autoparallel.plan import Plan

__all__ = ["ActivationForms"]

_ITEMSIZES = (1, 2, 4, 8)


class ActivationForms:
    """Closed forms of every storage that waits for the backward pass, in bytes on the busiest rank.

    plan, graph: of one program. algebra: the symbols of its sizes. received: see
    AbstractExecution. The plan's program is executed abstractly as planned, and once more per
    symbol with that size doubled. A storage that grows by
    2^p has the symbol to the power p.

    Example: `dict(ActivationForms(plan, graph, algebra).forms())`
    """

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        algebra: Algebra,
        received: Mapping[str, Layout] | None = None,
    ) -> None:
        self.plan, self.graph, self.algebra, self.received = plan, graph, algebra, received

    def forms(self) -> Iterator[tuple[str, sympy.Expr]]:
        """Yield (name of the value or node that a storage is of, its bytes as an expression)."""
        plan, algebra = self.plan, self.algebra
        storages = _saved_storages(self.graph, plan, self.received)
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
        """Return the storages that are saved where one size is twice as large."""
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
        return _saved_storages(graph, plan, self.received)

    def form(self, storage: Storage, powers: dict[sympy.Symbol, int]) -> sympy.Expr:
        """Return a monomial that equals the storage's bytes; by its dims' names where it is a
        value's.

        powers: of the symbols, as found by doubling.
        """
        monomial, monomial_here = sympy.Integer(1), sympy.Integer(1)
        for symbol, power in powers.items():
            monomial *= symbol**power
            monomial_here *= sympy.Integer(self.algebra.values[symbol]) ** power
        value = self.graph.values.get(storage.name)
        if value is not None:
            shape = sympy.Integer(1)
            for dim in value.shape:
                shape *= self.algebra.size(dim)
            axes = {s: p for s, p in powers.items() if s in self.algebra.axes}
            for symbol, power in axes.items():
                shape *= symbol**power
            # The shape is tried first: it says "b s h" where the bytes alone would only give a
            # number.
            for itemsize in _ITEMSIZES:
                if self.algebra.at(itemsize * shape) == storage.nbytes:
                    return itemsize * shape
        rest = sympy.Integer(storage.nbytes) / monomial_here
        return monomial * (self.algebra.named(int(rest)) if rest.is_integer else rest)


def _saved_storages(
    graph: Graph, plan: Plan, received: Mapping[str, Layout] | None
) -> dict[tuple[str, int], Storage]:
    """Return the storages that wait for the backward pass, by name and how many of that name come
    before.
    """
    execution = AbstractExecution(graph, plan, plan.recomputed, received, remade=plan.remade)
    storages: dict[tuple[str, int], Storage] = {}
    for number in Liveness(execution).saved:
        storage = execution.storages[number]
        # Names with a number identify storages across executions with other sizes; their own
        # numbers may differ.
        count = 0
        while (storage.name, count) in storages:
            count += 1
        storages[storage.name, count] = storage
    return storages
