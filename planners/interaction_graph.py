"""The networkx graph of variables that share a table: what is solved apart, and how narrow it is.

Eliminating a variable joins all its neighbours. The largest number of neighbours that any variable
has when it goes is the width of the order; no order has less than the graph's treewidth.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from planners.problem import Problem
from planners.reduction import Network

if TYPE_CHECKING:  # imported when needed: most plans are made without it
    import networkx

__all__ = ["components", "interaction_graph", "network_graph", "width_of_order"]


def interaction_graph(problem: Problem) -> networkx.Graph:
    """Return the problem's variables, by place, with an edge for every two that share a factor."""
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(problem.variables)))
    for scope in problem.scopes():
        for place, first in enumerate(scope):
            graph.add_edges_from((first, second) for second in scope[place + 1 :])
    return graph


def network_graph(network: Network) -> networkx.Graph:
    """Return the graph of the variables that are still to be decided."""
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(variable for variable, size in enumerate(network.sizes) if size > 1)
    for variable, around in enumerate(network.neighbors()):
        graph.add_edges_from((variable, other) for other in around)
    return graph


def components(graph: networkx.Graph) -> list[list[int]]:
    """Return lists of variables, each ascending, by first variable; nothing connects different
    lists.

    What the variables of one list take says nothing of the others: each is a problem of its own.
    """
    import networkx

    return sorted(sorted(part) for part in networkx.connected_components(graph))


def width_of_order(graph: networkx.Graph, order: Iterable[int]) -> int:
    """Return the most neighbours that a variable has when it is eliminated in this order."""
    left = graph.copy()
    width = 0
    for variable in order:
        around = list(left[variable])
        width = max(width, len(around))
        left.remove_node(variable)
        for place, first in enumerate(around):
            left.add_edges_from((first, second) for second in around[place + 1 :])
    return width
