"""The data of a plan's page: what is drawn, and the tables beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.timeline import timeline
from autoparallel.analysis.training_step import Timeline
from autoparallel.plan import ParameterChoice, Plan
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.view.html.module_tree import Module, module_tree
from autoparallel.view.html.page_elements import Elements
from autoparallel.view.threads_svg import threads_svg

__all__ = ["page_data"]

# Rows of the table of what takes memory.
_ITEMS = 60
# Rows of a timeline's text that the plan's own has not.
_OF_THE_STEP = ("passes", "communicating", "utilization")


def page_data(
    plan: Plan, explanations: Mapping[str, Sequence[str]], alternatives: bool = True
) -> dict[str, Any]:
    """Return what the page shows, as JSON can hold it.

    plan: it may have been read from a text; shapes, threads and the table of memory are then left
    out, and the page says so. explanations: more sentences about an op, by its name.
    alternatives: whether to tell what each op could have done instead.
    """
    drawn = Elements(plan, explanations, alternatives)
    tree = module_tree(
        [element.where for element in drawn.elements],
        [element.content for element in drawn.elements],
    )
    step = timeline(plan)
    return {
        "model": plan.model,
        "mesh": [list(axis) for axis in plan.whole_mesh.axes],
        "about": _about(plan, step),
        "weight": plan.product_weight,
        "tree": _tree_rows(tree),
        "elements": [element.row for element in drawn.elements],
        "edges": drawn.edges,
        "parameters": [_parameter(one, drawn) for one in plan.parameters],
        "memory": _memory(plan),
        "timeline": _timeline_rows(step),
        "threads": threads_svg(plan) if plan.captured is not None else "",
        "table": str(plan.threads()) if plan.captured is not None else "",
        "stays": [str(stays) for stays in plan.breaks],
    }


def _about(plan: Plan, step: Timeline) -> list[list[str]]:
    """Return the rows at the top of the page."""
    lines = str(plan).splitlines()
    lines += [line for line in str(step).splitlines() if line.startswith(_OF_THE_STEP)]
    rows = (line.partition(" ") for line in lines)
    return [[name, text.strip()] for name, _, text in rows]


def _parameter(parameter: ParameterChoice, drawn: Elements) -> list[Any]:
    """Return the row of a parameter."""
    words = drawn.words
    return [
        parameter.path,
        ", ".join(map(str, parameter.shape)),
        bytes_text(parameter.nbytes),
        words.split(parameter),
        words.layout(parameter.storage),
        words.layout(parameter.gradient),
        words.layout(parameter.state),
        parameter.reason,
        seconds_text(parameter.added) if parameter.added else "",
        drawn.stored_instead(parameter),
    ]


def _memory(plan: Plan) -> dict[str, Any]:
    """Return the bytes by category, the limit, and what takes most where the graph is there."""
    items = memory_of(plan).items[:_ITEMS] if plan.is_traced else ()
    return {
        "rows": [[name.replace("_", " "), nbytes] for name, nbytes in plan.memory],
        "limit": plan.memory_limit,
        "items": [
            [item.category.replace("_", " "), item.name, item.where, item.count, item.nbytes]
            for item in items
        ],
    }


def _tree_rows(module: Module) -> dict[str, Any]:
    """Return a module with all in it, as JSON can hold it."""
    rows: dict[str, Any] = {"p": module.path}
    if module.elements:
        rows["e"] = module.elements
    if module.children:
        rows["c"] = [_tree_rows(child) for child in module.children.values()]
    if module.runs:
        place = {name: at for at, name in enumerate(module.children)}
        rows["r"] = [[name, place[names[0]], len(names)] for name, names in module.runs]
    return rows


def _timeline_rows(step: Timeline) -> dict[str, Any]:
    """Return the events of a step in columns; times are whole nanoseconds, to be short."""
    phases = list(dict.fromkeys(event.phase for event in step.events))
    several = len({event.place for event in step.events}) > 1
    lanes = [f"pp {e.place}: {e.stream}" if several else e.stream for e in step.events]
    streams = list(dict.fromkeys(sorted(lanes, key=_lane_order) if several else lanes))
    names = list(dict.fromkeys(event.name for event in step.events))
    at = {name: number for number, name in enumerate(names)}
    return {
        "seconds": step.seconds,
        "phases": phases,
        "streams": streams,
        "names": names,
        "events": [
            [
                at[event.name],
                streams.index(lane),
                phases.index(event.phase),
                round(event.start * 1e9),
                round(event.seconds * 1e9),
            ]
            for event, lane in zip(step.events, lanes, strict=True)
        ],
    }


def _lane_order(lane: str) -> tuple[int, str]:
    """Return the key by which lanes of ranks stand below each other."""
    place, _, stream = lane.removeprefix("pp ").partition(": ")
    return int(place), stream
