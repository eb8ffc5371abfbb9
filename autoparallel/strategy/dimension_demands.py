"""Demands on the dims of a model by their names: "heads on tp", "only batch on dp".

Mesh-TensorFlow's layouts, "batch:dp, heads:tp", are demands of this kind (arXiv:1811.02084). What
the names are is in named_dims.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Node, hint
from autoparallel.placement import Shard
from autoparallel.rules.loop_splits import LoopSplit
from autoparallel.rules.strategies import Strategy
from autoparallel.strategy.asked_model import Allowed, AskedModel, Demand
from autoparallel.strategy.named_dims import OTHER_NAMES, threads_named
from autoparallel.strategy.role_demands import ROLES
from autoparallel.threads import Treatment
from autoparallel.threads.cuts import threads_cut
from autoparallel.threads.thread_names import ROLES as THREAD_NAMES

__all__ = ["DimensionDemand"]

_NO_THREAD = -1


@dataclass(frozen=True)
class DimensionDemand(Demand):
    """A demand that an axis splits dims of these names.

    text: as the user wrote it. names: of dims. axis: the number of the mesh axis. only: the axis
    splits nothing else.

    It is about products, and about look-ups in tables: where one has such a dim, and can be split
    along it, it is. A matrix that has it is stored so. What other ops do, the planner decides.
    """

    text: str
    names: tuple[str, ...]
    axis: int
    only: bool

    @property
    def about(self) -> tuple[int, ...]:
        """The numbers of the mesh axes that it is about."""
        return (self.axis,)

    def states(self, model: AskedModel) -> dict[str, Allowed]:
        """Return the states that it allows; see `Demand`."""
        cuts = _Cuts(model, self.axis)
        wanted: set[int] = set()
        required: set[int] = set()
        for name in self.names:
            threads = threads_named(name, model.threads)
            if not threads:
                raise self.unknown(name, model)
            wanted.update(thread.number for thread in threads)
            # Of several, those that some op needs whole, as a router's scores of its experts, are
            # other dims than the user means.
            passing = [t for t in threads if not t.treated(Treatment.WHOLE)]
            required.update(thread.number for thread in passing or threads)
        states: dict[str, Allowed] = {}
        fulfilled = 0
        known: dict[Any, tuple[Allowed | None, bool]] = {}
        for node in model.network.graph.nodes:
            if node.kind == "call" and model.network.rules[node.name] is not None:
                key = cuts.key(node, wanted, required)
                if key not in known:
                    known[key] = self.of_cuts(
                        cuts.of_call(node), wanted, required if cuts.is_product(node) else set()
                    )
            elif node.kind == "parameter":
                key = cuts.parameter_key(node, wanted, required)
                if key not in known:
                    matrix = len(node.result.shape) > 1
                    known[key] = self.of_cuts(
                        cuts.of_parameter(node), wanted, required if matrix else set()
                    )
            else:
                continue
            allowed, is_fulfilled = known[key]
            fulfilled += is_fulfilled and node.kind == "call"
            if allowed is not None:
                states[node.name] = allowed
        if not fulfilled:
            raise self.impossible(model, required)
        return states

    def of_cuts(
        self,
        cuts: Sequence[frozenset[int] | None],
        wanted: Set[int],
        required: Set[int],
    ) -> tuple[Allowed | None, bool]:
        """Return which states are allowed, None for all, and whether the demand is fulfilled.

        cuts: per state, the threads that the axis cuts; None where it is a cut of no one thread.
        wanted, required: the threads that it may cut and that it must, where it can.
        """
        able = [not self.only or cut is None or cut.issubset(wanted) for cut in cuts]
        must = [
            may and cut is not None and not cut.isdisjoint(required)
            for may, cut in zip(able, cuts, strict=True)
        ]
        if any(must):
            return np.array(must), True
        return (None if all(able) or not any(able) else np.array(able)), False

    def unknown(self, name: str, model: AskedModel) -> PlanError:
        """Return the error for a name that no dim of the model has."""
        # What only the program has, "made by arange", is nothing that a user would name.
        names = [name for name in model.threads.names if name in THREAD_NAMES or "." in name]
        words = dict.fromkeys([*names, *OTHER_NAMES, *ROLES])
        near = get_close_matches(name.lower(), words, 3)
        return PlanError(
            f"constraint {self.text!r}: no dim of the model is called {name!r}",
            why=f"its dims are {', '.join(names)}",
            fix=(f"did you mean {', '.join(near)}? " if near else "")
            + "`autoparallel dims` prints all names",
        )

    def impossible(self, model: AskedModel, required: Collection[int]) -> PlanError:
        """Return the error for dims of which nothing can be split on the axis."""
        axis, ranks = model.network.mesh.axes[self.axis]
        sizes = dict.fromkeys(
            f"{thread.name} has {hint(thread.size)}"
            for thread in model.threads.threads
            if thread.number in required
        )
        why = f"no product or look-up can be split so over {ranks} ranks: {', '.join(sizes)}"
        options = model.network.options
        if not options.data_parallel:
            why += "; and data_parallel=False keeps products from being split along inputs' dims"
        return PlanError(
            f"constraint {self.text!r} is about nothing that {axis} could split",
            why=why,
            fix="give the axis a size that divides one of them, or leave the constraint out",
        )


class _Cuts:
    """The threads that one mesh axis cuts in each state of an op or a parameter."""

    def __init__(self, model: AskedModel, axis: int) -> None:
        self.model, self.axis = model, axis
        self.network, self.threads = model.network, model.threads
        _, self.ranks = model.network.mesh.axes[axis]
        self.loops: dict[str, dict[str, tuple[int, ...]]] = {
            call: {passage.loop: passage.threads for passage in passages if passage.loop}
            for call, passages in self.threads.passages.items()
        }

    def is_product(self, node: Node) -> bool:
        """Return whether a call is a product, or a look-up in a table."""
        rule = self.network.rules[node.name]
        return bool(rule and rule.flops) or bool(self.model.matrices(node))

    def key(self, node: Node, wanted: Collection[int], required: Collection[int]) -> Any:
        """Return what is equal for calls whose states are allowed alike."""
        loops = tuple(
            (loop, tuple((self.size(t), t in wanted, t in required) for t in threads))
            for loop, threads in self.loops[node.name].items()
        )
        return id(self.network.strategies[node.name]), self.is_product(node), loops

    def parameter_key(self, node: Node, wanted: Collection[int], required: Collection[int]) -> Any:
        """Return what is equal for parameters whose states are allowed alike."""
        dims = tuple(
            tuple((self.size(t), t in wanted, t in required) for t in row)
            for row in self.threads.dims[node.result.name]
        )
        return id(self.network.storages[node.name]), dims

    def size(self, thread: int) -> int:
        """Return the size of a thread, for the example inputs."""
        return hint(self.threads.threads[thread].size)

    def of_call(self, node: Node) -> list[frozenset[int] | None]:
        """Return the threads that are cut in each state of a call."""
        loops = self.loops[node.name]

        def cut(part: Strategy) -> frozenset[int] | None:
            if part.tile is None:
                return frozenset()
            within = self.cut(loops.get(part.tile.loop, ()), part.tile)
            if within is None:
                return None
            # Loops that are split along with it: shared heads, the tokens that experts exchange.
            beside = (loops.get(loop, ()) for loop in (part.tile.into, part.second) if loop)
            return within.union(*beside)

        return [cut(joint.parts[self.axis]) for joint in self.network.strategies[node.name]]

    def of_parameter(self, node: Node) -> list[frozenset[int] | None]:
        """Return the threads that are cut in each way to store a parameter."""
        dims = self.threads.dims[node.result.name]

        def cut(placement: object) -> frozenset[int] | None:
            if not isinstance(placement, Shard):
                return frozenset()
            return self.cut(dims[placement.dim], placement)

        return [cut(stored.storage[self.axis]) for stored in self.network.storages[node.name]]

    def cut(self, threads: Sequence[int], split: LoopSplit | Shard) -> frozenset[int] | None:
        """Return the threads that a split of a dim or loop of these threads cuts, as `threads_cut`;
        what it cuts inside of its elements is no thread that has a name.
        """
        cut = threads_cut(threads, [self.size(thread) for thread in threads], split, self.ranks)
        return cut if cut or cut is None else frozenset({_NO_THREAD})
