"""Conversions are priced forward and backward, by the closed forms of each algorithm."""

from __future__ import annotations

import pytest

from autoparallel.cost.collective_times import collective_seconds, movement_seconds
from autoparallel.cost.hardware import Algorithm, Hardware, Link, Matmul, Regime
from autoparallel.placement import Collective, gradient, movement, parse_placement

RANKS, NBYTES = 4, 1000.0
BANDWIDTH, HOP, FLOOR, MEMORY = 10.0, 2.0, 5.0, 50.0
LINK = Link.ring(BANDWIDTH, HOP, FLOOR)
HARDWARE = Hardware(
    name="test",
    source="made up",
    devices_per_node=RANKS,
    device_memory_bytes=1,
    flops_per_second=((4, 1.0),),
    memory_bytes_per_second=2 * MEMORY,
    memory_efficiency=0.5,
    launch_seconds=0.0,
    spread=0.0,
    matmul=Matmul(),
    inside=LINK,
    network=LINK,
)

# Written out from the definition of each collective, not from the code.
RING = FLOOR + (RANKS - 1) * (NBYTES / RANKS / BANDWIDTH + HOP)
TWO_RINGS = FLOOR + 2 * (RANKS - 1) * (NBYTES / RANKS / BANDWIDTH + HOP)
EXCHANGE = FLOOR + (RANKS - 1) * (NBYTES / RANKS**2 / BANDWIDTH + HOP)
WRITE = NBYTES / MEMORY

# source, target -> seconds forward, seconds backward (the gradient's way back).
TABLE = {
    ("I", "R"): (0.0, TWO_RINGS),
    ("I", "S(0)"): (0.0, RING),
    ("I", "P"): (WRITE, 0.0),
    ("R", "I"): (0.0, WRITE),
    ("R", "S(0)"): (0.0, WRITE),
    ("R", "P"): (WRITE, WRITE),
    ("S(0)", "I"): (RING, 0.0),
    ("S(0)", "R"): (RING, RING),
    ("S(0)", "S(1)"): (EXCHANGE, EXCHANGE),
    ("S(0)", "P"): (WRITE, 0.0),
    ("P", "I"): (TWO_RINGS, 0.0),
    ("P", "R"): (TWO_RINGS, TWO_RINGS),
    ("P", "S(0)"): (RING, RING),
}


def conversion_seconds(source: str, target: str, grad: bool, together: bool = False) -> float:
    """Of the value's move, and of its gradient's if it has one."""
    ends = parse_placement(source), parse_placement(target)
    moves = [movement(*ends)]
    if grad:
        moves.append(movement(gradient(ends[1]), gradient(ends[0])))
    return sum(movement_seconds(m, NBYTES, HARDWARE, LINK, RANKS, together) for m in moves)


@pytest.mark.parametrize(("source", "target"), TABLE)
def test_both_directions_are_paid(source: str, target: str) -> None:
    """Without a gradient only the way forward."""
    forward, backward = TABLE[source, target]
    assert conversion_seconds(source, target, True) == pytest.approx(forward + backward)
    assert conversion_seconds(source, target, False) == pytest.approx(forward)


def test_sums_made_together_pay_no_latency() -> None:
    """Only the bytes are counted, twice around the ring."""
    seconds = conversion_seconds("I", "R", True, together=True)
    assert seconds == pytest.approx(2 * (RANKS - 1) * NBYTES / RANKS / BANDWIDTH)


@pytest.mark.parametrize("kind", Collective)
def test_one_rank_pays_nothing(kind: Collective) -> None:
    """Impossible sizes are refused."""
    assert collective_seconds(kind, NBYTES, LINK, 1) == 0.0
    with pytest.raises(ValueError, match="bytes on"):
        collective_seconds(kind, -1.0, LINK, 2)


def test_the_fastest_regime_is_taken() -> None:
    """A tree for small sizes, the ring for large ones; an all-gather has no tree."""
    tree = Regime(Algorithm.TREE, BANDWIDTH / 2, HOP, FLOOR)
    link = Link((*LINK.regimes, tree))
    ranks = 16
    small, large = 1.0, 1e6
    up_and_down = FLOOR + 2 * 4 * HOP + 2 * small / (BANDWIDTH / 2)
    assert collective_seconds(Collective.ALL_REDUCE, small, link, ranks) == pytest.approx(
        up_and_down
    )
    for kind, size in ((Collective.ALL_REDUCE, large), (Collective.ALL_GATHER, small)):
        assert collective_seconds(kind, size, link, ranks) == pytest.approx(
            collective_seconds(kind, size, LINK, ranks)
        )


def test_a_switch_adds_what_all_send() -> None:
    """A rank sends its tensor once, and its own part of the sum."""
    link = Link((Regime(Algorithm.SWITCH, BANDWIDTH, HOP, FLOOR),))
    seconds = collective_seconds(Collective.ALL_REDUCE, NBYTES, link, RANKS)
    assert seconds == pytest.approx(FLOOR + 2 * HOP + (NBYTES + NBYTES / RANKS) / BANDWIDTH)
