"""Random moves between placements, and random views, each by itself."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from calls import x
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoparallel.discovery.example_calls import make_example
from autoparallel.discovery.strategy_validation import (
    derived,
    difference,
    part_of,
    tiles_of,
    why_wrong,
)
from autoparallel.placement import Invariant, Partial, Placement, Replicate, Shard, gradient
from autoparallel.rules.loop_splits import UnsplittableError, place, tile_of
from autoparallel.rules.ops.shape import reshape
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.groups import LocalGroup, thread_groups

FEW = settings(deadline=None, max_examples=60, derandomize=True)
MANY = settings(deadline=None, max_examples=int(os.environ.get("FUZZ_PROGRAMS", "2000")))
sizes = st.sampled_from((2, 3, 4, 5, 6, 7, 8, 12, 1, 18))


@st.composite
def placements(draw: Any, shape: tuple[int, ...]) -> Placement:
    """Any placement of a tensor of that shape: blocks of runs of every kind."""
    kind = draw(st.integers(0, 5))
    if kind < 3:
        return (Invariant(), Replicate(), Partial())[kind]
    dim = draw(st.integers(0, len(shape) - 1))
    blocks = draw(st.sampled_from([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]))
    run = shape[dim] // blocks
    unit = draw(st.sampled_from([n for n in range(1, run + 1) if run % n == 0]))
    return Shard(dim, blocks, unit)


@st.composite
def moves(draw: Any) -> tuple[tuple[int, ...], Placement, Placement, int]:
    shape = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    return shape, draw(placements(shape)), draw(placements(shape)), draw(st.integers(2, 6))


def check_move(move: tuple[tuple[int, ...], Placement, Placement, int]) -> None:
    """The parts before and after are of one tensor; so are those of its gradient."""
    shape, source, target, world_size = move
    whole, incoming = x(*shape).detach(), x(*shape).detach()
    generator = torch.Generator().manual_seed(0)
    before = part_of(whole, source, world_size, generator)
    seeds = part_of(incoming, gradient(target), world_size, generator)
    size = shape[source.dim] if isinstance(source, Shard) else 0
    after: list[Any] = [None] * world_size
    back: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(group: LocalGroup) -> None:
        try:
            own = before[group.rank].clone().requires_grad_()
            made = convert(own, group, source, target, size)
            made.backward(seeds[group.rank])
            after[group.rank], back[group.rank] = made, own.grad
        except BaseException as error:
            errors.append(error)
            group.abort()

    threads = [threading.Thread(target=run, args=(group,)) for group in thread_groups(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert difference(after, whole, target) == ""
    assert difference(back, incoming, gradient(source)) == ""


@FEW
@given(moves())
def test_moves(move: tuple[tuple[int, ...], Placement, Placement, int]) -> None:
    check_move(move)


@pytest.mark.fuzz
@MANY
@given(moves())
def test_many_moves(move: tuple[tuple[int, ...], Placement, Placement, int]) -> None:
    check_move(move)


def factorized(draw: Any, count: int) -> tuple[int, ...]:
    """Sizes whose product is `count`, ones among them."""
    made: list[int] = []
    while count > 1:
        made.append(draw(st.sampled_from([n for n in range(2, count + 1) if count % n == 0])))
        count //= made[-1]
        if draw(st.integers(0, 5)) == 5:
            made.append(1)
    return tuple(made) or (1,)


@st.composite
def views(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shapes before and after, and the number of ranks."""
    count = draw(st.sampled_from((6, 12, 24, 36, 60, 90)))
    return factorized(draw, count), factorized(draw, count), draw(st.integers(2, 4))


def check_view(view: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
    """Every strategy of the view is sound, and what a neighbour asks for is what it gets."""
    before, after, world_size = view
    assume(before != after)
    example = make_example("aten.reshape.default", (x(*before), after))
    rule = reshape(example.call)
    for strategy in derived(example, rule, world_size)[:12]:
        assert why_wrong(example, strategy, world_size) == "", str(strategy)
    for tile in tiles_of(rule, world_size):
        for dims in (*rule.operands, *rule.results):
            try:
                shard = place(rule, dims, tile, world_size)
            except UnsplittableError:
                continue
            if shard is not None:
                asked = tile_of(rule, dims, shard, world_size)
                assert asked is not None, f"{tile}: no tile for {shard} of {dims}"
                assert place(rule, dims, asked, world_size) == shard, f"{tile}: {shard} -> {asked}"


@FEW
@given(views())
def test_views(view: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
    check_view(view)


@pytest.mark.fuzz
@MANY
@given(views())
def test_many_views(view: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
    check_view(view)
