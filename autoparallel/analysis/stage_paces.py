"""The paces of a pipeline's stages: a stage waits for the slowest of its own devices.

Equal devices take unequal times for equal work (see `Hardware.spread`). Ranks that share the ops of
a stage wait for each other all the time, so that the slowest one's pace is theirs. Other stages
wait for it only where theirs is the stage that holds up all micro-batches; while a pipeline fills
and drains, a micro-batch goes through every stage at that stage's own pace. So the slowest of all
devices counts in full where all stages take equally long, and less where one takes longest anyhow,
because it has the head and the loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import erfc, sqrt

from autoparallel.analysis.step_simulation import StagePasses
from autoparallel.analysis.training_step import COMPUTE
from autoparallel.cost.hardware import Hardware
from autoparallel.plan import Pipeline

__all__ = ["Busy", "at_own_paces", "busy_of"]

# Halvings of an interval of paces: an error of a billionth.
_HALVINGS = 32


@dataclass(frozen=True, slots=True)
class Busy:
    """The seconds of a stage's passes of one micro-batch in which its devices work, and do not wait
    for links: forward, and backward.
    """

    forward: float
    backward: float


def busy_of(passes: StagePasses) -> Busy:
    """Return the seconds in which the devices of a stage work.

    Example: `busy_of(passes_of_stage(stage.plan, hardware)).forward`
    """
    seconds = {True: 0.0, False: 0.0}
    for event in passes.events:
        if event.stream == COMPUTE:
            seconds[event.phase == "forward"] += event.seconds
    return Busy(seconds[True], seconds[False])


def at_own_paces(
    pipeline: Pipeline, busy: Sequence[Busy], hardware: Hardware, devices: int
) -> Pipeline:
    """Return a pipeline whose stages work at the paces of their own devices.

    pipeline: with the seconds of passes if all devices worked at the pace of the slowest of all.
    busy: of each stage, those in which they work. devices: that compute each stage.
    The rank of the axis of stages that works longest has the pace that makes it as slow as the
    slowest rank is expected to be; the others have that of the slowest of so many devices.

    Example: `at_own_paces(pipeline, busy, find_hardware("dgx-a100"), devices=8).seconds`
    """
    ranks = pipeline.ranks
    slowest, own = hardware.slowest(devices * ranks), hardware.slowest(devices)
    if slowest == own:
        return pipeline
    works, waits = [0.0] * ranks, [0.0] * ranks
    for stage, each in enumerate(busy):
        # As it would be on mean devices.
        rank, work = pipeline.rank_of(stage), each.forward + each.backward
        works[rank] += work / slowest
        waits[rank] += pipeline.seconds[stage] - work
    longest = max(range(ranks), key=lambda rank: waits[rank] + works[rank] * own)
    paces = [own] * ranks
    if works[longest]:
        held_up = _held_up(works, waits, hardware, devices)
        pace = (held_up - waits[longest]) / works[longest]
        paces[longest] = min(max(pace, own), slowest)
    quicker = [1 - paces[pipeline.rank_of(stage)] / slowest for stage in range(len(busy))]

    def paced(seconds: Sequence[float], work: Sequence[float]) -> tuple[float, ...]:
        """Return the seconds of passes of every stage at its pace. work: as of `busy`."""
        rows = zip(seconds, work, quicker, strict=True)
        return tuple(each - at_work * share for each, at_work, share in rows)

    return replace(
        pipeline,
        seconds=paced(pipeline.seconds, [each.forward + each.backward for each in busy]),
        forward_seconds=paced(pipeline.forward_seconds, [each.forward for each in busy]),
        # Gradients of weights are products, and nothing is waited for in them.
        weight_seconds=paced(pipeline.weight_seconds, pipeline.weight_seconds),
    )


def _held_up(
    works: Sequence[float], waits: Sequence[float], hardware: Hardware, devices: int
) -> float:
    """Return the seconds that the rank which takes longest is expected to take.

    works: seconds of each rank's work on a mean device. waits: those that it waits for links.
    Times are drawn from normal distributions, as of `Hardware.slowest`. For equal ranks this is the
    place that Blom (1958) gives the largest of all draws; for unequal ones it is where the chance
    that nobody takes longer is the same.
    """
    count = devices * len(works)
    chance = ((count - 0.375) / (count + 0.25)) ** count
    equal = Counter(zip(works, waits, strict=True))

    def nobody_takes_longer(seconds: float) -> float:
        """Return the chance that no rank takes longer."""
        product = 1.0
        for (work, wait), times in equal.items():
            if work:
                deviations = ((seconds - wait) / work - 1) / hardware.spread
                product *= (erfc(-deviations / sqrt(2)) / 2) ** (times * devices)
        return product

    most = hardware.slowest(count)
    low = max(wait + work for work, wait in equal)
    high = max(wait + work * most for work, wait in equal)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if nobody_takes_longer(middle) < chance:
            low = middle
        else:
            high = middle
    return high
