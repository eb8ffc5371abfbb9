"""A plan's fields as rows of JSON, and back, each checked for its type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import layout_text
from autoparallel.plan.choices import (
    Break,
    Conversion,
    OpChoice,
    ParameterChoice,
    Pipeline,
    PlannedInput,
)
from autoparallel.plan.plan_rows import VERSION, row_of, typed, value_of

__all__ = ["fields_of_rows", "parts_of_rows", "rows_of_plan"]

# The fields that are a single value, with their types.
_SCALARS = {
    "model": "str",
    "hardware": "str",
    "fingerprint": "str",
    "cost": "float",
    "lower_bound": "float",
    "method": "str",
    "seconds": "float",
    "product_weight": "float",
}

# Numbers that not every text has.
_TOLD = ("step_seconds", "step_bound", "memory_price")

# All keys of a plan's rows: a key that is misspelt would be left out without a word.
_KEYS = {
    *_SCALARS,
    *_TOLD,
    "device_nbytes",
    *"version mesh options parameters ops conversions outputs recomputed recompute memory".split(),
    *"collectives inputs returned request breaks parts pipeline remade fills_gaps".split(),
}
_OPTIONS = {field.name: str(field.type) for field in fields(Options)}

# Ranks in all that a plan may be for: those that run are compared with it, and counted by it.
_MOST_RANKS = 2**24


def rows_of_plan(plan: Any) -> dict[str, Any]:
    """Return what JSON is to hold of a plan; keys that not every text has are last.

    plan: a `Plan`, whose class uses this function and therefore is not imported here.
    """
    rows: dict[str, Any] = {
        "version": VERSION,
        "model": plan.model,
        "mesh": dict(plan.mesh.axes),
        "options": {name: getattr(plan.options, name) for name in Options.__slots__},
        "hardware": plan.hardware,
        "fingerprint": plan.fingerprint,
        "cost": plan.cost,
        "lower_bound": plan.lower_bound,
        "method": plan.method,
        "seconds": plan.seconds,
        "product_weight": plan.product_weight,
        "outputs": [layout_text(layout) for layout in plan.outputs],
        "parameters": [row_of(parameter) for parameter in plan.parameters],
        "ops": [row_of(op) for op in plan.ops],
        "conversions": [row_of(conversion) for conversion in plan.conversions],
        "recomputed": [list(group) for group in plan.recomputed],
        "recompute": [list(item) for item in plan.recompute],
        "memory": dict(plan.memory),
    }
    for name in (*_TOLD, "device_nbytes"):
        if getattr(plan, name):
            rows[name] = getattr(plan, name)
    if plan.remade:
        rows["remade"] = list(plan.remade)
    if not plan.fills_gaps:
        rows["fills_gaps"] = False
    if plan.collectives is not None:
        rows["collectives"] = [list(row) for row in plan.collectives]
    if plan.inputs or plan.returned:
        rows["inputs"] = [row_of(item) for item in plan.inputs]
        rows["returned"] = list(plan.returned)
    if plan.pipeline is not None:
        rows["pipeline"] = row_of(plan.pipeline)
    if plan.request:
        rows["request"] = dict(plan.request)
    if plan.breaks:
        rows["breaks"] = [row_of(item) for item in plan.breaks]
        rows["parts"] = [
            {"paths": list(part.paths), "plan": rows_of_plan(part.plan)} for part in plan.parts
        ]
    return rows


def fields_of_rows(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan's fields from its rows, all but the parts; keys that not every text has may be
    absent.

    Raises KeyError, TypeError and ValueError for rows that are not those of a plan.
    """
    unknown = [key for key in rows if key not in _KEYS]
    if unknown:
        raise ValueError(f"a plan has no {unknown[0]!r:.60}")
    simple = {name: typed(kind, rows[name], name) for name, kind in _SCALARS.items()}
    simple |= {name: typed("float", rows.get(name, 0.0), name) for name in _TOLD}
    counts = rows.get("collectives")
    return dict(
        **simple,
        mesh=_mesh(rows["mesh"]),
        device_nbytes=typed("int", rows.get("device_nbytes", 0), "device_nbytes"),
        options=_options(rows["options"]),
        parameters=_values(ParameterChoice, rows["parameters"]),
        ops=_values(OpChoice, rows["ops"]),
        conversions=_values(Conversion, rows["conversions"]),
        outputs=typed("tuple[Layout, ...]", rows["outputs"], "outputs"),
        recomputed=typed("tuple[tuple[str, ...], ...]", rows["recomputed"], "recomputed"),
        recompute=_table_of(rows["recompute"], "recompute", "str", "str"),
        remade=typed("tuple[str, ...]", rows.get("remade", []), "remade"),
        fills_gaps=typed("bool", rows.get("fills_gaps", True), "fills_gaps"),
        memory=_table_of(
            [list(row) for row in _table(rows["memory"], "memory").items()],
            *("memory", "str", "int"),
        ),
        # None says that nobody has counted; an empty tuple, that there are none.
        collectives=None
        if counts is None
        else _table_of(counts, "collectives", "str", "str", "str", "int"),
        inputs=_values(PlannedInput, rows.get("inputs", [])),
        returned=typed("tuple[str, ...]", rows.get("returned", []), "returned"),
        pipeline=value_of(Pipeline, rows["pipeline"]) if "pipeline" in rows else None,
        request=_table_of(
            [list(row) for row in _table(rows.get("request", {}), "request").items()],
            *("request", "str", "str"),
        ),
        breaks=_values(Break, rows.get("breaks", [])),
    )


def parts_of_rows(rows: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], dict[str, Any]], ...]:
    """Return the parts of a plan's rows as (paths, rows of the part's plan).

    Raises KeyError and TypeError for rows that are not those of parts.
    """
    parts = [_table(item, "parts") for item in _list(rows.get("parts", []), "parts")]
    return tuple(
        (typed("tuple[str, ...]", part["paths"], "paths"), _table(part["plan"], "plan"))
        for part in parts
    )


def _table(content: Any, what: str) -> dict[str, Any]:
    """Return a table of named entries. Raises TypeError for anything else."""
    if not isinstance(content, dict):
        raise TypeError(f"{what} is no table")
    return content


def _list(content: Any, what: str) -> list[Any]:
    """Return a list. Raises TypeError for anything else."""
    if not isinstance(content, list):
        raise TypeError(f"{what} is no list")
    return content


def _values(kind: Any, rows: Any) -> tuple[Any, ...]:
    """Return the frozen values of a list of rows."""
    return tuple([value_of(kind, row) for row in _list(rows, kind.__name__)])


def _table_of(rows: Any, what: str, *kinds: str) -> tuple[Any, ...]:
    """Return rows of as many values as there are types."""
    lists = [_list(row, what) for row in _list(rows, what)]
    return tuple(
        tuple(typed(kind, item, what) for kind, item in zip(kinds, row, strict=True))
        for row in lists
    )


def _mesh(rows: Any) -> Mesh:
    """Return the mesh of these axes."""
    mesh = Mesh(**_table(rows, "mesh"))
    if mesh.world_size > _MOST_RANKS:
        raise ValueError(f"mesh has {mesh.world_size} ranks")
    return mesh


def _options(rows: Any) -> Options:
    """Return the options of these entries; those that are missing have their defaults."""
    rows = dict(_table(rows, "options"))
    unknown = [name for name in rows if name not in _OPTIONS]
    if unknown:
        raise ValueError(f"there is no option {unknown[0]!r:.60}")
    given: dict[str, Any] = {}
    for name, content in rows.items():
        kind = _OPTIONS[name].removesuffix(" | None")
        empty = content is None and kind != _OPTIONS[name]
        given[name] = None if empty else typed(kind, content, name)
    return Options(**given)
