"""The model as demands see it: its network of choices, the paths of its parameters, its dims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Node
from autoparallel.mesh import MICROBATCH, PIPELINE
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.support.pytree import leaf_paths
from autoparallel.threads import Threads, find_threads

__all__ = ["Allowed", "AskedModel", "Demand", "axis_index"]

# Which states of a variable are as demanded.
Allowed = NDArray[np.bool_]


@dataclass(frozen=True)
class AskedModel:
    """A model of which something is demanded. network: its choices. captured: its program."""

    network: CostNetwork
    captured: Captured

    @cached_property
    def paths(self) -> Mapping[str, Sequence[str]]:
        """All paths of a parameter, by the one that the graph knows it by: tied weights have
        several.
        """
        paths: dict[str, list[str]] = {}
        for path, graph_path in self.captured.aliases.items():
            paths.setdefault(graph_path, []).append(path)
        return paths

    def names(self, node: Node) -> Sequence[str]:
        """Return the paths that a node is known by: a parameter's own, or the module of a call."""
        if node.kind == "parameter":
            return self.paths.get(node.target, [node.target])
        return [node.where] if node.kind == "call" and node.where else []

    @cached_property
    def modules(self) -> Sequence[str]:
        """The modules that calls are in, each once."""
        return tuple(dict.fromkeys(node.where for node in self.network.graph.calls if node.where))

    @cached_property
    def threads(self) -> Threads:
        """The dims of the model, by name."""
        graph, rules = self.network.graph, self.network.rules
        inputs = [node.name for node in graph.nodes if node.kind == "input"]
        paths = leaf_paths(self.captured.inputs, "tensor")
        names = dict(zip(inputs, paths, strict=True)) if len(inputs) == len(paths) else {}
        return find_threads(graph, names, lambda call: rules.get(call.node.name))

    @cached_property
    def weight_paths(self) -> Mapping[str, frozenset[str]]:
        """The paths of the parameters that each weight, a value of parameters alone, is made of."""
        made_of: dict[str, frozenset[str]] = {}
        for node in self.network.graph.nodes:
            if node.kind == "parameter":
                own = frozenset(self.names(node))
            elif node.kind == "call":
                own = frozenset().union(*(made_of.get(name, ()) for name in node.operands()))
            else:
                continue
            for value in node.results:
                if value.name in self.network.weights:
                    made_of[value.name] = own
        return made_of

    def matrices(self, node: Node) -> list[str]:
        """Return the weights of two dims or more that a call reads, to make what is no weight."""
        weights, values = self.network.weights, self.network.graph.values
        if any(value.name in weights for value in node.results):
            return []
        return [name for name in node.operands() if name in weights and len(values[name].shape) > 1]


class Demand:
    """A Demand on a plan. text: as the user wrote it."""

    text: str

    @property
    def about(self) -> tuple[int, ...]:
        """The numbers of the mesh axes that it is about."""
        raise NotImplementedError

    def states(self, model: AskedModel) -> dict[str, Allowed]:
        """Return, per variable that it restricts, which of its states are as demanded.

        Raises PlanError for a demand that is about nothing in the model, or that nothing can heed.
        """
        raise NotImplementedError


def axis_index(text: str, axis: str, names: Sequence[str]) -> int:
    """Return the number of a mesh axis. text: the demand that names it. names: of all axes.

    Raises PlanError where there is none of that name.

    >>> axis_index("heads on tp", "tp", ("dp", "tp"))
    1
    """
    # Micro-batches are no ranks, and stages are no splits: what each stage has is cut afterwards.
    able = [name for name in names if name != MICROBATCH]
    if axis not in able:
        has_stages = axis == PIPELINE and len(able) < len(names)
        what = f"{axis} has stages, which split no tensor" if has_stages else ""
        raise PlanError(
            f"constraint {text!r}: {what or f'the mesh has no axis {axis!r}'}",
            fix=f"its axes are {', '.join(able)}" if able else "leave the constraint out",
        )
    return names.index(axis)
