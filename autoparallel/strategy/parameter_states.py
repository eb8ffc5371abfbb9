"""The ways to store each parameter, as states of a cost network, and what its update costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoparallel.cost.hardware import Hardware
from autoparallel.cost.op_costs import nbytes, update_seconds
from autoparallel.graph.graph import Node
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.placement import Layout, Replicate
from autoparallel.strategy.candidate_splits import CandidateSplits
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.cost_tables import Table
from autoparallel.strategy.equal_axes import AxisGroups, arranged_layout, arranged_storage
from autoparallel.strategy.parameter_storage import ParameterStorage, storage_choices, stored_bytes
from autoparallel.strategy.redistributed_copies import ProducerLayouts
from autoparallel.strategy.zero_costs import exchange_seconds, update_gather_seconds

__all__ = ["ParameterStates"]


class ParameterStates:
    """Adds parameters to a network: each is stored in one of some ways, computed once for equals.

    layouts: per parameter that was added, the layouts that it may be stored in.
    """

    def __init__(
        self,
        network: CostNetwork,
        splits: Sequence[CandidateSplits],
        in_time: tuple[bool, ...],
        pace: Hardware,
        equal: AxisGroups,
        groups: AxisGroups,
    ) -> None:
        """Note what parameters are split by.

        splits, in_time: per mesh axis, the candidate splits, and whether micro-batches are its
        ranks. pace: hardware at the pace
        of its slowest device. equal: axes by which states are the same but for their order.
        groups: axes whose order is left open.
        """
        self.network, self.splits, self.in_time = network, splits, in_time
        self.pace, self.equal, self.groups = pace, equal, groups
        self.sizes = tuple(size for _, size in network.mesh.axes)
        self.options, self.edges, self.shares = network.options, network.edges, network.shares
        self.stored: Mapping[str, Layout] = network.stored
        self.only = network.only
        self.storage_choices: dict[Any, tuple[ParameterStorage, ...]] = {}
        self.update_tables: dict[Any, tuple[Table, ProducerLayouts]] = {}
        self.layouts: dict[str, ProducerLayouts] = {}

    def add(self, node: Node) -> None:
        """Add the ways to store one parameter, with the seconds and bytes of its update."""
        value = node.result
        if node.target in self.stored:
            choices: tuple[ParameterStorage, ...] = (
                ParameterStorage.as_used(self.stored[node.target]),
            )
        else:
            shards = tuple(
                tuple(splits.shards[value.name]) if size > 1 and not in_time else ()
                for size, splits, in_time in zip(self.sizes, self.splits, self.in_time, strict=True)
            )
            key = (value.shape, value.dtype, value.requires_grad, shards)
            if key not in self.storage_choices:
                # ZeRO is a form of data parallelism. Scattered gradients save memory and nothing
                # else: they are candidates where memory is counted.
                zero = self.options.data_parallel
                # Micro-batches add their gradients up before these are reduced.
                scattered = zero and self.edges.memory and not any(self.in_time)
                several = tuple(
                    1 if in_time else size
                    for size, in_time in zip(self.sizes, self.in_time, strict=True)
                )
                self.storage_choices[key] = tuple(
                    self.over_time(choice, value.requires_grad)
                    for choice in storage_choices(value, shards, several, zero, scattered)
                )
            choices = self.storage_choices[key]
            if self.only is not None:
                wanted = self.only[node.name]
                choices = tuple(
                    choice for choice in choices if arranged_storage(choice, self.equal) in wanted
                )
        every, choices = choices, self.arranged_choices(choices)
        self.network.storages[node.name] = choices
        priced = (value.shape, value.dtype, value.requires_grad, choices)
        if priced not in self.update_tables:
            self.update_tables[priced] = self.update_table(node, choices, every)
        self.network.updates[node.name], self.layouts[node.name] = self.update_tables[priced]

    def arranged_choices(
        self, choices: tuple[ParameterStorage, ...]
    ) -> tuple[ParameterStorage, ...]:
        """Return the ways to store a parameter, in one order where that is left open."""
        if not self.groups:
            return choices
        return tuple(dict.fromkeys(arranged_storage(choice, self.groups) for choice in choices))

    def over_time(self, stored: ParameterStorage, grad: bool) -> ParameterStorage:
        """Return a way to store a parameter that all micro-batches read as it is.

        Each of them adds its own summand to the gradient, as ranks do for a Replicate: nobody
        reduces these, because autograd adds up the gradients of one tensor.
        """
        if not (grad and any(self.in_time)):
            return stored
        return ParameterStorage(
            *(
                tuple(
                    Replicate() if in_time else placement
                    for placement, in_time in zip(layout, self.in_time, strict=True)
                )
                for layout in (stored.storage, stored.gradient, stored.state)
            )
        )

    def update_table(
        self,
        node: Node,
        choices: tuple[ParameterStorage, ...],
        every: tuple[ParameterStorage, ...],
    ) -> tuple[Table, ProducerLayouts]:
        """Return seconds and bytes of each way to store a parameter, and the layouts it has.

        every: the ways in all orders of axes, of which the least counts.
        """
        value = node.result
        costs, usage = [], []
        for choice in every:
            parts = stored_bytes(value, choice, self.sizes, self.options.optimizer)
            updated = nbytes(value) * layout_fraction(value.shape, choice.state, self.sizes)
            seconds = update_seconds(updated, updated, parts[2], self.pace)
            seconds += update_gather_seconds(value, choice, self.edges.links, self.sizes)
            seconds += exchange_seconds(value, choice, self.edges.links, self.sizes)
            costs.append(seconds * self.shares.once if value.requires_grad else 0.0)
            usage.append(sum(parts) / self.shares.in_flight)
        if not self.groups:
            layouts = ProducerLayouts(
                tuple(choice.storage for choice in choices), choices, resident=True
            )
            return Table(np.array(costs), np.array(usage)), layouts
        place = {choice: number for number, choice in enumerate(choices)}
        least = np.full((2, len(choices)), np.inf)
        numbers = [place[arranged_storage(choice, self.groups)] for choice in every]
        for row, values in zip(least, (costs, usage), strict=True):
            np.minimum.at(row, numbers, values)
        layouts = ProducerLayouts(
            tuple(arranged_layout(choice.storage, self.groups) for choice in choices),
            choices,
            resident=True,
        )
        return Table(least[0], least[1]), layouts
