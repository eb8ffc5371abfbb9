"""The check that what a plan's text says in one place agrees with what it says in others.

A text may have been edited. What only the model can tell, planning/plan_check.py compares with it
when the plan is applied; but a plan is also shown without its model, and what is computed from it
then takes the lengths of its rows to be right, and conversions to go where they say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from autoparallel.options import SCHEDULES
from autoparallel.placement import Layout, Shard, layout_text
from autoparallel.plan.choices import Conversion, Pipeline

__all__ = ["require_agreement"]

# What a text tells of each stage, or of each rank: all of a row or, but for the first row, none.
_LENGTHS = (
    (("starts", "seconds", "nbytes"), "stages"),
    (("forward_seconds", "weight_seconds", "once_seconds", "back_nbytes"), "stages"),
    (("in_flight",), "stages"),
    (("memory",), "ranks"),
)


def require_agreement(values: Mapping[str, Any]) -> None:
    """Raise ValueError where the fields of a plan do not agree with each other.

    values: the plan's fields by their names.
    """
    axes = len(values["mesh"].axes)
    for what, dims, layout in _layouts(values):
        if len(layout) != axes:
            raise ValueError(f"{what} is {layout_text(layout)} on {values['mesh']}")
        if any(isinstance(each, Shard) and each.dim >= dims for each in layout):
            raise ValueError(f"{what} is {layout_text(layout)}, and has {dims} dims")
    if len(values["returned"]) not in (0, len(values["outputs"])):
        raise ValueError(f"there are {len(values['returned'])} names of what is returned")
    for op in values["ops"]:
        if (len(op.operands), len(op.results)) != (len(op.reads), len(op.makes)):
            raise ValueError(f"op {op.name:.60} has layouts for more or fewer tensors")
        if len(op.kernels) not in (0, axes):
            raise ValueError(f"op {op.name:.60} has {len(op.kernels)} kernels on {values['mesh']}")
    if values["pipeline"] is not None:
        _require_stages(values["pipeline"])


def _layouts(values: Mapping[str, Any]) -> Iterator[tuple[str, float, Layout]]:
    """Yield all layouts of a plan, each with what it is of, and the number of its dims."""
    for choice in values["parameters"]:
        for layout in (choice.storage, choice.gradient, choice.state):
            yield f"parameter {choice.path:.60}", len(choice.shape), layout
    # The sizes of other tensors are told where they are converted.
    for op in values["ops"]:
        for layout in (*op.operands, *op.results):
            yield f"a tensor of op {op.name:.60}", math.inf, layout
    for conversion in values["conversions"]:
        what, dims = f"value {conversion.value:.60}", len(conversion.shape.split(", "))
        for layout in _way(conversion):
            yield what, dims if conversion.shape else 0, layout
    for layout in values["outputs"]:
        yield "a tensor that is returned", math.inf, layout


def _way(conversion: Conversion) -> Iterator[Layout]:
    """Yield the layouts that a value has on its way.

    Raises ValueError unless each step begins where the one before it ends.
    """
    layout = conversion.source
    yield layout
    for step in conversion.steps:
        if step.axis >= len(layout) or layout[step.axis] != step.source:
            raise ValueError(
                f"step {step} of value {conversion.value:.60} begins at {layout_text(layout)}"
            )
        layout = step.applied(layout)
        yield layout
    if layout != conversion.target:
        raise ValueError(
            f"value {conversion.value:.60} gets to {layout_text(layout)}, not to "
            f"{layout_text(conversion.target)}"
        )


def _require_stages(pipeline: Pipeline) -> None:
    """Raise ValueError unless the ranks share the stages, each of which has all that is told of
    any.
    """
    stages, ranks = pipeline.stages, pipeline.ranks
    if pipeline.schedule not in SCHEDULES:
        raise ValueError(f"there is no schedule {pipeline.schedule!r:.60}")
    if ranks < 1 or stages < 1 or stages % ranks:
        raise ValueError(f"{ranks} ranks do not share {stages} stages")
    if pipeline.microbatches < 1:
        raise ValueError("the stages have no micro-batches")
    for names, each in _LENGTHS:
        wanted = getattr(pipeline, each)
        counts = {name: len(getattr(pipeline, name)) for name in names}
        told = "starts" in names or any(counts.values())
        wrong = [name for name, count in counts.items() if told and count != wanted]
        if wrong:
            raise ValueError(f"{wrong[0]} has {counts[wrong[0]]} entries for {wanted} {each}")
