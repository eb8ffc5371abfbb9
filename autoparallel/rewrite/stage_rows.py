"""The rows of a plan by what they are about: a stage finds its own, with no look at all others."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TypeVar

from autoparallel.graph.graph import Graph
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan

__all__ = ["PlanRows"]

Row = TypeVar("Row")


class PlanRows:
    """The rows of a plan, by the names of nodes and values. All are told in the plan's order.

    Example: `PlanRows(plan).ops(stage_graph)`
    """

    def __init__(self, plan: Plan) -> None:
        self._parameters = {row.name: (place, row) for place, row in enumerate(plan.parameters)}
        self._ops = {row.name: (place, row) for place, row in enumerate(plan.ops)}
        self._conversions: dict[str, list[tuple[int, Conversion]]] = {}
        for place, row in enumerate(plan.conversions):
            self._conversions.setdefault(row.value, []).append((place, row))
        self._groups = plan.recomputed
        self._group_of = {
            name: place for place, group in enumerate(plan.recomputed) for name in group
        }
        self._remade = {name: (place, name) for place, name in enumerate(plan.remade)}

    def parameters(self, graph: Graph) -> tuple[ParameterChoice, ...]:
        """Return the rows of the parameters that a part of the graph has."""
        rows = self._parameters
        return _in_order(rows[node.name] for node in graph.nodes if node.name in rows)

    def ops(self, graph: Graph) -> tuple[OpChoice, ...]:
        """Return the rows of the calls of a part of the graph."""
        return _in_order(self._ops[node.name] for node in graph.calls if node.name in self._ops)

    def conversions(self, graph: Graph, arrived: Container[str]) -> tuple[Conversion, ...]:
        """Return the rows of the values of a part of the graph. arrived: values that come in as
        they are read.
        """
        return _in_order(
            row
            for name in graph.values
            if name not in arrived
            for row in self._conversions.get(name, ())
        )

    def recomputed(self, graph: Graph) -> tuple[tuple[str, ...], ...]:
        """Return the calls of a part of the graph that run again, by their groups."""
        calls = {node.name for node in graph.calls}
        groups = sorted({self._group_of[name] for name in calls & self._group_of.keys()})
        return tuple(tuple(name for name in self._groups[at] if name in calls) for at in groups)

    def remade(self, graph: Graph) -> tuple[str, ...]:
        """Return the calls of a part of the graph that are made again one by one."""
        names = (node.name for node in graph.calls)
        return _in_order(self._remade[name] for name in names if name in self._remade)


def _in_order(rows: Iterable[tuple[int, Row]]) -> tuple[Row, ...]:
    """Return rows in the order of their places, which differ."""
    return tuple(row for _, row in sorted(rows, key=lambda each: each[0]))
