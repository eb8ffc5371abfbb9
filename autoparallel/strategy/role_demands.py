"""Demands for layouts that practitioners have names for: "fsdp on dp", "megatron on tp".

They are the roles of `layout_families.py`, which the search tries by itself; here one is demanded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Node
from autoparallel.strategy.asked_model import Allowed, AskedModel, Demand
from autoparallel.strategy.layout_families import (
    TAKES,
    Family,
    LoopKinds,
    Role,
    Split,
    Stored,
    states_of_family,
    weight_loops,
)
from autoparallel.strategy.named_dims import threads_named

__all__ = ["ROLES", "RoleDemand", "role_of"]

# The layouts by name, and in a few words, for those who look for one.
ROLES: Mapping[str, tuple[Role, str]] = {
    "ddp": (Role(Split.DATA, Stored.WHOLE), "the batch is split, everything else is whole"),
    "zero-1": (Role(Split.DATA, Stored.STATE), "the batch, and the optimizer's state"),
    "zero-2": (Role(Split.DATA, Stored.GRADIENT), "the batch, gradients, the optimizer's state"),
    "fsdp": (Role(Split.DATA, Stored.FULLY), "the batch, and parameters with all that is theirs"),
    "megatron": (
        Role(Split.TENSOR_SEQUENCE, Stored.AS_USED),
        "heads, feed-forward and vocabulary; between products also the sequence",
    ),
    "context": (Role(Split.SEQUENCE, Stored.ANYHOW), "the sequence, everywhere"),
    "ulysses": (Role(Split.HEADS_SEQUENCE, Stored.ANYHOW), "the sequence; in attention the heads"),
}
_SAME = {
    "dataparallel": "ddp",
    "zero1": "zero-1",
    "zero2": "zero-2",
    "zero3": "fsdp",
    "tensorparallel": "megatron",
    "contextparallel": "context",
}
# The dims that Megatron's products have, by name; it leaves a router and the like whole.
_OF_MEGATRON = ("heads", "feed-forward", "vocabulary")


def role_of(name: str) -> str | None:
    """Return the word in ROLES that a name stands for, None for the name of no layout.

    >>> role_of("FSDP"), role_of("zero 3"), role_of("heads")
    ('fsdp', 'fsdp', None)
    """
    plain = re.sub(r"[\s_-]", "", name).lower()
    known = {re.sub("-", "", word): word for word in ROLES}
    return known.get(plain) or _SAME.get(plain)


@dataclass(frozen=True)
class RoleDemand(Demand):
    """A demand that an axis has a role. text: as the user wrote it. role: its word in ROLES. axis:
    the number of the mesh axis.

    The axis splits nothing that the role does not, stores parameters as it does, and products with
    a weight are split by it wherever they can be.
    """

    text: str
    role: str
    axis: int

    @property
    def about(self) -> tuple[int, ...]:
        """The numbers of the mesh axes that it is about."""
        return (self.axis,)

    def states(self, model: AskedModel) -> dict[str, Allowed]:
        """Return the states that it allows; see `Demand`."""
        network = model.network
        role, _ = ROLES[self.role]
        names = tuple(name for name, _ in network.mesh.axes)
        roles = tuple(role if axis == self.axis else None for axis in range(len(names)))
        states = states_of_family(network, Family(roles, names))
        kinds = LoopKinds(network)
        chosen = self.chosen(model) if role.split is Split.TENSOR_SEQUENCE else None
        known: dict[Any, Allowed | None] = {}
        fulfilled = 0
        for node in network.graph.calls:
            loops = self.loops(model, node, kinds, chosen)
            if not loops:
                continue
            joints, allowed = network.strategies[node.name], states.get(node.name)
            key = id(joints), loops, None if allowed is None else id(allowed)
            if key not in known:
                tiles = [joint.parts[self.axis].tile for joint in joints]
                split = np.array([tile is not None and tile.loop in loops for tile in tiles])
                split = split if allowed is None else split & allowed
                known[key] = split if split.any() else None
            found = known[key]
            if found is not None:
                states[node.name] = found
                fulfilled += 1
        if not fulfilled:
            raise self.impossible(model)
        return states

    def loops(
        self,
        model: AskedModel,
        node: Node,
        kinds: LoopKinds,
        chosen: frozenset[int] | None,
    ) -> frozenset[str]:
        """Return the loops of a product with a weight of which the axis is to split one.

        chosen: the threads whose loops they must be, None for all that the role takes.
        """
        network = model.network
        rule = network.rules[node.name]
        if rule is None or not weight_loops(network, node, rule):
            return frozenset()
        role, _ = ROLES[self.role]
        with_weight, _ = TAKES[role.split]
        loops = {loop for loop in rule.loops if kinds.kind(node.name, rule, loop) in with_weight}
        if chosen is not None:
            passages = model.threads.passages[node.name]
            loops &= {p.loop for p in passages if not chosen.isdisjoint(p.threads)}
        return frozenset(loops)

    def chosen(self, model: AskedModel) -> frozenset[int] | None:
        """Return the threads that tensor parallelism is known to split, None where there are
        none: then it is all that comes from parameters.
        """
        threads = [t for name in _OF_MEGATRON for t in threads_named(name, model.threads)]
        return frozenset(thread.number for thread in threads) or None

    def impossible(self, model: AskedModel) -> PlanError:
        """Return the error for a role in which the axis would split no product."""
        axis, ranks = model.network.mesh.axes[self.axis]
        role, about = ROLES[self.role]
        why = f"{self.role} splits {about.removesuffix(' is split, everything else is whole')}"
        why += f", and no product can be split so over {ranks} ranks"
        if not model.network.options.data_parallel and role.split is not Split.TENSOR_SEQUENCE:
            why += "; data_parallel=False keeps products from being split along inputs' dims"
        return PlanError(
            f"constraint {self.text!r} is about nothing that {axis} could split",
            why=why,
            fix="give the axis another size, or leave the constraint out; `autoparallel dims` "
            "prints the dims of a model with their sizes",
        )
