"""Families of layouts that practitioners use, as restrictions of a cost network.

A family gives each mesh axis a role. A role says which loops of an op the axis may split, and how
it stores parameters:

- data: the batch, with parameters whole (data parallelism), with the optimizer's state split
  (ZeRO-1), gradients too (ZeRO-2), or parameters too (ZeRO-3, fully sharded data parallelism);
- tensor: what comes neither from the batch nor from the sequence (arXiv:1909.08053); between the
  products, with sequence parallelism, also the sequence (arXiv:2205.05198);
- heads and sequence: products with weights split the sequence, those of activations whatever but
  the batch (Ulysses, arXiv:2309.14509);
- sequence: everything splits the sequence (context parallelism, arXiv:2407.21783, section 3.3.2).

Which loop is which follows from the graph alone: the batch is the first size of the largest input
that the inputs decide, the sequence any other that they decide, and any along which a product does
the same with a weight, as far as that dim is followed; all other sizes are the model's. A family
leaves the solver everything that it does not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray

from autoparallel.graph.graph import Dim, Node, Sym, numel_hint
from autoparallel.placement import Shard
from autoparallel.rules.loop_splits import LoopSplit
from autoparallel.rules.rule import ShardingRule
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.mesh_strategies import MeshStrategy
from autoparallel.strategy.parameter_storage import ParameterStorage

__all__ = [
    "TAKES",
    "Family",
    "LayoutFamilies",
    "LoopKinds",
    "Role",
    "Split",
    "Stored",
    "families",
    "states_of_family",
    "weight_loops",
]

Allowed = NDArray[np.bool_]


class Stored(Enum):
    """The storage of a parameter on an axis that does not split its product."""

    ANYHOW = "anyhow"
    WHOLE = "whole"
    STATE = "optimizer state split"
    GRADIENT = "gradients and optimizer state split"
    FULLY = "parameters split"
    AS_USED = "as used"


class Split(Enum):
    """A Split says which loops an axis may split."""

    DATA = "batch"
    TENSOR = "tensor"
    TENSOR_SEQUENCE = "tensor and sequence"
    HEADS_SEQUENCE = "heads and sequence"
    SEQUENCE = "sequence"


@dataclass(frozen=True, slots=True)
class Role:
    """A role of one mesh axis.

    >>> print(Role(Split.DATA, Stored.FULLY))
    batch (parameters split)
    """

    split: Split
    stored: Stored

    def __str__(self) -> str:
        if self.stored in (Stored.AS_USED, Stored.ANYHOW):
            return self.split.value
        return f"{self.split.value} ({self.stored.value})"


# Roles for the tokens of a batch, and roles for what is inside of them.
_DATA = _DDP, _ZERO_1, _ZERO_2, _FULLY = tuple(
    Role(Split.DATA, stored)
    for stored in (Stored.WHOLE, Stored.STATE, Stored.GRADIENT, Stored.FULLY)
)
_TENSOR = tuple(Role(split, Stored.AS_USED) for split in (Split.TENSOR, Split.TENSOR_SEQUENCE))
_ALONG = tuple(
    Role(split, stored)
    for split in (Split.HEADS_SEQUENCE, Split.SEQUENCE)
    for stored in (Stored.WHOLE, Stored.STATE, Stored.FULLY)
)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of layouts: the role of each mesh axis. axes: their names.

    >>> print(Family((Role(Split.DATA, Stored.FULLY), Role(Split.TENSOR, Stored.AS_USED)),
    ...              ("dp", "tp")))
    batch (parameters split) on dp, tensor on tp
    """

    roles: tuple[Role | None, ...]
    axes: tuple[str, ...]

    @property
    def outlines(self) -> tuple[Family, Family, Family]:
        """The families that hold this one, the widest first, and this one.

        The widest leaves it open how parameters are stored, and whether the axes that split the
        sequence, or may, split heads or features too. The next one leaves the latter open alone.
        """
        splits = {Split.TENSOR: Split.TENSOR_SEQUENCE, Split.SEQUENCE: Split.HEADS_SEQUENCE}
        wider = tuple(
            role and Role(splits.get(role.split, role.split), role.stored) for role in self.roles
        )
        widest = tuple(role and Role(role.split, Stored.ANYHOW) for role in wider)
        return Family(widest, self.axes), Family(wider, self.axes), self

    def __str__(self) -> str:
        pairs = zip(self.roles, self.axes, strict=True)
        return ", ".join(f"{role} on {axis}" for role, axis in pairs if role is not None)


def families(network: CostNetwork) -> tuple[Family, ...]:
    """Return the families that the network's mesh and options have room for.

    Axes of one rank have no role. The outer axes take the batch, and the innermost either does too
    or splits what is inside of it; on three axes, the middle one may split the sequence.

    Example: `[str(family) for family in families(network)]`
    """
    return LayoutFamilies(network).families()


def states_of_family(network: CostNetwork, family: Family) -> dict[str, Allowed]:
    """Return, per variable that the family restricts, whether it allows each state.

    What has no such state, as a bias that does not divide, keeps all. Equal variables have the same
    array. For several families of one network, `LayoutFamilies` looks at its ops once.

    Example: `problem.among(states_of_family(network, family))`
    """
    return LayoutFamilies(network).states(family)


def _rows(count: int, gradients: bool) -> Iterator[tuple[Role, ...]]:
    """Yield the roles of so many axes. gradients: whether gradients may be split by themselves."""
    data = _DATA if gradients else (_DDP, _ZERO_1, _FULLY)
    if count == 0:
        return
    outside = [(role,) * (count - 1) for role in data]
    if count > 1:
        # Copies outside, parts inside: hybrid sharding.
        outside += [(_DDP, *[_FULLY] * (count - 2))] * (count > 2)
        yield (_DDP, *[_FULLY] * (count - 1))
    for outer in dict.fromkeys(outside):
        if not outer or len(set(outer)) == 1:
            yield (*outer, outer[0]) if outer else (_FULLY,)
        for role in _TENSOR:
            yield (*outer, role)
        for role in _ALONG:
            if not outer or role.stored is outer[-1].stored:
                yield (*outer, role)
        if count > 2 and len(set(outer)) == 1:
            for along, role in product(_ALONG, _TENSOR):
                if along.stored is outer[0].stored:
                    yield (*outer[:-1], along, role)
    if count == 1:
        yield from ((role,) for role in data)


class LoopKinds:
    """The loops of every call of a network, by what their size is of.

    batch: the symbols of the batch, None without. has_sequence: whether there is a sequence. along:
    per call, the loops of fixed size that are of the sequence.
    """

    def __init__(self, network: CostNetwork) -> None:
        graph = network.graph
        inputs = [node.result for node in graph.nodes if node.kind == "input"]
        inputs.sort(key=lambda value: -numel_hint(value.shape))
        symbols = [[dim.expr for dim in value.shape if isinstance(dim, Sym)] for value in inputs]
        first = next((row[0] for row in symbols if row), None)
        self.batch = None if first is None else frozenset(first.free_symbols)
        self.along: dict[str, frozenset[str]] = {}
        # Dims of fixed size that are of the sequence, as (value, dim): from products to what
        # follows, and back to what comes before.
        dims: set[tuple[str, int]] = set()
        for nodes in (graph.calls, graph.calls[::-1], graph.calls):
            for node in nodes:
                self._spread(network, node, dims)
        self.has_sequence = any(self.along.values()) or any(
            not expr.free_symbols <= (self.batch or frozenset()) for row in symbols for expr in row
        )

    def _spread(self, network: CostNetwork, node: Node, dims: set[tuple[str, int]]) -> None:
        """Find the loops of a call that are of the sequence, and add the dims that are so."""
        rule = network.rules[node.name]
        if rule is None:
            return
        names = (*node.operands(), *(value.name for value in node.results))
        tensors = (*rule.operands, *rule.results)
        weighed = weight_loops(network, node, rule)
        along = set(self.along.get(node.name, ()))
        for name, tensor in zip(names, tensors, strict=True):
            for dim, loops in enumerate(tensor):
                if (name, dim) in dims:
                    along.update(loops)
        if weighed:
            along.update(rule.loops)
        along = {loop for loop in along - weighed if not isinstance(rule.sizes[loop], Sym)}
        self.along[node.name] = frozenset(along)
        for name, tensor in zip(names, tensors, strict=True):
            dims.update(
                (name, dim) for dim, loops in enumerate(tensor) if loops and along.issuperset(loops)
            )

    def kind(self, node: str, rule: ShardingRule, loop: str) -> str:
        """Return "batch", "sequence", "both" or, for a size of the model's own, "model"."""
        size: Dim = rule.sizes[loop]
        if not isinstance(size, Sym) or self.batch is None:
            return "sequence" if loop in self.along[node] else "model"
        free: frozenset[sympy.Symbol] = frozenset(size.expr.free_symbols)
        if free <= self.batch:
            return "batch"
        return "both" if free & self.batch else "sequence"


def weight_loops(network: CostNetwork, node: Node, rule: ShardingRule) -> frozenset[str]:
    """Return the loops of the weight matrix of a product; none for another op."""
    if not rule.flops:
        return frozenset()
    return frozenset(
        loop
        for name, dims in zip(node.operands(), rule.operands, strict=True)
        if name in network.weights and len(dims) > 1
        for loops in dims
        for loop in loops
    )


# The kinds of loops that each split may take: of products with a weight matrix, and of other ops.
TAKES: Mapping[Split, tuple[frozenset[str], frozenset[str]]] = {
    Split.DATA: (frozenset({"batch", "both"}),) * 2,
    Split.TENSOR: (frozenset({"model"}),) * 2,
    Split.TENSOR_SEQUENCE: (frozenset({"model"}), frozenset({"model", "sequence", "both"})),
    Split.HEADS_SEQUENCE: (
        frozenset({"sequence", "both"}),
        frozenset({"model", "sequence", "both"}),
    ),
    Split.SEQUENCE: (frozenset({"sequence", "both"}),) * 2,
}


@dataclass(frozen=True, slots=True)
class _Alike:
    """Variables that a family allows the same states of: names. allows: those states."""

    names: list[str]
    allows: Callable[[Family], list[bool]]


class LayoutFamilies:
    """The families of one network, with what they allow; its ops are told apart once for all.

    Example: `{family: LayoutFamilies(network).states(family) for family in families(network)}`
    """

    def __init__(self, network: CostNetwork) -> None:
        self._network = network
        self._loops = LoopKinds(network)
        alike: dict[Any, _Alike] = {}
        for node in network.graph.calls:
            rule = network.rules[node.name]
            if rule is None:
                continue
            joints = network.strategies[node.name]
            weighs = bool(weight_loops(network, node, rule))
            kinds = {loop: self._loops.kind(node.name, rule, loop) for loop in rule.loops}
            key: Any = (id(joints), weighs, tuple(kinds.items()))
            if key not in alike:
                alike[key] = _Alike([], partial(_taken, joints=joints, kinds=kinds, weighs=weighs))
            alike[key].names.append(node.name)
        for name, storages in network.storages.items():
            if id(storages) not in alike:
                alike[id(storages)] = _Alike([], partial(_stored, storages=storages))
            alike[id(storages)].names.append(name)
        self._alike = tuple(alike.values())

    def families(self) -> tuple[Family, ...]:
        """Return all families that there is room for, see `families`."""
        network = self._network
        names = tuple(name for name, _ in network.mesh.axes)
        wide = [index for index, (_, size) in enumerate(network.mesh.axes) if size > 1]
        data = network.options.data_parallel and self._loops.batch is not None
        rows: dict[tuple[Role | None, ...], None] = {}
        for roles in _rows(len(wide), network.edges.memory):
            if not data and any(role in _DATA for role in roles):
                continue
            along = any(role.split is not Split.TENSOR and role not in _DATA for role in roles)
            if along and not self._loops.has_sequence:
                continue
            if not network.options.data_parallel and any(role in _ALONG for role in roles):
                continue
            full: list[Role | None] = [None] * len(names)
            for index, role in zip(wide, roles, strict=True):
                full[index] = role
            rows[tuple(full)] = None
        return tuple(Family(row, names) for row in rows)

    def states(self, family: Family) -> dict[str, Allowed]:
        """Return what a family allows, see `states_of_family`."""
        states: dict[str, Allowed] = {}
        for alike in self._alike:
            allowed = np.array(alike.allows(family), dtype=bool)
            if allowed.any() and not allowed.all():
                states.update(dict.fromkeys(alike.names, allowed))
        return states


def _taken(
    family: Family, joints: tuple[MeshStrategy, ...], kinds: Mapping[str, str], weighs: bool
) -> list[bool]:
    """Return whether a family takes each joint strategy of an op; see `_takes`."""
    return [
        all(
            role is None or _takes(role, kinds, part.tile, weighs)
            for role, part in zip(family.roles, joint.parts, strict=True)
        )
        for joint in joints
    ]


def _stored(family: Family, storages: tuple[ParameterStorage, ...]) -> list[bool]:
    """Return whether a family stores a parameter in each way."""
    return [
        all(role is None or _stores(role, stored, axis) for axis, role in enumerate(family.roles))
        for stored in storages
    ]


def _takes(role: Role, kinds: Mapping[str, str], tile: LoopSplit | None, weighs: bool) -> bool:
    """Return whether an axis of this role may run an op so.

    kinds: of its loops. tile: the split of a loop, None where nothing is split. weighs: it is a
    product with a weight.
    """
    if tile is None:
        return True
    with_weight, others = TAKES[role.split]
    return kinds[tile.loop] in (with_weight if weighs else others)


def _stores(role: Role, stored: ParameterStorage, axis: int) -> bool:
    """Return whether an axis of this role may store a parameter so."""
    split = tuple(
        isinstance(layout[axis], Shard)
        for layout in (stored.storage, stored.gradient, stored.state)
    )
    if role.stored is Stored.ANYHOW:
        return True
    if role.stored is Stored.AS_USED:
        return split in ((False,) * 3, (True,) * 3)
    return (
        split
        == {
            Stored.WHOLE: (False, False, False),
            Stored.STATE: (False, False, True),
            Stored.GRADIENT: (False, True, True),
            Stored.FULLY: (True, True, True),
        }[role.stored]
    )
