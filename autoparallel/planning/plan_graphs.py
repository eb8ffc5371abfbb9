"""Plans that were read from a text get the graphs that they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autoparallel.capture.graph_breaks import GraphBreaks
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.plan import Plan
from autoparallel.planning.pipeline_choices import in_parts

__all__ = ["with_graphs"]


def with_graphs(plan: Plan, traced: Captured | GraphBreaks) -> Plan:
    """Return a plan, which was read from JSON, with the graphs that it was made for.

    Source lines are those of the code as it is now: a comment above makes no other program.
    traced: the model, traced again. Raises PlanError where its fingerprint is not the plan's.
    """
    if plan.pipeline is not None and isinstance(traced, Captured):
        traced = in_parts(traced)
    graph = traced if isinstance(traced, GraphBreaks) else traced.graph
    if graph.fingerprint != plan.fingerprint:
        raise PlanError(
            f"the plan was made for another {plan.model}",
            why="the traced program differs from the one planned for",
            fix="plan again, or pass the example_inputs and the mode (train, eval) planned for",
        )
    if isinstance(traced, Captured) == bool(plan.breaks or plan.parts):
        raise PlanError(f"the plan is no plan of {plan.model}, or of its parts", fix="plan again")
    if isinstance(traced, Captured):
        return _with_graph(plan, traced)
    graphs = {path: part.captured for part in traced.parts for path in part.paths}
    told = [path for part in plan.parts for path in part.paths]
    stay = {item.path: item.line for item in traced.breaks}
    if sorted(told) != sorted(graphs) or [item.path for item in plan.breaks] != [*stay]:
        raise PlanError(
            f"the plan was made for another {plan.model}",
            why="the modules that are split, or those that stay Python, are others",
            fix="plan again",
        )
    parts = tuple(
        replace(part, plan=_with_graph(part.plan, graphs[part.paths[0]])) for part in plan.parts
    )
    named = ((f"{path}/", part.plan) for part in parts for path in part.paths)
    lines = {prefix + op.name: op.line for prefix, one in named for op in one.ops}
    breaks = tuple(replace(item, line=stay[item.path]) for item in plan.breaks)
    return replace(_with_lines(plan, lines), parts=parts, breaks=breaks)


def _with_graph(plan: Plan, captured: Captured) -> Plan:
    """Return a plan of one program with its graph, and with the lines that the graph has."""
    lines = {node.name: node.line for node in captured.graph.calls}
    return replace(_with_lines(plan, lines), captured=captured)


def _with_lines(plan: Plan, lines: Mapping[str, str]) -> Plan:
    """Return a plan with other source lines of its ops, by their names."""
    return replace(plan, ops=tuple(replace(op, line=lines.get(op.name, "")) for op in plan.ops))
