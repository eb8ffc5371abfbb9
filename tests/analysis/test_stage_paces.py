"""The paces of stages against steps whose devices draw their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoparallel.analysis.pipeline_step import passes_of, step_of
from autoparallel.analysis.stage_paces import Busy, at_own_paces
from autoparallel.cost.hardware import find_hardware
from autoparallel.plan import Pipeline

HARDWARE = replace(find_hardware("dgx-a100"), spread=0.03)
DEVICES, RANKS, BATCHES = 8, 16, 32
LINK = HARDWARE.inside


def pipeline(works: list[float], waits: float, each: int = 1) -> tuple[Pipeline, list[Busy]]:
    """A pipeline that sends nothing, and the work of its stages if all devices are the slowest.

    works: of each stage, forward and backward, on a mean device. waits: for links, in each pass.
    """
    slowest = HARDWARE.slowest(DEVICES * RANKS)
    busy = [Busy(work / 3 * slowest, work * 2 / 3 * slowest) for work in works]
    told = Pipeline(
        len(works),
        RANKS,
        BATCHES,
        "1f1b",
        tuple(map(str, range(len(works)))),
        tuple(one.forward + one.backward + 2 * waits for one in busy),
        (0,) * len(works),
        0.0,
        tuple(one.forward + waits for one in busy),
        (0.0,) * len(works),
        (0.0,) * len(works),
        (0,) * len(works),
    )
    return told, busy


def step(told: Pipeline) -> float:
    return step_of(told, passes_of(told, LINK))[0]


def drawn(works: list[float], waits: float) -> float:
    """The mean step of many clusters: each stage goes at the pace of its slowest device."""
    numbers = np.random.default_rng(3)
    steps = []
    for _ in range(40):
        paces = numbers.normal(1.0, HARDWARE.spread, (RANKS, DEVICES)).max(axis=1)
        paced = [work * paces[stage % RANKS] for stage, work in enumerate(works)]
        told, _ = pipeline(works, waits)
        told = replace(
            told,
            seconds=tuple(work + 2 * waits for work in paced),
            forward_seconds=tuple(work / 3 + waits for work in paced),
        )
        steps.append(step(told))
    return float(np.mean(steps))


@pytest.mark.parametrize(("head", "waits"), [(0.0, 0.0), (0.1, 0.2), (0.4, 0.0)])
def test_steps_are_those_of_clusters_that_draw_their_paces(head: float, waits: float) -> None:
    """Of equal stages, and where the last one has a head besides; with links to wait for."""
    works = [1.0] * (RANKS - 1) + [1.0 + head]
    told, busy = pipeline(works, waits)
    assert step(at_own_paces(told, busy, HARDWARE, DEVICES)) == pytest.approx(
        drawn(works, waits), rel=0.007
    )


def test_heavy_stages_are_held_up_by_their_own_devices() -> None:
    """The slowest device of all counts in full where all stages are equal, and not where one stage
    takes much longer; equal devices change nothing.
    """
    slowest, own = HARDWARE.slowest(DEVICES * RANKS), HARDWARE.slowest(DEVICES)
    equal = at_own_paces(*pipeline([1.0] * RANKS, 0.0), HARDWARE, DEVICES)
    assert max(equal.seconds) == pytest.approx(slowest, rel=1e-6)
    assert min(equal.seconds) == pytest.approx(own)
    heavy = at_own_paces(*pipeline([1.0] * (RANKS - 1) + [1.5], 0.0), HARDWARE, DEVICES)
    assert max(heavy.seconds) == pytest.approx(1.5 * own, rel=2e-3)
    told, busy = pipeline([1.0] * RANKS, 0.0)
    assert at_own_paces(told, busy, replace(HARDWARE, spread=0.0), DEVICES) == told


def test_stages_of_a_rank_have_its_pace() -> None:
    """Two stages on each rank go at one pace, and weights' gradients go with the backward pass."""
    told, busy = pipeline([1.0] * (2 * RANKS - 1) + [1.2], 0.0)
    told = replace(told, weight_seconds=tuple(one.backward / 2 for one in busy))
    paced = at_own_paces(told, busy, HARDWARE, DEVICES)
    shares = [one / other for one, other in zip(paced.seconds, told.seconds, strict=True)]
    for rank in range(RANKS):
        assert shares[rank] == pytest.approx(shares[rank + RANKS])
    assert shares[RANKS - 1] > shares[0]
    for stage, share in enumerate(shares):
        assert paced.weight_seconds[stage] == pytest.approx(told.weight_seconds[stage] * share)
