"""The validation of strategies: split, run and join must equal unsplit, forward and backward.

It runs the op through the emitter, one thread per rank, so that what it validates is what a plan
runs. Nothing here depends on how a strategy was found: derived from a rule, or guessed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch

from autoparallel.discovery.example_calls import (
    Example,
    gradients_of,
    program_of,
    random_numbers,
    second_gradients_of,
    storage_of,
)
from autoparallel.graph.graph import Sym
from autoparallel.placement import Partial, Placement, Shard, divides_in_runs, gradient
from autoparallel.rules.loop_splits import LoopSplit, is_possible, own_split, tiles_of_piece
from autoparallel.rules.rule import ShardingRule
from autoparallel.rules.strategies import Strategy, strategies
from autoparallel.runtime.axis_parts import join_parts, keep_on_first, put_part, take_part
from autoparallel.runtime.groups import LocalGroup, thread_groups

__all__ = [
    "derived",
    "difference",
    "part_of",
    "tiles_of",
    "uneven_parts",
    "why_wrong",
]

# Sums in another order differ by some units in the last place; wrong values by far more.
_TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-4}
# A rank that waits for one that failed would wait for ever.
_PATIENCE_SECONDS = 60.0


def tiles_of(rule: ShardingRule, world_size: int) -> Iterator[LoopSplit]:
    """Yield every way to split every loop: into all blocks of runs
    of all units that its size allows.
    """
    for loop in rule.loops:
        size = rule.sizes[loop]
        yield own_split(rule, loop)
        if isinstance(size, Sym):
            continue
        yield from _of_pieces(rule, loop, world_size)
        yield from _shared(rule, loop, world_size)
        # Every block must have at least one run for each rank.
        for blocks in range(1, size // world_size + 1):
            for unit in range(1, size // (blocks * world_size) + 1):
                tile = LoopSplit(loop, blocks, unit)
                if (blocks, unit) != (1, 1) and is_possible(rule, tile, world_size):
                    yield tile


def _shared(rule: ShardingRule, loop: str, world_size: int) -> Iterator[LoopSplit]:
    """Yield the splits of a loop of which two ranks each do the same part, or deal out another loop
    inside of it.
    """
    inside = {
        inner: None
        for dims in (*rule.operands, *rule.results)
        for names in dims
        for outer, inner in pairwise(names)
        if outer == loop
    }
    for tile in (LoopSplit(loop, repeat=2), *(LoopSplit(loop, into=inner) for inner in inside)):
        if world_size > 2 and is_possible(rule, tile, world_size):
            yield tile


def _of_pieces(rule: ShardingRule, loop: str, world_size: int) -> Iterator[LoopSplit]:
    """Yield the splits of a loop's pieces in which one of them is cut in blocks, or in runs."""
    for piece, (whole, start, stop) in rule.pieces.items():
        for blocks, unit in ((2, 1), (3, 1), (1, 2), ((2, 1), 1)) if whole == loop else ():
            shard = Shard(0, blocks, unit)
            if divides_in_runs(stop - start, blocks, unit):
                for tile in tiles_of_piece(rule, piece, shard, {}):
                    if is_possible(rule, tile, world_size):
                        yield tile


def derived(example: Example, rule: ShardingRule, world_size: int) -> tuple[Strategy, ...]:
    """Return every strategy that `rule` allows for this call on `world_size` ranks, each once."""
    operands = tuple(operand.requires_grad for operand in example.call.operands)
    results = tuple(result.requires_grad for result in example.call.results)
    choices = strategies(rule, tiles_of(rule, world_size), operands, results, world_size)
    return tuple({(str(choice), choice.kernel): choice for choice in reversed(choices)}.values())[
        ::-1
    ]


def uneven_parts(
    whole: torch.Tensor, world_size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return tensors of both signs and of different sizes that add up to `whole`:
    one pending sum per rank.

    Equal parts would hide a bias that is counted on every rank. Raises TypeError for truth values,
    which have no sum.
    """
    if whole.dtype == torch.bool:
        raise TypeError("truth values have no pending sum")
    parts = []
    for rank in range(1, world_size):
        # Larger on later ranks, so that no two summands are interchangeable.
        numbers = whole.dtype.is_floating_point or whole.dtype.is_complex
        noise = random_numbers(
            whole.shape, generator, whole.dtype if numbers else torch.float64
        ) * (rank + 1)
        if not numbers:
            noise = (noise * 4).round()
        parts.append(noise.to(whole.dtype))
    rest = whole.clone()
    for part in parts:
        rest = rest - part
    return [rest, *parts]


def part_of(
    whole: torch.Tensor, placement: Placement, world_size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return the part of `whole` that each rank holds under a placement, in order of ranks."""
    if isinstance(placement, Shard):
        parts = [take_part(whole, placement, world_size, rank) for rank in range(world_size)]
        return _uneven_shares(whole, placement, parts, generator) if placement.pending else parts
    if isinstance(placement, Partial):
        return uneven_parts(whole, world_size, generator)
    return [whole] * world_size


def _uneven_shares(
    whole: torch.Tensor, shard: Shard, parts: list[torch.Tensor], generator: torch.Generator
) -> list[torch.Tensor]:
    """Return the ranks' summands of the parts that several of them hold, none like another.

    shard: one that is pending. parts: what each rank holds, as if it were not.
    """
    count, size = len(parts), whole.size(shard.dim)
    noises, total = [], torch.zeros_like(whole)
    for rank, part in enumerate(parts):
        noise = random_numbers(part.shape, generator, whole.dtype) * (rank + 1)
        # The first rank of each group has what is left.
        noise = noise - keep_on_first(noise, shard, size, count, rank)
        put_part(total, noise, shard, count, rank)
        noises.append(noise)
    rest = whole - total
    return [
        keep_on_first(take_part(rest, shard, count, rank), shard, size, count, rank) + noise
        for rank, noise in enumerate(noises)
    ]


def why_wrong(
    example: Example,
    strategy: Strategy,
    world_size: int,
    rule: ShardingRule | None = None,
    tolerance: float | None = None,
    twice: bool = False,
) -> str:
    """Return the fault of running the call by `strategy` on `world_size` ranks; "" if it has none.

    Every rank gets its part of the operands and of the incoming gradients; the parts that it
    returns must be those of the unsplit results and gradients. rule: the op's, where it is not to
    be the registered one. tolerance: relative and absolute; by default 1e-10 for float64, 1e-4
    where there are operands of float32. twice: whether the derivatives of the gradients are
    compared too, for an op that torch can differentiate twice.
    """
    if tolerance is None:
        kinds = [tensor.dtype for tensor in (*example.tensors.values(), *example.results)]
        tolerance = max((_TOLERANCE.get(kind, 0.0) for kind in kinds), default=0.0)
    # The same parts in every process, so that a fault can be seen again.
    generator = torch.Generator().manual_seed(world_size)
    storage = storage_of(example.node, strategy)
    try:
        leaves = {
            name: part_of(tensor, storage[name], world_size, generator)
            for name, tensor in example.tensors.items()
        }
        seeds: list[list[Any]] = [
            [None] * world_size
            if seed is None
            else part_of(seed, gradient(placement), world_size, generator)
            for seed, placement in zip(example.seeds, strategy.results, strict=True)
        ]
    except TypeError as error:
        return str(error)
    directions: Mapping[str, torch.Tensor] = {}
    second: Mapping[str, torch.Tensor | None] | None = None
    if twice:
        directions, second = example.second_derivatives
    sent = {
        name: part_of(direction, storage[name], world_size, generator)
        for name, direction in directions.items()
        if second is not None
    }
    returned: list[Any] = [None] * world_size
    seconds: list[dict[str, torch.Tensor | None] | None] = [None] * world_size
    errors: dict[int, BaseException] = {}

    def run(group: LocalGroup) -> None:
        """Run one rank, and note its results and gradients, or its error."""
        try:
            mine = {
                name: parts[group.rank]
                # A part that a collective would deliver is contiguous, and a leaf of its own.
                .clone(memory_format=torch.contiguous_format)
                .requires_grad_(name in example.gradients)
                for name, parts in leaves.items()
            }
            program = program_of(example.graph, example.node, strategy, group, rule)
            results = program(mine, example.extents)
            local_seeds = (parts[group.rank] for parts in seeds)
            incoming = tuple(None if part is None else part.clone() for part in local_seeds)
            returned[group.rank] = (results, gradients_of(mine, results, incoming))
            if second is not None:
                again = program(mine, example.extents)
                along = {name: parts[group.rank].contiguous() for name, parts in sent.items()}
                seconds[group.rank] = second_gradients_of(mine, again, incoming, along)
        except BaseException as error:
            errors[group.rank] = error
            group.abort()

    groups = thread_groups(world_size)
    threads = [threading.Thread(target=run, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE_SECONDS)
        if thread.is_alive():
            groups[0].abort()
    if errors:
        root_causes = {
            r: e for r, e in errors.items() if not isinstance(e, threading.BrokenBarrierError)
        }
        # Ranks that only waited at a broken barrier are no cause.
        rank = min(root_causes or errors)
        return f"rank {rank} failed: {type(errors[rank]).__name__}: {str(errors[rank])[:300]}"
    for index, (whole, placement) in enumerate(zip(example.results, strategy.results, strict=True)):
        parts_of_result = [results[index] for results, _ in returned]
        slack = example.slack.get(example.node.results[index].name, 0.0)
        wrong = difference(parts_of_result, whole, placement, tolerance, slack)
        if wrong:
            return f"result {index}: {wrong}"
    for name, whole in example.gradients.items():
        absent = [rank for rank, (_, gradients) in enumerate(returned) if gradients[name] is None]
        # On some ranks a gradient may be zero, but autograd must have reached the operand.
        if absent and name not in example.unused:
            return f"gradient of operand {name}: none comes on rank {absent[0]}"
        wrong = difference(
            [
                torch.zeros_like(leaves[name][rank]) if gradients[name] is None else gradients[name]
                for rank, (_, gradients) in enumerate(returned)
            ],
            whole,
            gradient(storage[name]),
            tolerance,
            example.slack.get(name, 0.0),
        )
        if wrong:
            return f"gradient of operand {name}: {wrong}"
    for name, expected in (second or {}).items():
        # Of an operand, or of a gradient that came in, whose own gradient lies as the result does.
        like: Any
        unsplit: Any
        if name in storage:
            like, kind = leaves[name], gradient(storage[name])
            unsplit = example.tensors[name]
        else:
            number = int(name.split()[1])
            like, kind = seeds[number], strategy.results[number]
            unsplit = example.seeds[number]
        actual = [None if each is None else each[name] for each in seconds]
        absent = [rank for rank, part in enumerate(actual) if part is None]
        if expected is None and len(absent) == world_size:
            continue
        # A rank that reaches no operand would leave out the collectives that other ranks enter.
        if absent and len(absent) < world_size:
            return f"second derivative by {name}: none comes on rank {absent[0]}"
        # Zeros count as none: unsplit, nothing may depend on the tensor.
        parts: list[torch.Tensor] = [
            torch.zeros_like(here) if part is None else part
            for part, here in zip(actual, like, strict=True)
        ]
        assert unsplit is not None  # only a gradient that came in has one of its own
        nothing = torch.zeros_like(unsplit)
        wrong = difference(parts, nothing if expected is None else expected, kind, tolerance)
        if wrong:
            return f"second derivative by {name}: {wrong}"
    return ""


def difference(
    parts: list[torch.Tensor],
    whole: torch.Tensor,
    placement: Placement,
    tolerance: float = _TOLERANCE[torch.float64],
    slack: float = 0.0,
) -> str:
    """Return where the ranks' parts are not `whole` under `placement`, as text; "" if they are.

    tolerance: relative and absolute. slack: an absolute error that is allowed besides.
    """
    parts = [part.detach() for part in parts]
    world_size = len(parts)
    if any(part.dtype != whole.dtype for part in parts):
        return f"dtype {[str(part.dtype) for part in parts]}, not {whole.dtype}"
    if isinstance(placement, Partial):
        if any(part.shape != whole.shape for part in parts):
            return f"shapes {[tuple(part.shape) for part in parts]}, not {tuple(whole.shape)}"
        # sum() of integers is int64, whatever they were.
        total = torch.stack(parts).sum(0).to(whole.dtype)
        return _apart("the sum over ranks", total, whole, tolerance, slack)
    if isinstance(placement, Shard) and placement.pending:
        total = join_parts(parts, placement)
        return _apart("the sum over ranks", total, whole, tolerance, slack)
    for rank, part in enumerate(parts):
        expected = whole
        if isinstance(placement, Shard):
            expected = take_part(whole, placement, world_size, rank)
        wrong = _apart(f"rank {rank}", part, expected, tolerance, slack)
        if wrong:
            return wrong
    return ""


def _apart(
    what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float, slack: float
) -> str:
    """Return the difference of two tensors as text, "" where it is within the tolerance."""
    if actual.shape != expected.shape:
        return f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.is_floating_point() or actual.is_complex():
        if torch.allclose(actual, expected, rtol=tolerance, atol=tolerance + slack):
            return ""
        return f"{what} is off by {(actual - expected).abs().max().item():.3g}"
    return "" if torch.equal(actual, expected) else f"{what} differs"
