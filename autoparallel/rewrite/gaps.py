"""The plan's gaps: where the backward pass waits for a collective, and what it does meanwhile.

The emitted program and the timeline both read this table, so that the one tells of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoparallel.placement import (
    Collective,
    Invariant,
    Layout,
    Partial,
    Step,
)
from autoparallel.plan import Conversion, Plan
from autoparallel.rules.ops.contraction import LATE_PRODUCTS
from autoparallel.runtime.overlap import MOST_IN_GAP

__all__ = ["Gaps", "Summed", "find_gaps"]

# The collectives that can be started and waited for apart.
_STARTED = (Collective.ALL_REDUCE, Collective.ALL_GATHER, Collective.REDUCE_SCATTER)


@dataclass(frozen=True)
class Summed:
    """A product that is summed over the ranks piece by piece while it is computed.

    axis: of the mesh. target: the layout that all of its readers read. steps: the one to it.
    """

    axis: int
    target: Layout
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Gaps:
    """The gaps of a plan, numbered from 1 in the order in which the program makes conversions.

    conversions: the gap of each step, by the value and the steps up to it. products: the gap to
    which a product leaves the gradient of its weight, by op. summed: by op.
    """

    conversions: Mapping[tuple[str, tuple[Step, ...]], int] = field(default_factory=dict)
    products: Mapping[str, int] = field(default_factory=dict)
    summed: Mapping[str, Summed] = field(default_factory=dict)


def find_gaps(plan: Plan) -> Gaps:
    """Return the gaps of a plan; none where its options say that collectives are waited for.

    The gradient of a conversion is started when it is there, and waited for when nothing else is
    ready. Nothing waits for the gradient of a weight, so it fills gaps: those of conversions that
    the program makes before the product, because the backward pass runs the other way round. Each
    of the last two gaps gets one such gradient before the last one gets more. The gradient of a
    weight that is gathered has to be reduced afterwards, which needs something left to hide it: a
    gap that is left before the first product is none for it. A product that is made again by
    itself leaves nothing to a gap: it is a function of tensors. What a gradient is computed of is
    kept until its gap; a plan that has no memory for that (`Plan.fills_gaps`) leaves a gradient to
    the gap of the product's own operand alone, which comes right behind it.
    """
    if not plan.options.overlap:
        return Gaps()
    known = {(each.value, each.target): each for each in plan.conversions}
    parameters = {parameter.name: parameter for parameter in plan.parameters}
    conversions: dict[tuple[str, tuple[Step, ...]], int] = {}
    filled: list[int] = []
    products: dict[str, int] = {}
    early = 0
    for op in plan.ops:
        for read in zip(op.reads, op.operands, strict=True):
            conversion = known.get(read)
            if conversion is None or not conversion.requires_grad or read[0] in parameters:
                continue
            for count, step in enumerate(conversion.steps):
                key = (conversion.value, conversion.steps[: count + 1])
                if key not in conversions and step.backward.collective in _STARTED:
                    filled.append(0)
                    conversions[key] = len(filled)
        weight = parameters.get(op.reads[1]) if len(op.reads) > 1 else None
        late = op.target in LATE_PRODUCTS and weight is not None and len(weight.shape) == 2
        late = late and op.name not in plan.remade
        if late and not early:
            early = len(filled) + 1
        gathered = late and known.get((op.reads[1], op.operands[1]))
        least = early if gathered and _is_gathered(gathered) else 1
        if late and len(filled) >= least and not any(op.kernels):
            last = len(filled)
            empty = [gap for gap in (last, last - 1) if gap >= least and not filled[gap - 1]]
            moved = known.get((op.reads[0], op.operands[0]))
            own = conversions.get((moved.value, moved.steps)) if moved else None
            gap = empty[0] if empty and own != last else last
            gap = gap if plan.fills_gaps else own or 0
            if gap >= least and filled[gap - 1] < MOST_IN_GAP:
                products[op.name] = gap
                filled[gap - 1] += 1
    return Gaps(conversions, products, _summed(plan, known, products))


def _is_gathered(conversion: Conversion) -> bool:
    """Return whether a conversion gathers parts, and so reduces the gradient to parts."""
    return any(step.forward.collective is Collective.ALL_GATHER for step in conversion.steps)


def _summed(
    plan: Plan, known: Mapping[tuple[str, Layout], Conversion], products: Mapping[str, int]
) -> dict[str, Summed]:
    """Return the products of which all readers want the same sum: one all-reduce on one axis.

    What is recomputed is left, and what such an op reads: the copies of both belong to the block,
    which is given the product as it was before the sum.
    """
    recomputed = {name for names in plan.recomputed for name in names}
    layouts: dict[str, set[Layout]] = {}
    kept = {each.value for each in plan.conversions if "return" in each.readers}
    for op in plan.ops:
        kept |= {*op.reads} if op.name in recomputed else set()
        for name, layout in zip(op.reads, op.operands, strict=True):
            layouts.setdefault(name, set()).add(layout)
    summed: dict[str, Summed] = {}
    for op in plan.ops:
        if op.name not in products or op.name in recomputed or op.makes[0] in kept:
            continue
        targets = layouts.get(op.makes[0], set())
        conversion = known.get((op.makes[0], next(iter(targets)))) if len(targets) == 1 else None
        if conversion is None or conversion.again or len(conversion.steps) != 1:
            continue
        step = conversion.steps[0]
        if (step.source, step.target) == (Partial(), Invariant()):
            summed[op.name] = Summed(step.axis, conversion.target, conversion.steps)
    return summed
