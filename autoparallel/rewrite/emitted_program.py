"""The program of one rank as text, for a plan alone: no devices and no weights are needed."""

from __future__ import annotations

from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.rewrite.stage_programs import StagePrograms
from autoparallel.rewrite.stages import cut_plan
from autoparallel.runtime.ranks import absent_ranks

__all__ = ["emitted_program", "joined_programs", "require_graph"]


def emitted_program(plan: Plan, rank: int = 0) -> str:
    """Return the Python that `rank` runs in place of the model's forward, as the plan says.

    A plan in parts gives the program of each kind of part, under a comment that names its modules.

        >>> import autoparallel, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> plan = autoparallel.make_plan(model, 2, example_inputs=torch.ones(4, 8))
        >>> print(autoparallel.emitted_program(plan).partition("(")[0])
        def forward

    Raises PlanError for a rank that the mesh does not have, and for a plan read from JSON.
    """
    if plan.pipeline is not None:
        return _program_of_stage(plan, rank)
    ranks = absent_ranks(plan.mesh, rank)
    if plan.breaks:
        sources = [
            (path, emit(require_graph(part.plan).graph, part.plan, ranks, plan.model).source)
            for part in plan.parts
            for path in part.paths
        ]
        return joined_programs(sources)
    return emit(require_graph(plan).graph, plan, ranks, plan.model).source


def _program_of_stage(plan: Plan, rank: int) -> str:
    """Return the programs of one rank of a pipeline: once a step, and for each micro-batch."""
    assert plan.pipeline is not None
    _ = absent_ranks(plan.whole_mesh, rank)  # the rank is one of the mesh
    place, inside = divmod(rank, plan.stage_mesh.world_size)
    stages = cut_plan(require_graph(plan).graph, plan)
    ranks = absent_ranks(plan.stage_mesh, inside)
    count = plan.pipeline.microbatches
    return "\n".join(
        StagePrograms(stages[number], ranks, count, plan.model).source
        for number in plan.pipeline.of_rank(place)
    )


def joined_programs(sources: list[tuple[str, str]]) -> str:
    """Return programs of several modules, (path, text) each, one after another; equal ones once."""
    paths: dict[str, list[str]] = {}
    for path, source in sources:
        paths.setdefault(source, []).append(path)
    if list(paths.values()) == [[""]]:
        return next(iter(paths))
    return "\n\n".join(
        f"# {', '.join(dict.fromkeys(path or 'the model itself' for path in named))}\n{source}"
        for source, named in paths.items()
    )


def require_graph(plan: Plan) -> Captured:
    """Return the traced graph of the plan. Raises PlanError for a plan without one."""
    if plan.captured is None:
        raise PlanError(
            f"the plan for {plan.model} has no graph",
            why="a plan that was read from JSON holds placements, not the program",
            fix="make_plan(model, ...) plans anew; apply_plan(model, plan) follows this one",
        )
    return plan.captured
