"""The account of a rank's memory: its items and their sum, which every count of memory returns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from autoparallel.cost.optimizer_state import state_bytes_per_element
from autoparallel.graph.part_sizes import local_shape
from autoparallel.plan import ParameterChoice, Plan
from autoparallel.plan.kept_layouts import kept_layout

__all__ = ["CATEGORIES", "Account", "Item", "account_of", "grouped", "resident"]

_OF_PARAMETERS = ("parameters", "gradients", "optimizer_state")
_ITEMIZED = (*_OF_PARAMETERS, "activations", "buffers", "inputs")
CATEGORIES = (*_ITEMIZED, "temporary")


@dataclass(frozen=True, slots=True)
class Item:
    """Tensors that take memory: `count` of one kind, alike in every block.

    category: one of CATEGORIES, a field of Account. name: of a parameter, or of the value or op
    that is saved, with * for the number of the block. where: the module that computes it. nbytes:
    of all of them.
    """

    category: str
    name: str
    where: str
    count: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes on one rank, at the worst moment of a step.

    parameters, gradients, optimizer_state: between steps, and until the update. Where the optimizer
    works on other parts than are stored, its part is a copy: the master copy, where it keeps one,
    else one more parameter. activations: those of the forward pass that autograd has saved when the
    backward pass begins, each storage once; not parameters, buffers and inputs. buffers: of the
    model, and its constants. inputs: as the caller gives them. temporary: bytes at the worst moment
    beyond all these: tensors on their way, their gradients, recomputed tensors, and collectives'
    buffers. items: the tensors that take it, the largest first. assumed: ops that could not be run
    without data, and are taken to save all that they read and make. where: of a pipeline, the
    stages of the rank; "" for the whole model. worst: the op at whose backward that moment is; ""
    for another moment, and where it was not asked for.

    >>> Account(4, 4, 8, 0, 0, 1, 2, ()).total
    19
    """

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    buffers: int
    inputs: int
    temporary: int
    items: tuple[Item, ...]
    assumed: tuple[str, ...] = ()
    where: str = ""
    worst: str = ""

    @property
    def total(self) -> int:
        """The sum of all categories."""
        return sum(size for _, size in self.rows)

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        """The bytes by category, as (category, bytes)."""
        return tuple((name, getattr(self, name)) for name in CATEGORIES)


def account_of(
    rows: tuple[Item, ...], temporary: int, assumed: tuple[str, ...] = (), where: str = ""
) -> Account:
    """Return the account of these items. temporary, assumed, where: see Account.

    >>> account_of((Item("inputs", "x", "", 1, 8),), 2).total
    10
    """
    sums = dict.fromkeys(_ITEMIZED, 0)
    for row in rows:
        sums[row.category] += row.nbytes
    return Account(
        parameters=sums["parameters"],
        gradients=sums["gradients"],
        optimizer_state=sums["optimizer_state"],
        activations=sums["activations"],
        buffers=sums["buffers"],
        inputs=sums["inputs"],
        temporary=temporary,
        items=rows,
        assumed=assumed,
        where=where,
    )


def resident(parameter: ParameterChoice, plan: Plan, trained: bool) -> Iterable[Item]:
    """Yield the items of one parameter, which are there whatever runs. trained: it has a
    gradient.

    Example: `sum(item.nbytes for item in resident(plan.parameters[0], plan, True))`
    """
    sizes = tuple(size for _, size in plan.mesh.axes)
    itemsize = parameter.nbytes // max(prod(parameter.shape), 1)
    optimizer = plan.options.optimizer
    held = [("parameters", parameter.storage, itemsize)]
    if trained:
        held.append(("gradients", parameter.gradient, itemsize))
        per_element, has_master = state_bytes_per_element(optimizer, itemsize)
        held.append(("optimizer_state", parameter.state, per_element))
        if parameter.state != parameter.storage and not has_master:
            held.append(("parameters", parameter.state, itemsize))
    # The user and the optimizer have other parts than those that compute.
    kept = kept_layout(parameter.state, parameter.shape, sizes)
    if kept != parameter.state and len(held) < 4:
        held.append(("parameters", kept, itemsize))
    for category, layout, size in held:
        count = prod(local_shape(parameter.shape, layout, sizes))
        yield Item(category, parameter.path, "", 1, count * size)


def grouped(items: Iterable[Item]) -> tuple[Item, ...]:
    """Return items of equal blocks as one, the largest first.

    >>> [item.count for item in grouped([Item("inputs", "x", "", 1, 8)] * 2)]
    [2]
    """
    sizes_of_rows: dict[tuple[str, str, str], list[int]] = {}
    for item in items:
        # A whole number between dots is a block's place in a list.
        where = re.sub(r"(?<![^.])\d+(?![^.])", "*", item.where)
        name = item.name
        if item.category in _OF_PARAMETERS:
            name = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        elif where != item.where:
            # Names of values count calls of one op: relu_3 of one block is relu_4 of the next.
            name = re.sub(r"(_\d+)+(?=_|$)", "", name)
        sizes_of_rows.setdefault((item.category, name, where), []).append(item.nbytes)
    rows = [
        Item(category, name, where, len(sizes), sum(sizes))
        for (category, name, where), sizes in sizes_of_rows.items()
        if sum(sizes)
    ]
    return tuple(sorted(rows, key=lambda row: -row.nbytes))
