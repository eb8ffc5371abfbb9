"""The memory that a finished plan takes on a rank, and the tensors that take it.

It is counted by executing the emitted program abstractly, and shares nothing with the tables that
the planner chose by. Of a rank's parts the largest are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from autoparallel.analysis.abstract_execution import AbstractExecution, Seen
from autoparallel.analysis.liveness import Liveness
from autoparallel.cost.optimizer_state import state_bytes_per_element
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph
from autoparallel.graph.part_sizes import local_shape
from autoparallel.plan import ParameterChoice, Plan
from autoparallel.plan.kept_layouts import kept_layout

__all__ = ["CATEGORIES", "Account", "Item", "memory_of"]

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
    without data, and are taken to save all that they read and make.

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

    @property
    def total(self) -> int:
        """The sum of all categories."""
        return sum(size for _, size in self.rows)

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        """The bytes by category, as (category, bytes)."""
        return tuple((name, getattr(self, name)) for name in CATEGORIES)


def memory_of(
    plan: Plan,
    recomputed: Sequence[Iterable[str]] | None = None,
    graph: Graph | None = None,
    seen: Seen | None = None,
) -> Account:
    """Return the memory that `plan` takes on the rank that holds the most.

    recomputed: regions, as names of calls, that run once more in the backward pass, and of which
    only the inputs are saved; by default the plan's. graph: with the sizes to count for; by default
    those of the example inputs, however much larger a batch was planned for. seen: what calls save,
    as it was seen in other plans of the same graph, to look up and to add to.
    Raises PlanError for a plan without its graph.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(512, 512, bias=False), torch.zeros(8, 512)
    >>> memory_of(autoparallel.make_plan(layer, 2, example_inputs=inputs)).parameters
    524288
    """
    plan.refuse_stages("memory")
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
    known: dict[int, tuple[AbstractExecution, Liveness]] = {}
    for prefix, part in programs:
        # Equal parts share one plan, which is executed once.
        if id(part) not in known:
            sized = graph if part is plan else None
            regions = part.recomputed if recomputed is None else recomputed
            remade = part.remade if recomputed is None else ()
            walk = AbstractExecution(
                sized or _graph(part), part, regions, seen if part is plan else None, remade
            )
            known[id(part)] = (walk, Liveness(walk))
        walk, liveness = known[id(part)]
        # Parts run one after the other, so the worst one counts; saved activations add up.
        temporary = max(temporary, liveness.temporary)
        assumed += [f"{prefix}{name}" for name in walk.assumed]
        saved = frozenset(liveness.saved)
        for number, storage in enumerate(walk.storages):
            category = {"buffer": "buffers", "input": "inputs"}.get(storage.kind, "activations")
            if number in saved if category == "activations" else storage.kind != "parameter":
                where = ".".join(text for text in (prefix.rstrip("."), storage.where) if text)
                items.append(Item(category, storage.name, where, 1, storage.nbytes))
    rows = _grouped(items)
    return Account(
        **{name: sum(i.nbytes for i in rows if i.category == name) for name in _ITEMIZED},
        temporary=temporary,
        items=rows,
        assumed=tuple(assumed),
    )


def _programs(plan: Plan) -> list[tuple[str, Plan]]:
    """Return the plans of what is run, with the path of each in the model as a prefix."""
    if plan.captured is not None:
        return [("", plan)]
    return [(f"{path}.", part.plan) for part in plan.parts for path in part.paths]


def _graph(plan: Plan) -> Graph:
    """Return the graph of a traced plan."""
    assert plan.captured is not None
    return plan.captured.graph


def _resident(parameter: ParameterChoice, plan: Plan, trained: bool) -> Iterable[Item]:
    """Yield the items of one parameter, which are there whatever runs. trained: it has a
    gradient.
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


def _grouped(items: Iterable[Item]) -> tuple[Item, ...]:
    """Return items of equal blocks as one, the largest first."""
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
