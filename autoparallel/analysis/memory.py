"""The memory that a finished plan takes on a rank, and the tensors that take it.

It is counted by executing the emitted program abstractly, and shares nothing with the tables that
the planner chose by. Of a rank's parts the largest are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from autoparallel.analysis.abstract_execution import AbstractExecution
from autoparallel.analysis.gradient_buckets import reducing_nbytes
from autoparallel.analysis.liveness import Liveness
from autoparallel.analysis.memory_account import (
    Account,
    Item,
    account_of,
    grouped,
    resident,
)
from autoparallel.analysis.observed_runs import Seen
from autoparallel.analysis.stage_memory import memory_of_pipeline
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph
from autoparallel.plan import Plan

__all__ = ["memory_of"]


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
    Of a plan with stages it is that of the place on their axis that needs most.
    Raises PlanError for a plan without its graph.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(512, 512, bias=False), torch.zeros(8, 512)
    >>> memory_of(autoparallel.make_plan(layer, 2, example_inputs=inputs)).parameters
    524288
    """
    if not plan.is_traced:
        raise PlanError(
            "the plan has no graph to count the memory of",
            why="it was read from a text",
            fix="plan again with the model and example inputs",
        )
    if plan.pipeline is not None:
        return max(memory_of_pipeline(plan, graph), key=lambda account: account.total)
    programs = _programs(plan)
    trained = {
        f"{prefix}{node.target}": node.result.requires_grad
        for prefix, part in programs
        for node in _graph(part).nodes
        if node.kind == "parameter"
    }
    items: list[Item] = []
    for parameter in plan.parameters:
        items += resident(parameter, plan, trained.get(parameter.path, True))
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
                sized or _graph(part),
                part,
                regions,
                seen=seen if part is plan else None,
                remade=remade,
            )
            known[id(part)] = (walk, Liveness(walk))
        walk, liveness = known[id(part)]
        # Parts run one after the other, so the worst one counts; saved activations add up.
        reducing = reducing_nbytes(part, part.parameters) - liveness.activations
        temporary = max(temporary, liveness.temporary, reducing)
        assumed += [f"{prefix}{name}" for name in walk.assumed]
        saved = frozenset(liveness.saved)
        for number, storage in enumerate(walk.storages):
            category = {"buffer": "buffers", "input": "inputs"}.get(storage.kind, "activations")
            if number in saved if category == "activations" else storage.kind != "parameter":
                where = ".".join(text for text in (prefix.rstrip("."), storage.where) if text)
                items.append(Item(category, storage.name, where, 1, storage.nbytes))
    account = account_of(grouped(items), temporary, tuple(assumed))
    # Of parts, none decides alone.
    return account if plan.captured is None else replace(account, worst=liveness.worst)


def _programs(plan: Plan) -> list[tuple[str, Plan]]:
    """Return the plans of what is run, with the path of each in the model as a prefix."""
    if plan.captured is not None:
        return [("", plan)]
    return [(f"{path}.", part.plan) for part in plan.parts for path in part.paths]


def _graph(plan: Plan) -> Graph:
    """Return the graph of a traced plan."""
    assert plan.captured is not None
    return plan.captured.graph
