"""Every move between placements, both ways, against parts cut from the whole."""

import threading
from collections import Counter
from itertools import product
from math import prod

import pytest
import torch
from broad_cases import one_of_each

from autoparallel.discovery.strategy_validation import difference, part_of
from autoparallel.placement import (
    Invariant,
    Partial,
    Replicate,
    Shard,
    gradient,
    local_size,
    movement,
    parse_placement,
)
from autoparallel.runtime.axis_parts import (
    cut_rows,
    join_parts,
    join_rows,
    keep_on_first,
    run_lengths,
    runs_in_common,
    take_part,
)
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.groups import thread_groups
from autoparallel.runtime.moves import move

SHAPE = (7, 12, 5)
SHARDS = (
    Shard(0),
    Shard(1),
    Shard(1, blocks=2),
    Shard(1, blocks=3),
    Shard(1, unit=3),
    Shard(1, blocks=2, unit=2),
    Shard(1, blocks=(3, 1, 2), unit=(3, 1, 2)),
    Shard(2),
)
# On four ranks: each part, or that of some blocks, is held by two of them.
SHARED = (Shard(1, repeat=2), Shard(1, blocks=(1, 2), repeat=(4, 2)), Shard(1, blocks=3, repeat=2))
PLACEMENTS = (Invariant(), Replicate(), *SHARDS, Partial())


def is_a_move(source, target):
    """A pending sum is kept as it is, and nothing but a pending sum becomes another one."""
    return source == target or (type(source), type(target)) != (Partial, Partial)


PAIRS = [pair for pair in product(PLACEMENTS, PLACEMENTS) if is_a_move(*pair)]
HELD_BY_SEVERAL = (*SHARED, *map(gradient, SHARED))
SHARED_PAIRS = [
    pair
    for pair in product((*PLACEMENTS, *HELD_BY_SEVERAL), repeat=2)
    if set(pair) & set(HELD_BY_SEVERAL)
]


def on_every_rank(world_size, function):
    """function(group) on threads; returns what each rank made and the collectives of rank 0."""
    made, errors = [None] * world_size, []

    def run(group):
        try:
            made[group.rank] = function(group)
        except BaseException as error:
            errors.append(error)
            group.abort()

    groups = thread_groups(world_size)
    threads = [threading.Thread(target=run, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return made, groups[0].counts


def is_kept(case):
    """Each pair on two ranks and four, or on three."""
    *pair, world_size = case
    return tuple(pair) in SHARED_PAIRS or (PAIRS.index(tuple(pair)) + world_size) % 2 == 0


@pytest.mark.parametrize(
    ("source", "target", "world_size"),
    one_of_each(
        [
            *((*pair, world_size) for world_size in (2, 3, 4) for pair in PAIRS),
            *((*pair, 4) for pair in SHARED_PAIRS),
        ],
        is_kept,
    ),
    ids=str,
)
def test_convert_moves_values_and_gradients(source, target, world_size):
    """The table of the placements: what each rank gets, what goes back, and what crosses."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    seed = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    parts = part_of(whole, source, world_size, generator)
    seeds = part_of(seed, gradient(target), world_size, generator)
    size = SHAPE[source.dim] if isinstance(source, Shard) else 0

    def run(group):
        mine = parts[group.rank].clone().requires_grad_()
        made = convert(mine, group, source, target, size)
        made.backward(seeds[group.rank])
        return made, mine.grad

    made, counts = on_every_rank(world_size, run)
    assert difference([value for value, _ in made], whole, target) == ""
    assert difference([grad for _, grad in made], seed, gradient(source)) == ""
    steps = (movement(source, target), movement(gradient(target), gradient(source)))
    assert counts == Counter(step.value for step in steps if step.collective)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_move_keeps_the_kind(source, target, kind):
    """Tensors without a gradient move alike; truth values have no pending sum."""
    if kind == torch.bool and (source == Partial() or target == Partial()):
        return
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-9, 9, SHAPE, generator=generator)
    whole = whole > 0 if kind == torch.bool else whole
    parts = part_of(whole, source, 3, generator)
    size = SHAPE[source.dim] if isinstance(source, Shard) else 0
    made, _ = on_every_rank(3, lambda group: move(parts[group.rank], group, source, target, size))
    assert difference(made, whole, target) == ""


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_what_was_moved_lies_alike_on_all_ranks(source, target, world_size):
    """Whether an op keeps a tensor or a copy of it depends on how it lies: in order, and in memory
    that is as large, on every rank, or the ranks would not make the same copies again."""
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    parts = part_of(whole, source, world_size, torch.Generator().manual_seed(1))
    size = SHAPE[source.dim] if isinstance(source, Shard) else 0

    def run(group):
        return move(parts[group.rank].clone(), group, source, target, size)

    for tensor in on_every_rank(world_size, run)[0]:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_parts_join(shard, world_size):
    whole = torch.arange(7 * 12 * 5).reshape(SHAPE)
    assert parse_placement(str(shard)) == shard
    parts = [take_part(whole, shard, world_size, rank) for rank in range(world_size)]
    sizes = [local_size(SHAPE[shard.dim], shard, world_size, r) for r in range(world_size)]
    assert [part.size(shard.dim) for part in parts] == sizes
    assert sizes == sorted(sizes, reverse=True)
    assert torch.equal(join_parts(parts, shard), whole)


@pytest.mark.parametrize("shard", HELD_BY_SEVERAL, ids=str)
def test_parts_of_several_ranks_join(shard):
    """Each is there once; of pending ones the sum is."""
    assert parse_placement(str(shard)) == shard
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    parts = part_of(whole, shard, 4, generator)
    assert torch.allclose(join_parts(parts, shard), whole)
    assert [part.size(1) for part in parts] == [local_size(12, shard, 4, r) for r in range(4)]


@pytest.mark.parametrize(
    ("shape", "shard", "is_view"),
    [
        ((6, 5), Shard(0), True),
        ((1, 6, 5), Shard(1), True),
        ((2, 6, 5), Shard(1), False),
        ((1, 7, 5), Shard(1), False),
        ((1, 6, 5), Shard(1, blocks=3), False),
    ],
    ids=str,
)
def test_parts_that_lie_end_to_end_are_not_copied(shape, shard, is_view):
    """Behind dims of size 1 the rows of a gather are the whole, and a scatter sends the whole."""
    group = thread_groups(2)[0]
    whole = torch.arange(prod(shape), dtype=torch.float64).reshape(shape)
    rows = cut_rows(whole, shard, group)
    assert (rows.data_ptr() == whole.data_ptr()) == is_view
    rows = rows.clone()
    joined = join_rows(rows, shard, run_lengths(shape[shard.dim], shard, group))
    assert torch.equal(joined, whole)
    assert (joined.data_ptr() == rows.data_ptr()) == is_view


def test_images_are_gathered_in_whatever_order_they_lie_in_memory():
    """Torch stacks those whose channels lie last so that theirs do, too."""
    whole = torch.arange(96.0).view(1, 8, 3, 4)

    def gather(group):
        part = take_part(whole, Shard(1), 2, group.rank)
        part = part.contiguous(memory_format=torch.channels_last)
        return move(part, group, Shard(1), Invariant(), 8)

    made, _ = on_every_rank(2, gather)
    assert all(torch.equal(found, whole) for found in made)


def test_what_was_gathered_may_be_written_to():
    """The caller of a split module may write to what it returns, as to any tensor."""

    def run(group):
        part = torch.ones(2, 3, requires_grad=True)
        convert(part, group, Shard(0), Invariant(), 4).mul_(2).sum().backward()
        return part.grad

    gradients, _ = on_every_rank(2, run)
    assert all(torch.equal(gradient, torch.full((2, 3), 2.0)) for gradient in gradients)


@pytest.mark.parametrize("shard", [SHARED[1], Shard(1, blocks=(3, 1, 2), unit=(3, 1, 2))], ids=str)
def test_a_compiler_sees_through_parts(shard):
    """In one graph, without a warning: an emitted program is compiled with what it calls."""

    def cut_and_joined(whole):
        parts = [take_part(whole, shard, 4, rank) for rank in range(4)]
        kept = keep_on_first(parts[1], shard, 12, 4, 1).sum()
        common = runs_in_common(12, shard, Shard(1), 4, 0, 1)
        return join_parts(parts, shard) + kept + len(common)

    torch.compiler.reset()  # or the numbers of the placement before would be taken for variables
    whole = torch.arange(7.0 * 12 * 5).reshape(SHAPE)
    compiled = torch.compile(cut_and_joined, fullgraph=True, backend="eager")
    assert torch.equal(compiled(whole), cut_and_joined(whole))
