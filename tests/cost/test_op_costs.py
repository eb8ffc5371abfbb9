"""Operators are priced by shape: what each rank really multiplies, reads and writes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoparallel.cost.hardware import Hardware, Link, Matmul, find_hardware
from autoparallel.cost.matmul import product_seconds
from autoparallel.cost.op_costs import OpCost, op_costs, update_seconds
from autoparallel.graph.graph import Node, Ref, Value
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.loop_splits import LoopSplit
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.rules.strategies import Strategy, strategies

PEAK, MEMORY, LAUNCH = 1000.0, 64.0, 0.5
PLAIN = Hardware(
    name="plain",
    source="made up",
    devices_per_node=8,
    device_memory_bytes=1,
    flops_per_second=((4, PEAK),),
    memory_bytes_per_second=MEMORY,
    memory_efficiency=1.0,
    launch_seconds=LAUNCH,
    spread=0.0,
    matmul=Matmul(),
    inside=Link.ring(10.0, 1.0, 1.0),
    network=Link.ring(10.0, 1.0, 1.0),
)


def call_of(target: str, shapes: list[tuple[int, ...]], made: tuple[int, ...]) -> OpCall:
    operands = tuple(Value(f"x{i}", shape, torch.float32, True) for i, shape in enumerate(shapes))
    result = Value("y", made, torch.float32, True)
    refs = tuple(Ref(operand.name) for operand in operands)
    return OpCall(Node("y", "call", target, (result,), refs, (), "", ""), operands)


def rule_of(call: OpCall) -> ShardingRule:
    author = find_rule(call.node.target)
    assert author is not None
    return author(call)


def split(call: OpCall, *loops: str | None, ranks: int = 2) -> tuple[Strategy, ...]:
    """A joint strategy: on each axis the loop that is split, or None."""
    rule, grads = rule_of(call), (True,) * len(call.operands)
    found = []
    for loop in loops:
        tiles = [LoopSplit(loop)] if loop else []
        options = strategies(rule, tiles, grads, (True,), ranks)
        found.append(
            next(each for each in options if each.tile == (LoopSplit(loop) if loop else None))
        )
    return tuple(found)


def priced(call: OpCall, *loops: str | None, hardware: Hardware = PLAIN, ranks: int = 2) -> OpCost:
    axes = tuple((ranks, hardware.inside) for _ in loops)
    (cost,) = op_costs(call, rule_of(call), [split(call, *loops, ranks=ranks)], axes, hardware)
    return cost


LINEAR = call_of("aten.linear.default", [(16, 8), (32, 8)], (16, 32))


def test_a_product_runs_three_times() -> None:
    """Forward and once per gradient; where memory is slower than arithmetic, it decides."""
    flops, moved = 2 * 16 * 8 * 32, 4 * (16 * 8 + 32 * 8 + 16 * 32)
    cost = priced(LINEAR, None)
    assert cost.flops == flops
    assert cost.product == pytest.approx(3 * flops / PEAK)
    assert cost.seconds == pytest.approx(3 * (moved / MEMORY + LAUNCH))
    assert cost.forward == pytest.approx(cost.seconds / 3)
    assert cost.whole_traffic == cost.traffic


def test_shares_of_axes_multiply() -> None:
    """Rows on one axis and columns on the other: a quarter of the work, and of the result."""
    whole, quarter = priced(LINEAR, None, None), priced(LINEAR, "_1", "n")
    assert quarter.flops == whole.flops / 4
    moved = 4 * (8 * 8 + 16 * 8 + 8 * 16)
    assert quarter.seconds == pytest.approx(3 * (moved / MEMORY + LAUNCH))
    assert quarter.whole_traffic == whole.traffic
    assert priced(LINEAR, "k", "k").flops == whole.flops / 4


def test_linear_ops_read_no_operands_again() -> None:
    """Backward, an addition passes its gradient on; a product of elements reads what it needs."""
    shapes, size = [(8, 8), (8, 8)], 4 * 8 * 8
    add = priced(call_of("aten.add.Tensor", shapes, (8, 8)), None)
    multiply = priced(call_of("aten.mul.Tensor", shapes, (8, 8)), None)
    assert add.forward == multiply.forward == pytest.approx(3 * size / MEMORY + LAUNCH)
    assert add.seconds - add.forward == pytest.approx(3 * size / MEMORY + LAUNCH)
    assert multiply.seconds - multiply.forward == pytest.approx(5 * size / MEMORY + LAUNCH)


def test_attention_counts_both_products() -> None:
    """Two products forward; backward four, and the scores once more."""
    b, h, s, t, d, e = 2, 3, 16, 24, 8, 5
    shapes = [(b, h, s, d), (b, h, t, d), (b, h, t, e)]
    call = call_of("aten.scaled_dot_product_attention.default", shapes, (b, h, s, e))
    cost = priced(call, None)
    flops = 2 * b * h * s * t * (d + e)
    assert cost.flops == pytest.approx(flops)
    assert cost.product == pytest.approx(3.5 * flops / PEAK)


@pytest.mark.parametrize(
    ("target", "shapes", "made", "flops"),
    [
        ("aten.addmm.default", [(32,), (16, 8), (8, 32)], (16, 32), 2 * 16 * 8 * 32),
        ("aten.bmm.default", [(5, 16, 8), (5, 8, 32)], (5, 16, 32), 2 * 5 * 16 * 8 * 32),
        ("aten.mv.default", [(16, 8), (8,)], (16,), 2 * 16 * 8),
    ],
)
def test_other_products_too(
    target: str, shapes: list[tuple[int, ...]], made: tuple[int, ...], flops: int
) -> None:
    """A bias is no factor."""
    assert priced(call_of(target, shapes, made), None).product == pytest.approx(3 * flops / PEAK)


def test_waves_are_whole() -> None:
    """Tiles of 2 x 2 on 3 processors: the fourth tile takes as long as three more."""
    matmul = Matmul(processors=3, tiles=((2, 2),), efficiency=0.5, fill=4.0)
    hardware = replace(PLAIN, matmul=matmul)

    def seconds(rows: int, columns: int, depth: int) -> float:
        one, *sizes = (np.array([float(x)]) for x in (1, rows, columns, depth))
        return float(product_seconds(one, *sizes, 4, hardware)[0])

    wave = 3 * 2 * 2 * 2 * (10 + 4) / (0.5 * PEAK)
    assert seconds(2, 2, 10) == pytest.approx(wave)
    assert seconds(2, 6, 10) == pytest.approx(wave)
    assert seconds(4, 4, 10) == pytest.approx(2 * wave)
    assert seconds(1, 1, 10) == pytest.approx(wave)


@pytest.mark.parametrize("name", ["dgx-2h", "dgx-a100", "dgx-h100"])
def test_narrow_parts_run_slower(name: str) -> None:
    """What makes strong scaling fall: the rate sinks as the columns or the sum are split."""
    hardware = find_hardware(name)
    rows = np.array([8192.0])
    for columns_at_all, depth_at_all in ((1, 0), (0, 1)):
        rates = []
        for ranks in (1, 4, 16, 64):
            columns = np.array([8192.0 / (ranks if columns_at_all else 1)])
            depth = np.array([2048.0 / (ranks if depth_at_all else 1)])
            seconds = product_seconds(np.ones(1), rows, columns, depth, 2, hardware)
            rates.append(float(2 * rows[0] * columns[0] * depth[0] / seconds[0]))
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < 0.8 * rates[0] < 0.95 * hardware.peak(2)


def test_an_update_moves_parameter_gradient_and_state() -> None:
    """Adam in one precision: seven times the parameter's bytes."""
    assert update_seconds(10.0, 10.0, 20.0, PLAIN) == pytest.approx(70.0 / MEMORY)


def test_functions_count_beside_moving() -> None:
    """A gelu on the busiest of 2 ranks: half a function per element forward, one backward."""
    call = call_of("aten.gelu.default", [(8, 64)], (8, 64))
    slow = replace(PLAIN, functions_per_second=0.25)
    cost, plain = priced(call, "d0", hardware=slow), priced(call, "d0")
    forward, backward = 256 * 0.5 / 0.25, 256 * 1.0 / 0.25
    assert plain.forward == 2 * 256 * 4 / MEMORY + LAUNCH
    assert cost.forward == plain.forward + forward
    assert cost.seconds == plain.seconds + forward + backward
    # What only moves numbers computes none.
    add = call_of("aten.add.Tensor", [(8, 64)] * 2, (8, 64))
    assert priced(add, "d0", hardware=slow) == priced(add, "d0")


def test_short_arrays_are_in_the_cache() -> None:
    """Each kernel is as fast as memory is for what it moves: 3 x 1 KiB here, of 2 ranks."""
    add = call_of("aten.add.Tensor", [(8, 64)] * 2, (8, 64))
    cached = replace(PLAIN, memory_by_size=((3072, 8 * MEMORY), (2**20, MEMORY)))
    cost = priced(add, "d0", hardware=cached)
    assert cost.forward == pytest.approx(3072 / (8 * MEMORY) + LAUNCH)
    assert cost.seconds == pytest.approx(2 * cost.forward)


@pytest.mark.parametrize("peak", [1000.0, 10.0], ids=["waits", "hidden"])
def test_what_is_passed_round_hides_behind_products(peak: float) -> None:
    """Two ranks pass keys and values of 128 bytes once, and back with as many of gradients.

    A part of 64 bytes takes 1 s to start, 1 s on the way and 6.4 s to send; backward 12.8 s. At the
    end, gradients go to whom they belong. Each rank has half of 192 bytes to put together, twice.
    """
    call = call_of("aten.scaled_dot_product_attention.default", [(1, 1, 8, 2)] * 3, (1, 1, 8, 2))
    rule = rule_of(call)
    options = strategies(rule, [LoopSplit("s")], (True,) * 3, (True,), 2)
    (ring,) = [each for each in options if each.kernel is not None]
    hardware = replace(PLAIN, flops_per_second=((4, peak),))
    joints = [(ring,), (replace(ring, kernel=None),)]
    cost, alone = op_costs(call, rule, joints, [(2, hardware.inside)], hardware)
    there, back = 8.4, 14.8
    forward, backward = alone.forward, alone.seconds - alone.forward
    waits = max(there - forward / 2, 0) + max(back - backward / 2, 0)
    assert bool(waits) == (peak == 1000.0)
    assert cost.communication == pytest.approx(192 / MEMORY + waits + back - there)


@pytest.mark.parametrize(
    ("target", "shapes", "made", "loop", "others"),
    [
        (
            "aten.scaled_dot_product_attention.default",
            [(2, 8, 16, 4), (2, 2, 16, 4), (2, 2, 16, 4)],
            (2, 8, 16, 4),
            "s",
            {"m": False, "g": True, "b0": True},
        ),
        (
            "aten.conv2d.default",
            [(2, 4, 16, 8), (6, 4, 3, 3)],
            (2, 6, 14, 6),
            "s0",
            {"o": False, "i": True, "b": True},
        ),
    ],
    ids=["keys", "edges"],
)
def test_what_an_axis_does_not_split_is_sent_whole(
    target: str,
    shapes: list[tuple[int, ...]],
    made: tuple[int, ...],
    loop: str,
    others: dict[str, bool],
) -> None:
    """Keys have no loop of the queries that share them, and images none of what is made of them:
    ranks that split these send as much.
    """
    call = call_of(target, shapes, made)
    if "dot_product" in target:
        node = replace(call.node, kwargs=(("enable_gqa", True),))
        call = OpCall(node, call.operands)
    rule = rule_of(call)

    def options(of: str) -> tuple[Strategy, ...]:
        grads = (True,) * len(call.operands)
        found = strategies(rule, [LoopSplit(of)], grads, (True,), 2)
        return tuple(each for each in found if each.tile is not None)

    (by_kernel,) = (each for each in options(loop) if each.kernel and each.kernel.loops)
    # A link on which only bytes take time, and products that take none.
    link = Link.ring(1.0, 0.0, 0.0)
    hardware = replace(
        PLAIN,
        flops_per_second=((4, 1e30),),
        memory_bytes_per_second=1e30,
        launch_seconds=0.0,
    )
    axes = [(2, link), (2, link)]

    def sent(*joint: Strategy) -> float:
        return op_costs(call, rule, [joint], axes[: len(joint)], hardware)[0].communication

    for other, halves in others.items():
        share = 0.5 if halves else 1.0
        assert sent(by_kernel, options(other)[0]) == pytest.approx(share * sent(by_kernel)), other


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 4, 8, 4), (2, 2, 8, 4), (2, 1, 8, 4)],
        [(2, 4, 8, 4), (2, 4, 8, 4), (2, 2, 8, 4)],
        [(2, 4, 8, 4), (2, 8, 4), (2, 8, 4)],
        [(4, 8, 4), (2, 8, 4), (2, 8, 4)],
    ],
    ids=str,
)
def test_loops_of_shared_keys_are_as_long_as_their_dims(shapes: list[tuple[int, ...]]) -> None:
    """Keys and values that different heads share, or that have fewer dims than queries."""
    call = call_of("aten.scaled_dot_product_attention.default", shapes, shapes[0])
    node = replace(call.node, kwargs=(("enable_gqa", True),))
    rule = rule_of(OpCall(node, call.operands))
    for shape, dims in zip(shapes, rule.operands, strict=True):
        for size, loops in zip(shape, dims, strict=True):
            assert not loops or size == np.prod([rule.sizes[loop] for loop in loops])
