"""The memory that a finished plan takes on a rank, and what takes it.

It is counted by walking the emitted program, and shares nothing with the tables that the planner
chose by. Of a rank's parts the largest are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from autoparallel.cost.peak import Peak
from autoparallel.cost.walk import Walk, local_shape
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph
from autoparallel.graph.passes import at_least
from autoparallel.plan import ParameterChoice, Plan

__all__ = ["Account", "Item", "account", "state_nbytes"]

_MASTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class Item:
    """What takes memory: `count` tensors of one kind, alike in every block.

    category: a field of Account. name: of a parameter or of the value or op that is kept, with *
    for the number of the block. where: the module that computes it. nbytes: of all of them.
    """

    category: str
    name: str
    where: str
    count: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes on one rank, at the worst moment of a step.

    parameters, gradients, optimizer_state: between steps, and until the update. activations: what
    autograd keeps of the forward pass when the backward pass begins, each storage once; not
    parameters, buffers and inputs. buffers: of the model, and its constants. inputs: as the caller
    gives them. temporary: what there is at the worst moment beyond all these: tensors on their way,
    their gradients, tensors made again, and what collectives need. items: what takes it, the
    largest first. assumed: ops that could not be run without data, and are taken to keep all that
    they read and make.
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

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer_state
            + self.activations
            + self.buffers
            + self.inputs
            + self.temporary
        )


def state_nbytes(optimizer: str, itemsize: int) -> int:
    """Bytes of optimizer state for one element of a parameter of `itemsize` bytes.

    "sgd": none. "momentum": one number of the parameter's type. "adam": two. "mixed_adam": a
    master copy and two moments, all float32 (12 bytes: arXiv 1910.02054); for a parameter that is
    float32 itself, the moments alone.
    """
    if optimizer == "mixed_adam":
        return 2 * itemsize if itemsize >= _MASTER_BYTES else 3 * _MASTER_BYTES
    return {"sgd": 0, "momentum": 1, "adam": 2}[optimizer] * itemsize


def account(plan: Plan, recomputed: Sequence[frozenset[str]] = ()) -> Account:
    """The memory that `plan` takes on the rank that holds the most.

    recomputed: regions, as names of calls, that run once more in the backward pass, and of which
    only what goes in is kept. Sizes are those planned for: `plan.options.tokens`.
    Raises PlanError for a plan without its graph.
    """
    if not plan.is_traced:
        raise PlanError(
            "the plan has no graph to count the memory of",
            why="it was read from a text",
            fix="plan again with the model and example inputs",
        )
    programs = _programs(plan)
    trained = {
        f"{prefix}{node.target}": node.result.requires_grad
        for prefix, part in programs
        for node in _graph(part).nodes
        if node.kind == "parameter"
    }
    items: list[Item] = []
    for parameter in plan.parameters:
        items += _resident(parameter, plan, trained.get(parameter.path, True))
    assumed: list[str] = []
    temporary = 0
    known: dict[int, tuple[Walk, Peak]] = {}
    for prefix, part in programs:
        if id(part) not in known:
            walk = Walk(at_least(_graph(part), part.options.tokens), part)
            known[id(part)] = (walk, Peak(walk, recomputed))
        walk, peak = known[id(part)]
        temporary = max(temporary, peak.temporary)
        assumed += [f"{prefix}{name}" for name in walk.assumed]
        for number, storage in enumerate(walk.storages):
            category = {"buffer": "buffers", "input": "inputs"}.get(storage.kind, "activations")
            if number in peak.kept if category == "activations" else storage.kind != "parameter":
                where = ".".join(text for text in (prefix.rstrip("."), storage.where) if text)
                items.append(Item(category, storage.name, where, 1, storage.nbytes))
    rows = _grouped(items)
    return Account(
        **{name: sum(i.nbytes for i in rows if i.category == name) for name in _COUNTED},
        temporary=temporary,
        items=rows,
        assumed=tuple(assumed),
    )


_COUNTED = ("parameters", "gradients", "optimizer_state", "activations", "buffers", "inputs")


def _programs(plan: Plan) -> list[tuple[str, Plan]]:
    """What is run, with the path of each in the model."""
    if plan.captured is not None:
        return [("", plan)]
    return [(f"{path}.", part.plan) for part in plan.parts for path in part.paths]


def _graph(plan: Plan) -> Graph:
    assert plan.captured is not None
    return plan.captured.graph


def _resident(parameter: ParameterChoice, plan: Plan, trained: bool) -> Iterable[Item]:
    """What is there of one parameter, whatever runs."""
    sizes = tuple(size for _, size in plan.mesh.axes)
    itemsize = parameter.nbytes // max(prod(parameter.shape), 1)
    state = state_nbytes(getattr(plan.options, "optimizer", "adam"), itemsize)
    held: list[tuple[str, Any, int]] = [("parameters", parameter.storage, itemsize)]
    if trained:
        gradient = getattr(parameter, "gradient", parameter.storage)
        held.append(("gradients", gradient, itemsize))
        held.append(("optimizer_state", getattr(parameter, "state", parameter.storage), state))
    for category, placed, size in held:
        layout = placed if isinstance(placed, tuple) else (placed,)
        count = prod(local_shape(parameter.shape, layout, sizes))
        yield Item(category, parameter.path, "", 1, count * size)


def _grouped(items: Iterable[Item]) -> tuple[Item, ...]:
    """Items of equal blocks together, the largest first."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for item in items:
        where = re.sub(r"(?<![^.@])\d+(?![^.@])", "*", item.where)
        pattern = r"(?<![^.@])\d+(?![^.@])" if item.category in _OF_PARAMETERS else r"_\d+(?=_|$)"
        name = re.sub(pattern, "*", item.name) if where or item.where else item.name
        if item.category in _OF_PARAMETERS:
            name = re.sub(pattern, "*", item.name)
        found.setdefault((item.category, name, where), []).append(item.nbytes)
    rows = [
        Item(category, name, where, len(sizes), sum(sizes))
        for (category, name, where), sizes in found.items()
        if sum(sizes)
    ]
    return tuple(sorted(rows, key=lambda row: -row.nbytes))


_OF_PARAMETERS = ("parameters", "gradients", "optimizer_state")
