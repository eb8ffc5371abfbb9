"""Estimates that are given decide which meshes, micro-batches and stages are looked at."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.planning import pipeline_meshes
from autoparallel.planning.pipeline_meshes import best_order
from autoparallel.planning.stage_estimates import Estimate

LIMITED = Options(hardware="dgx-a100", memory_limit=100)


def estimate(seconds: float, way: str = "full") -> Estimate:
    """Return one that fits; without seconds, one that does not."""
    return Estimate(seconds, 90.0 if seconds < math.inf else 200.0, way)


def searched(monkeypatch: pytest.MonkeyPatch, table: dict[tuple[int, int], float]) -> Any:
    """Return the meshes of 128 ranks, eight to a stage's tensors: the numbers of stages and the
    seconds, the best first; and what was looked at.

    table: by the number of stages and that of more micro-batches, the seconds of a step.
    """
    looked: list[tuple[int, int]] = []

    def order(_: Any, pp: int, *rest: Any) -> Estimate:
        looked.append((pp, rest[-1]))
        return estimate(table.get((pp, rest[-1]), math.inf))

    monkeypatch.setattr(pipeline_meshes, "best_order", order)
    whole: Any = SimpleNamespace(blocks=16)
    found, _ = pipeline_meshes._of_width(whole, [2, 4, 8, 16], 8, 128, LIMITED, 1, 0)
    pairs = [(dict(mesh.axes)["pp"], estimate.seconds) for estimate, mesh in found]
    return pairs, looked


def test_smaller_micro_batches_are_looked_at_beside_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More stages hold more micro-batches, and may be quicker only where these are smaller."""
    seconds = {(2, 0): math.inf, (4, 0): 9.0, (8, 0): 10.0, (16, 0): 11.0}
    found, _ = searched(monkeypatch, {**seconds, (4, 1): 8.0, (8, 1): 7.0, (16, 1): 6.0})
    # Each mesh once, so that the next best can be planned in full as well; what does not fit last.
    assert found == [(16, 6.0), (8, 7.0), (4, 8.0), (2, math.inf)]
    # Where they are slower, no others are looked at.
    found, looked = searched(monkeypatch, {**seconds, (4, 1): 9.5, (8, 1): 7.0})
    assert found[0] == (4, 9.0)
    assert [place for place in looked if place[1]] == [(4, 1)]


def test_smaller_micro_batches_are_looked_at_with_fewer_ranks_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they were better with more ranks to a stage's tensors, also if all can be kept."""
    seconds = {(4, 0): 9.0, (4, 1): 8.0, (2, 0): 8.5, (2, 1): 7.0, (1, 0): 9.0, (1, 1): 7.5}

    def order(_: Any, pp: int, inside: Mesh, *rest: Any) -> Estimate | None:
        tensor = dict(inside.axes).get("tp", 1)
        return estimate(seconds[tensor, rest[-1]], "full" if tensor == 4 else "none")

    monkeypatch.setattr(pipeline_meshes, "best_order", order)
    monkeypatch.setattr(pipeline_meshes, "_widths", lambda *_: [4, 2, 1])
    whole: Any = SimpleNamespace(blocks=2)
    found = pipeline_meshes._with_stages(whole, 8, LIMITED)
    assert [each.seconds for each, _ in found] == [7.0, 7.5, 8.0]


@pytest.mark.parametrize(
    ("options", "way", "chosen"),
    [(LIMITED, "full", 4), (LIMITED, "none", 1), (Options(hardware="dgx-a100"), "full", 1)],
    ids=["limited", "all kept", "unlimited"],
)
def test_four_stages_are_looked_at_where_two_hold_too_much(
    options: Options, way: str, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several stages on a rank, two hold most micro-batches; without a limit that is nothing."""
    seconds = {1: 10.0, 2: 12.0, 4: 8.0}

    def chosen_of(*asked: Any) -> tuple[Estimate, int]:
        return estimate(seconds[asked[-1].stages_per_rank], way), 16

    monkeypatch.setattr(pipeline_meshes, "chosen_of", chosen_of)
    monkeypatch.setattr(pipeline_meshes, "microbatch_counts", lambda *_: [16])
    whole: Any = SimpleNamespace(blocks=16, whole=None)
    best = best_order(whole, 4, Mesh(tp=2), options)
    assert best is not None
    assert best.seconds == seconds[chosen]
