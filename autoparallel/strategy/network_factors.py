"""Factors of a cost network: tables between the variables that make a value and that read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoparallel.cost.op_costs import OpCost
from autoparallel.graph.graph import Graph
from autoparallel.placement import Layout
from autoparallel.strategy.cost_network import CostNetwork, reduced_together
from autoparallel.strategy.cost_tables import Table, first_row
from autoparallel.strategy.counted_moments import Left, Phase
from autoparallel.strategy.layout_sets import ReaderLayouts
from autoparallel.strategy.mesh_strategies import MeshStrategy
from autoparallel.strategy.recompute_modes import Recomputation
from autoparallel.strategy.redistributed_copies import ProducerLayouts, RecomputedEnds
from autoparallel.strategy.saved_activations import SavedActivations
from planners import Factor

__all__ = ["CallStates", "NetworkFactors"]

Array = NDArray[np.float64]
Shared = TypeVar("Shared")


@dataclass(frozen=True, eq=False)
class CallStates:
    """The states of all calls that are alike. Known by identity.

    joints: the strategies on the whole mesh, one per state. costs: seconds, parallel to joints.
    results: per result of the call, its layout in each state. usage: bytes per rank that the op
    itself saves for the backward pass, per state; None where memory is not counted.
    """

    joints: tuple[MeshStrategy, ...]
    costs: tuple[OpCost, ...]
    results: tuple[ProducerLayouts, ...]
    usage: Array | None = None


class NetworkFactors:
    """Adds the factors of a network whose variables are known.

    states: per call. parameters: per parameter node, the layouts in which it is stored. saved: the
    saved activations where memory is limited, None otherwise. invariant: the layout that is whole
    on every mesh axis.
    """

    def __init__(
        self,
        network: CostNetwork,
        states: Mapping[str, CallStates],
        parameters: Mapping[str, ProducerLayouts],
        recomputation: Recomputation,
        saved: SavedActivations | None,
        invariant: Layout,
    ) -> None:
        self.network, self.states, self.parameters = network, states, parameters
        self.recomputation, self.saved, self.invariant = recomputation, saved, invariant
        self.moment = network.moment
        self.places = {node.name: at for at, node in enumerate(network.graph.nodes)}
        self.graph: Graph = network.graph
        self.together = reduced_together(network.graph)
        self.reads = {node.name: node.operands() for node in network.graph.calls}
        # Of what lasts from network to network; its phases do not.
        self._shared = network.edges.shared
        self._phases: dict[int, tuple[Phase, ...]] = {}

    def add_all(self) -> None:
        """Add all factors, and the variables that stand between a value and several readers."""
        self.add_recomputation()
        self.add_redistributions()

    def add_recomputation(self) -> None:
        """Add, per op and recompute mode, the forward seconds added and saved bytes removed.

        A block of several modes has a variable, and its ops a factor with it each; where the mode
        is decided already, it changes the ops' own costs.
        """
        blocks = self.recomputation
        for block, modes in enumerate(blocks.modes):
            if len(modes) > 1:
                self.network.copy_variables.append(
                    (blocks.variable(block), Table(self.zeros(len(modes))))
                )
        for node in self.graph.calls:
            block_of_call = blocks.block_of(node.name)
            if block_of_call is None:
                continue
            inside = np.array(blocks.inside(node.name, block_of_call))
            states = self.states[node.name]
            if not inside.any():
                continue
            # What is made again alone still saves what its own backward pass needs of its own.
            alone = node.name in blocks.made[block_of_call]
            selective = np.array([mode == "selective" for mode in blocks.modes[block_of_call]])
            freed = inside & ~selective if alone else inside
            if self.places[node.name] > self.moment.place:
                freed = np.zeros_like(inside)
            else:
                phases = self.phases(block_of_call)
                freed = freed & np.array([phase is not Phase.AGAIN for phase in phases])
            table = self.shared(
                ("recompute", states, tuple(inside), tuple(freed)),
                partial(_recompute_table, states, inside, freed),
            )
            if len(inside) > 1:
                self.couple(node.name, blocks.variable(block_of_call), table, "")
            else:
                self.network.repeats[node.name] = Table(
                    table.cost[:, 0], None if table.usage is None else table.usage[:, 0]
                )

    def phases(self, block: int) -> tuple[Phase, ...]:
        """Return, per mode of a block, its phase at the moment at which bytes are counted."""
        if block not in self._phases:
            self._phases[block] = tuple(
                self.moment.phase(self.recomputation, block, mode)
                for mode in self.recomputation.modes[block]
            )
        return self._phases[block]

    def modes(
        self, name: str, readers: list[tuple[str, ReaderLayouts]]
    ) -> tuple[int | None, tuple[RecomputedEnds, ...]]:
        """Return the block whose mode decides who of a value's ends is recomputed, and who is.

        One `RecomputedEnds` per mode of the block; no block and none where nothing is recomputed.
        Where readers belong to several blocks, the layouts that they read count as saved.
        """
        blocks = self.recomputation
        reader_blocks = [blocks.block_of(reader) for reader, _ in readers]
        producer = self.graph.producers[name].name
        producer_block = blocks.block_of(producer)
        block = reader_blocks[0] if len(set(reader_blocks)) == 1 else None
        if block is None:
            block = producer_block
        if block is None:
            return None, ()
        produced_inside = producer_block == block
        outside = (False,) * len(blocks.modes[block])
        inside = [
            blocks.inside(reader, block) if reader_block == block else outside
            for (reader, _), reader_block in zip(readers, reader_blocks, strict=True)
        ]
        alone = [mode == "selective" and bool(blocks.made[block]) for mode in blocks.modes[block]]
        # Weights that are read by what is made again alone are read once.
        is_weight = name in self.network.weights
        return block, tuple(
            RecomputedEnds(
                produced_inside and blocks.inside(producer, block)[mode],
                tuple(by_mode[mode] and not (alone[mode] and is_weight) for by_mode in inside),
                apart=producer_block is not None and not produced_inside,
                alone=alone[mode],
                phase=self.phases(block)[mode],
            )
            for mode in range(len(blocks.modes[block]))
        )

    def producer(self, name: str) -> tuple[str | None, ProducerLayouts]:
        """Return the variable that decides how a value is laid out, and its layout per state.

        Inputs and constants have no variable: they are the same on all ranks.
        """
        node = self.graph.producers[name]
        if node.kind == "call":
            place = [value.name for value in node.results].index(name)
            return node.name, self.states[node.name].results[place]
        if node.kind == "parameter":
            return node.name, self.parameters[node.name]
        return None, self.shared(
            "resident", lambda: ProducerLayouts((self.invariant,), resident=True)
        )

    def shared(self, key: Any, make: Callable[[], Shared]) -> Shared:
        """Return the one object of that key, calling `make` the first time.

        Tables and layouts are known by identity further on: what is equal must be one object.
        """
        if key not in self._shared:
            self._shared[key] = make()
        shared: Shared = self._shared[key]
        return shared

    def zeros(self, count: int) -> Array:
        """Return the zero costs of `count` states, the same array for all such variables."""
        return self.shared(("zeros", count), lambda: np.zeros(count))

    def readers(self, name: str) -> list[tuple[str, ReaderLayouts]]:
        """Return, per reading variable, the layouts in which it reads a value in each state.

        Besides ops, the caller reads what is returned, and a buffer what is written back to it.
        """
        readers: list[tuple[str, ReaderLayouts]] = []
        for node in self.graph.readers[name]:
            places = tuple(i for i, operand in enumerate(self.reads[node.name]) if operand == name)
            states = self.states[node.name]
            saves = self.saved is not None and self.saved.saves(node, places)

            def layouts_read(
                joints: tuple[MeshStrategy, ...] = states.joints,
                places: tuple[int, ...] = places,
                saves: bool = saves,
            ) -> ReaderLayouts:
                return ReaderLayouts(
                    tuple(
                        tuple(dict.fromkeys(joint.operands[place] for place in places))
                        for joint in joints
                    ),
                    saves,
                )

            key = ("read", states, places, saves)
            readers.append((node.name, self.shared(key, layouts_read)))
        if name in self.network.outputs:
            layouts = self.network.outputs[name]
            # The caller holds what is returned through the backward pass.
            stays = self.saved is not None
            returned = self.shared(
                ("return", layouts),
                lambda: ReaderLayouts(tuple((layout,) for layout in layouts), stays, stays),
            )
            readers.append((f"return:{name}", returned))
        for _, written in self.graph.mutations:
            if written == name:
                readers.append(
                    ("", self.shared("written", lambda: ReaderLayouts(((self.invariant,),))))
                )
        return readers

    def needs(self, name: str) -> tuple[Left, tuple[bool, bool]]:
        """Return how many of those that save a value still need it when bytes are counted; and of
        the call whose backward that is, whether it needs a copy of it, and makes a gradient of one.
        """
        if self.saved is None:
            return Left.ALL, (False, False)
        needed, here = [], (False, False)
        for node in self.graph.readers[name]:
            places = tuple(i for i, operand in enumerate(self.reads[node.name]) if operand == name)
            needed.append(self.saved.needed_from(node, places))
            if node.name == self.moment.call:
                # Gradients of other values are counted with the call itself.
                is_weight = self.graph.producers[name].kind == "parameter"
                gradient = is_weight and self.graph.values[name].requires_grad
                here = needed[-1] == self.moment.place, gradient
        returned = name in self.network.outputs
        return Left.ALL if returned else self.moment.left(needed), here

    def add_redistributions(self) -> None:
        """Add the tables between the producer of every value and its readers.

        One reader shares a table with the producer. Several share a variable, the set of layouts
        that the value is brought to, so that each redistribution is paid once.
        """
        for name, value in self.graph.values.items():
            readers = self.readers(name)
            if not readers:
                continue
            variable, produced = self.producer(name)
            weight, together = name in self.network.weights, name in self.together
            block, modes = self.modes(name, readers)
            layouts = tuple(layouts for _, layouts in readers)
            passed = self.saved is not None and name in self.saved.passed
            edge = self.network.edges.between(
                value, produced, layouts, weight, together, modes, *self.needs(name), passed,
                self.network.also.get(name, frozenset()),
            )  # fmt: skip
            self.network.values[name] = edge
            mode = (
                self.recomputation.variable(block) if len(modes) > 1 and block is not None else ""
            )
            if len(readers) == 1:
                self.couple(variable, readers[0][0], edge.paid, name, mode)
                continue
            # All redistributions are free: the readers may choose as they like.
            if not self.is_kept(edge.paid, name):
                continue
            if variable is None and not mode:
                self.network.copy_variables.append((f"{name}*", first_row(edge.paid)))
            else:
                count = len(edge.groups)
                self.network.copy_variables.append((f"{name}*", Table(self.zeros(count))))
                self.couple(variable, f"{name}*", edge.paid, name, mode)
            for (reader, _), offer in zip(readers, edge.offers, strict=True):
                self.couple(f"{name}*", reader, offer, "")

    def is_kept(self, table: Table, value: str) -> bool:
        """Return whether a table becomes a factor. value: as of `couple`.

        Networks of the same graph have the same ones, at whatever moment their bytes are counted:
        where nothing is used at one, something may be at another.
        """
        if table.matters or table.usage is not None:
            return True
        is_weight = bool(value) and self.graph.producers[value].kind == "parameter"
        return self.saved is not None and is_weight

    def couple(
        self, first: str | None, second: str, table: Table, value: str, mode: str = ""
    ) -> None:
        """Add a factor; where one side has no variable, one of a single state stands for it.

        first, second: the variables of the table's axes; None or "" for no variable. value: the
        value whose redistribution the table prices, or "". mode: the variable of the table's last
        axis, if it has three. Tables of zeros alone are left out.
        """
        if not self.is_kept(table, value) or (first is None and not second):
            return
        # A factor needs two variables, so a missing one gets a stand-in with a single free state.
        names = [first or "", second]
        for side, name in enumerate(names):
            if not name:
                other = names[1 - side]
                names[side] = f"{other}+{len(self.network.copy_variables)}"
                self.network.copy_variables.append((names[side], Table(np.zeros(1))))
        self.network.redistributed_value.append(value)
        scope = (names[0], names[1], mode) if mode else (names[0], names[1])
        self.network.factors.append(Factor(scope, table.cost, table.usage, table.alternatives))


def _recompute_table(
    states: CallStates, inside: NDArray[np.bool_], freed: NDArray[np.bool_]
) -> Table:
    """Return table[state, mode] of one call: forward seconds added, saved bytes removed.

    inside: per mode, whether the call is run again. freed: whether what it saves itself is not
    there meanwhile.
    """
    forward = np.array([cost.forward for cost in states.costs])
    cost = np.where(inside, forward[:, None], 0.0)
    if states.usage is None:
        return Table(cost)
    return Table(cost, np.where(freed, -states.usage[:, None], 0.0))
