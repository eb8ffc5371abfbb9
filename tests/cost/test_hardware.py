"""Hardware is data: presets, files, and which link a mesh axis gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import build, inputs_for

import autoparallel
from autoparallel.cost.collective_times import collective_seconds
from autoparallel.cost.hardware import (
    Algorithm,
    Hardware,
    Link,
    find_hardware,
    presets,
    read_hardware,
    write_hardware,
)
from autoparallel.errors import PlanError
from autoparallel.placement import Collective


@pytest.mark.parametrize("name", presets())
def test_a_file_says_it_all(name: str, tmp_path: Path) -> None:
    """Written and read again it is the same, and a path stands wherever a name does."""
    hardware = find_hardware(name)
    assert hardware.source
    path = tmp_path / "own.json"
    write_hardware(hardware, path)
    assert read_hardware(path) == hardware
    assert find_hardware(str(path)) == hardware


def entry(rows: Any, *path: Any) -> Any:
    for key in path:
        rows = rows[key]
    return rows


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("color",), 1, "unknown entry 'color'"),
        (("inside", 0, "speed"), 1, "unknown entry 'speed'"),
        (("inside", 0, "algorithm"), "gossip", "one of ring, tree, switch, exchange"),
        (("inside", 0, "hop_seconds"), -1e-6, "hop_seconds is -1e-06"),
        (("inside", 0, "collectives"), ["gossip"], "a list of all_reduce, all_gather"),
        (("inside", 0, "neighbour_bytes_per_second"), [1e9], "neighbour_bytes_per_second is [1000"),
        (("inside", 0, "protocol"), ["ll"], "protocol is ['ll']"),
        (("network",), [], "a list of at least one"),
        (("memory_by_size",), [[4096, 1e9], [1024, 2e9]], "ascending"),
        (("memory_by_size",), 3, "pairs of bytes and rate"),
        (("memory_bytes_per_second",), 0, "give a positive number"),
        (("matmul", "efficiency"), "fast", "efficiency is 'fast'"),
        (("matmul", "tiles"), [3], "pairs of sizes"),
        (("flops_per_second",), {"2": float("nan")}, "flops_per_second"),
        (("matmul", "tiles"), [[0, 128]], "pairs of sizes"),
        (("flops_per_second",), 3, "rates by itemsize"),
        (("flops_per_second",), {"half": 1e12}, "by a number of bytes"),
        (("devices_per_node",), 2.5, "give a whole number"),
    ],
)
def test_mistakes_are_named(path: tuple[Any, ...], value: Any, words: str, tmp_path: Path) -> None:
    """The entry, where it stands, and what to write instead."""
    file = tmp_path / "own.json"
    write_hardware(find_hardware("dgx-a100"), file)
    rows = json.loads(file.read_text())
    entry(rows, *path[:-1])[path[-1]] = value
    file.write_text(json.dumps(rows))
    with pytest.raises(PlanError) as caught:
        read_hardware(file)
    assert words in str(caught.value)
    assert caught.value.fix
    assert str(file) in caught.value.where


def test_missing_entries_and_files_are_named(tmp_path: Path) -> None:
    """Also a list of regimes that cannot make every collective."""
    file = tmp_path / "own.json"
    with pytest.raises(PlanError, match="no hardware description"):
        find_hardware(str(file))
    file.write_text("{}")
    with pytest.raises(PlanError, match="missing entry"):
        read_hardware(file)
    write_hardware(find_hardware("cpu"), file)
    rows = json.loads(file.read_text())
    rows["inside"] = [row for row in rows["inside"] if row["algorithm"] != "exchange"]
    file.write_text(json.dumps(rows))
    with pytest.raises(PlanError, match="all_to_all"):
        read_hardware(file)
    with pytest.raises(PlanError, match="no hardware preset 'abacus'"):
        find_hardware("abacus")


def rate(link: Link, algorithm: Algorithm) -> float:
    return max(each.bytes_per_second for each in link.regimes if each.algorithm is algorithm)


def shares(hardware: Hardware) -> float:
    return rate(hardware.network, Algorithm.RING)


def test_inner_axes_stay_inside_a_node() -> None:
    """Ranks are numbered with the last axis innermost; nodes have 8 devices."""
    hardware = find_hardware("dgx-a100")
    (inside,) = hardware.links((8,))
    assert rate(inside, Algorithm.RING) == rate(hardware.inside, Algorithm.RING)
    outer, inner = hardware.links((8, 8))
    assert inner == inside
    assert rate(outer, Algorithm.RING) == shares(hardware)
    middle_outer, middle_inner = hardware.links((8, 4))
    assert (middle_inner,) == hardware.links((4,))
    assert rate(middle_outer, Algorithm.RING) == 2 * shares(hardware)
    (all_of_them,) = hardware.links((64,))
    assert rate(all_of_them, Algorithm.RING) == 8 * shares(hardware)
    first, second, third = hardware.links((2, 2, 4))
    assert (second,) == hardware.links((2,))
    assert (third,) == hardware.links((4,))
    assert rate(first, Algorithm.RING) == shares(hardware)


def test_an_exchange_leaves_the_node_by_the_own_share() -> None:
    """Of 63 other ranks 56 are elsewhere; 7 are reached inside."""
    hardware = find_hardware("dgx-a100")
    (link,) = hardware.links((64,))
    assert rate(link, Algorithm.EXCHANGE) == pytest.approx(shares(hardware) * 63 / 56)


def test_latency_grows_with_nodes() -> None:
    """A ring of 64 crosses 2 x 7 times between nodes, and hops 2 x 56 times inside."""
    hardware = find_hardware("dgx-a100")
    (link,) = hardware.links((64,))
    near = {each.protocol: each for each in hardware.inside.regimes if _is_ring(each)}
    far = {each.protocol: each for each in hardware.network.regimes if _is_ring(each)}
    for regime in filter(_is_ring, link.regimes):
        one, other = near[regime.protocol], far[regime.protocol]
        hops = 2 * 56 * one.hop_seconds + 2 * 7 * other.hop_seconds
        assert 2 * 63 * regime.hop_seconds == pytest.approx(hops)
    tiny = collective_seconds(Collective.ALL_REDUCE, 8.0, link, 64)
    (wider,) = hardware.links((512,))
    assert tiny < collective_seconds(Collective.ALL_REDUCE, 8.0, wider, 512)


def _is_ring(regime: Any) -> bool:
    return regime.algorithm is Algorithm.RING


def test_a_plan_goes_at_the_pace_of_the_slowest(tmp_path: Path) -> None:
    """What its ops take, but not what they send; once, however often it is asked for."""
    hardware = replace(find_hardware("dgx-a100"), name="even", spread=0.0)
    uneven = replace(hardware, name="uneven", spread=0.1)
    assert uneven.at_pace_of(64).at_pace_of(64) == uneven.at_pace_of(64)
    seconds = []
    for each in (hardware, uneven):
        path = tmp_path / f"{each.name}.json"
        write_hardware(each, path)
        model, inputs = build("mlp"), inputs_for("mlp")
        plan = autoparallel.make_plan(model, 2, example_inputs=inputs, hardware=str(path))
        product = next(op for op in plan.ops if op.whole_flops)
        seconds.append((product.seconds, sum(each.seconds for each in plan.conversions)))
    (even, sent), (slow, same) = seconds
    assert slow == pytest.approx(even * uneven.slowest(2))
    assert same == pytest.approx(sent)


def test_all_wait_for_the_slowest() -> None:
    """The expected largest of two normal draws is 0.564 deviations above the mean, of 512 3.04."""
    hardware = find_hardware("dgx-a100")
    assert hardware.slowest(1) == 1.0
    assert hardware.slowest(2) - 1 == pytest.approx(0.564 * hardware.spread, rel=0.06)
    assert hardware.slowest(512) - 1 == pytest.approx(3.04 * hardware.spread, rel=0.01)


def test_a_plan_keeps_what_its_hardware_is_called(tmp_path: Path) -> None:
    """A path is kept as a text. Hardware itself has no name to be asked for again: it is refused.

    A plan for it could be made, and not be written, or agreed on by the ranks.
    """
    path = tmp_path / "own.json"
    write_hardware(replace(find_hardware("cpu"), name="own"), path)
    model, inputs = build("mlp"), inputs_for("mlp")
    plan = autoparallel.make_plan(model, 2, example_inputs=inputs, hardware=path)
    assert autoparallel.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="write_hardware"):
        autoparallel.make_plan(model, 2, example_inputs=inputs, hardware=find_hardware("cpu"))
