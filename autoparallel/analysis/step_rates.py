"""The tokens of a step's inputs, and the highest rate of products, by which steps are rated."""

from __future__ import annotations

from math import prod

from autoparallel.cost.hardware import Hardware
from autoparallel.plan import Plan

__all__ = ["peak_of", "tokens_and_unit"]

# What an input of numbers is a batch of, by its dims: rows of features, frames (of sound, or other
# positions), images, clips.
_UNITS = ("numbers", "rows", "frames", "images", "clips")


def tokens_and_unit(plan: Plan) -> tuple[int, str]:
    """Return how many tokens the inputs of a step have, or images, frames or rows, and which.

    The largest input counts. Whole numbers are tokens, one each. Of images and rows the batch
    counts, of frames the batch and all dims that the inputs decide.

    Example: `tokens_and_unit(plan)`
    """
    inputs = plan.inputs or (plan.parts[0].plan.inputs if plan.parts else ())
    largest = max(inputs, key=lambda item: prod(item.planned), default=None)
    if largest is None or not largest.planned:
        return 0, "tokens"
    pairs = zip(largest.dims, largest.planned, strict=True)
    decided = prod([size for dim, size in pairs if not dim.isdigit()])
    if largest.is_integer:
        return decided, "tokens"
    unit = _UNITS[min(len(largest.planned), len(_UNITS)) - 1]
    return (decided if unit in ("frames", "numbers") else largest.planned[0]), unit


def peak_of(plan: Plan, hardware: Hardware) -> float:
    """Return the rate in FLOP/s at which a device would do the plan's products at its best.

    Products of different types have different rates. Without a graph, the type of the largest
    parameter counts.

    Example: `peak_of(plan, find_hardware("dgx-a100"))`
    """
    seconds = flops = 0.0
    if plan.captured is not None:
        graph = plan.captured.graph
        for op in plan.ops:
            if op.whole_flops:
                # Choices of experts are whole numbers, and no factors.
                types = [graph.values[name].dtype for name in op.reads[:2]]
                factors = [kind for kind in types if kind.is_floating_point] or types
                itemsize = max(kind.itemsize for kind in factors)
                flops += op.whole_flops
                seconds += op.whole_flops / hardware.peak(itemsize)
    if seconds:
        return flops / seconds
    largest = max(plan.parameters, key=lambda p: prod(p.shape), default=None)
    itemsize = largest.nbytes // max(prod(largest.shape), 1) if largest is not None else 4
    return hardware.peak(itemsize)
