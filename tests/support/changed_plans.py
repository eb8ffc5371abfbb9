"""Plans that are changed by hand: ZeRO's stages, copies and blocks that are made again."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.cost.hardware import find_hardware
from autoparallel.placement import Invariant, Layout, Shard
from autoparallel.plan import ParameterChoice, Plan
from autoparallel.planning.gathers_ahead import with_gathers_ahead, without_gathers_ahead

__all__ = ["blocks_again", "copies_again", "gathered_anew", "spread"]


def spread(plan: Plan, at_once: bool) -> Plan:
    """The plan with the optimizer's state, and with it the gradients, split wherever possible.

    at_once: gradients are cut as soon as they are complete (ZeRO-2), else at the end (ZeRO-1).
    """

    def split(choice: ParameterChoice) -> ParameterChoice:
        taken = {cut.dim for cut in choice.storage if isinstance(cut, Shard)}
        free = [dim for dim in range(len(choice.shape)) if dim not in taken]
        state: Layout = tuple(
            Shard(free[0]) if free and own == Invariant() else own for own in choice.storage
        )
        return replace(choice, state=state, gradient=state if at_once else choice.storage)

    return replace(plan, parameters=tuple(map(split, plan.parameters)))


def copies_again(plan: Plan) -> Plan:
    """The plan with every converted copy dropped and made again."""
    conversions = (replace(conversion, again=True) for conversion in plan.conversions)
    return gathered_anew(replace(plan, conversions=tuple(conversions)))


def gathered_anew(plan: Plan) -> Plan:
    """The plan with gathers that begin where they may, after its copies or blocks were changed."""
    return with_gathers_ahead(without_gathers_ahead(plan), find_hardware(plan.hardware))


def blocks_again(plan: Plan, length: int) -> Plan:
    """The plan with most of its ops run again, in blocks of `length`, two kept in between."""
    names = [op.name for op in plan.ops]
    starts = range(2, len(names) - length, length + 2)
    groups = tuple(tuple(names[at : at + length]) for at in starts)
    return gathered_anew(replace(plan, recomputed=groups, recompute=()))
