"""Meshes with stages, of which the one with the shortest estimated step is looked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import PIPELINE, Mesh
from autoparallel.options import Options
from autoparallel.planning.pipeline_choices import (
    chosen_of,
    in_parts,
    is_even,
    microbatch_counts,
    middle_of,
    refuse_pipeline,
)
from autoparallel.planning.pipeline_estimates import Estimator
from autoparallel.planning.schedule_figures import shares_of
from autoparallel.planning.stage_estimates import Estimate, is_better
from planners.effort import current

__all__ = ["best_mesh", "best_order", "estimator_of", "likely_meshes"]

# More stages, on all ranks or on each, are no longer looked at after so many numbers that were
# worse.
_MOST_WORSE = 2
# Numbers of stages are looked at in steps of this factor first.
_STEP = 1.6
# Numbers of stages beside the best one are looked at if blocks divide into them so evenly, as a
# share of how they divide into the best one.
_AS_EVEN = 0.9
# More stages on each rank are taken where a step is shorter than by an error of estimates.
_WORTH = 1.01
# Meshes of which the estimate is within this factor of the shortest are planned in full, and so
# many of them at most.
_LIKELY, _MOST_LIKELY = 1.03, 2


def best_mesh(
    captured: Captured, world_size: int, options: Options, beat: float
) -> tuple[Mesh, Estimator] | None:
    """Return the mesh with stages of which an estimate is shortest, and what estimates it; None
    where none is shorter than `beat` seconds, where no pipeline can be run, and for a model without
    chains of equal blocks.

    Stages stay inside of nodes or across them; ranks of one stage are arranged as ranks without
    stages are. From few stages on, more are looked at as long as they are better.

    Example: `best_mesh(captured, 64, Options(data_parallel=True), plan.step)`
    """
    estimator = estimator_of(captured, options)
    if estimator is None:
        return None
    estimator.beat = beat
    found = _with_stages(estimator, world_size, options)
    estimator.beat = math.inf
    if not found or not _fits(found[0][0], options) or found[0][0].seconds >= beat:
        return None
    estimate, mesh = found[0]
    estimator.settle(mesh, estimate)
    return mesh, estimator


def likely_meshes(
    estimator: Estimator, meshes: Sequence[Mesh], options: Options
) -> dict[Mesh, float] | None:
    """Return those of many meshes, and of those with stages, of which the shortest steps are
    estimated, the shortest first, with their seconds; None where no estimate fits.

    meshes: of the same number of ranks, without stages, in the order of their inner axes' sizes.
    From the one of whole nodes on, larger and smaller ones are looked at as long as they are
    better.

    Example: `likely_meshes(estimator_of(captured, options), arrangements(1024, 8), options)`
    """
    found: list[tuple[Estimate, Mesh]] = []
    alone = shares_of(1, 1, options)
    limit = options.memory_limit
    per_node = find_hardware(options.hardware).devices_per_node
    inner = [dict(mesh.axes).get("tp", 1) for mesh in meshes]
    middle = max(place for place, size in enumerate(inner) if size <= per_node)
    nearest: Estimate | None = None
    for way in (range(middle, len(meshes)), range(middle)[::-1]):
        for place in way:
            estimate = estimator.estimate(meshes[place], alone, 1)
            if estimate is None:
                continue
            found.append((estimate, meshes[place]))
            if nearest is not None and not is_better(estimate, nearest, limit):
                break
            nearest = estimate
    shortest = min((each.seconds for each, _ in found if _fits(each, options)), default=math.inf)
    estimator.beat = shortest * _LIKELY
    for estimate, mesh in _with_stages(estimator, meshes[0].world_size, options):
        estimator.settle(mesh, estimate)
        found.append((estimate, mesh))
    estimator.beat = math.inf
    found = [each for each in found if _fits(each[0], options)]
    if not found:
        return None
    found.sort(key=lambda each: each[0].seconds)
    enough = found[0][0].seconds * _LIKELY
    likely = [(mesh, each.seconds) for each, mesh in found if each.seconds <= enough]
    return dict(likely[:_MOST_LIKELY])


def estimator_of(captured: Captured, options: Options) -> Estimator | None:
    """Return what estimates pipelines of a model; None where there can be none, or no estimates.

    Example: `estimator_of(captured, Options(data_parallel=True))`
    """
    try:
        refuse_pipeline(captured, options)
    except PlanError:
        return None
    estimator = Estimator(in_parts(captured), options)
    return None if estimator.short is None else estimator


def _fits(estimate: Estimate, options: Options) -> bool:
    """Return whether an estimated step is within the memory limit."""
    return options.memory_limit is None or estimate.nbytes <= options.memory_limit


def _with_stages(
    estimator: Estimator, world_size: int, options: Options
) -> list[tuple[Estimate, Mesh]]:
    """Return estimates of meshes with stages and the meshes, the best one first."""
    per_node = find_hardware(options.hardware).devices_per_node
    limit = options.memory_limit
    every: list[tuple[Estimate, Mesh]] = []
    best: tuple[Estimate, Mesh] | None = None
    fewest, each, more = 2, 1, 0
    for tensor in _widths(world_size, per_node):
        ladder = [
            pp
            for pp in range(fewest, estimator.blocks // options.each_rank + 1)
            if world_size % (pp * tensor) == 0
        ]
        found, more = _of_width(estimator, ladder, tensor, world_size, options, each, more)
        if not found:
            continue
        every, of_width = every + found, found[0]
        if best is not None and not is_better(of_width[0], best[0], limit):
            # Narrower ones send more between fewer ranks still.
            break
        # With so many stages, fewer on each rank wait longer whatever the width.
        best, each = of_width, of_width[0].stages_per_rank
        if limit is not None:
            # Fewer ranks hold more of a stage each, which takes more stages.
            fewest = dict(of_width[1].axes)[PIPELINE]
        if current().is_over:
            break
    return _best_first(every, limit)


def _best_first(
    found: Iterable[tuple[Estimate, Mesh]], limit: int | None
) -> list[tuple[Estimate, Mesh]]:
    """Return the best estimate of each mesh, with the mesh, the best one first."""
    best: dict[Mesh, Estimate] = {}
    for estimate, mesh in found:
        if mesh not in best or is_better(estimate, best[mesh], limit):
            best[mesh] = estimate
    bound = math.inf if limit is None else limit

    def place(pair: tuple[Estimate, Mesh]) -> tuple[bool, float]:
        """Return the place of a pair in the order."""
        too_large = pair[0].nbytes > bound
        return too_large, pair[0].nbytes if too_large else pair[0].seconds

    return sorted(((estimate, mesh) for mesh, estimate in best.items()), key=place)


def _of_width(
    estimator: Estimator,
    ladder: Sequence[int],
    tensor: int,
    world_size: int,
    options: Options,
    each: int,
    more: int,
) -> tuple[list[tuple[Estimate, Mesh]], int]:
    """Return estimates of so many ranks on the inner axis and their meshes, the best one first, and
    `more` of that one.

    ladder: numbers of stages, in order. each: as of `best_order`. more: 1 where more micro-batches
    were better with another number of ranks. Every number that is about twice
    the one before it is looked at as long as they are better, and then those beside the best. Where
    not everything can be kept there, so are more micro-batches, as a rank keeps less of smaller
    ones; if they are better, those beside it are looked at with more micro-batches as well.
    """
    limit = options.memory_limit
    tried: dict[tuple[int, int], tuple[Estimate, Mesh] | None] = {}

    def at(pp: int, more: int) -> tuple[Estimate, Mesh] | None:
        """Return the estimate for so many stages, and its mesh. more: as of `best_order`."""
        if (pp, more) not in tried:
            data = world_size // (pp * tensor)
            axes = {"dp": data} if data > 1 else {}
            axes |= {"tp": tensor} if tensor > 1 or not axes else {}
            found = best_order(estimator, pp, Mesh(**axes), options, each, more)
            mesh = Mesh(**{PIPELINE: pp}, **axes)
            tried[pp, more] = None if found is None else (found, mesh)
        return tried[pp, more]

    best: tuple[Estimate, Mesh] | None = None
    place, least, worse, most = -1, 0.0, 0, 0

    def look(number: int, more: int = 0) -> bool:
        """Look at a place of the ladder; say whether it is the best so far."""
        nonlocal best, place, most
        found = at(ladder[number], more)
        better = found is not None and (best is None or is_better(found[0], best[0], limit))
        if better:
            best, place, most = found, number, more
        return better

    def look_beside(more: int) -> None:
        """Look at the places beside the best one as long as they are better."""
        for way in (-1, 1):
            while 0 <= place + way < len(ladder) and not current().is_over:
                beside, even = ladder[place + way], _evenness(estimator.blocks, ladder[place])
                # Numbers that blocks divide into much less evenly leave most ranks waiting for a
                # few.
                if (beside, more) in tried or _evenness(estimator.blocks, beside) < _AS_EVEN * even:
                    break
                if not look(place + way, more):
                    break

    for number, pp in enumerate(ladder):
        if pp < least:
            continue
        found = at(pp, 0)
        # What a stage holds goes down as their number goes up. Where no more than what stays is
        # known, no smaller number has room for that.
        over = found[0].nbytes / limit if found is not None and limit is not None else 1.0
        known = found is not None and found[0].seconds == math.inf
        least = pp * (over if known else max(_STEP, over / _STEP))
        worse = 0 if look(number) else worse + 1
        if worse >= _MOST_WORSE or current().is_over:
            break
    if best is not None:
        look_beside(0)
        keeps_less = limit is not None and not options.microbatches and not best[0].keeps_all
        if (keeps_less or more) and look(place, 1):
            look_beside(1)
    return _best_first((each for each in tried.values() if each is not None), limit), most


def _evenness(blocks: int, ranks: int) -> float:
    """Return the mean number of blocks of a rank as a share of the largest."""
    return blocks / ranks / -(-blocks // ranks)


def best_order(
    estimator: Estimator,
    ranks: int,
    inside: Mesh,
    options: Options,
    each: int = 1,
    more: int = 0,
) -> Estimate | None:
    """Return the best estimate of so many ranks that share out stages, of all ways to order them.

    What was asked for is not chosen. each: the fewest stages on a rank that are looked at; more
    are as long as they are better (see `_rounds`). They send more often, and hold more
    micro-batches than one does, two the most. more: how many numbers of micro-batches beyond the
    one at which stages wait a fifth of the time; None where there are not so many.

    Example: `best_order(estimator, 4, Mesh(tp=2), options).stages_per_rank`
    """
    best: Estimate | None = None
    worse = 0
    for asked in _orders(options, ranks, inside, estimator.blocks, each):
        counts = [asked.microbatches or 0]
        if not asked.microbatches:
            counts = microbatch_counts(estimator.whole, ranks, inside, asked)
            place = counts.index(middle_of(counts, ranks)) + more
            if place >= len(counts):
                continue
            counts = [counts[place]]
        elif not is_even(counts[0], ranks, asked):
            continue
        chosen = chosen_of(estimator, counts, ranks, inside, asked)
        if chosen is None:
            continue
        found = chosen[0]
        longer = replace(found, seconds=found.seconds * _WORTH)
        if best is None or is_better(longer, best, options.memory_limit):
            best, worse = found, 0
        elif asked.order == best.schedule:
            worse += 1
            # Within a limit, two stages on each rank may hold too much where one and four do not.
            if options.memory_limit is None or best.keeps_all or worse >= _MOST_WORSE:
                break
    return best


def _orders(
    options: Options, ranks: int, inside: Mesh, blocks: int, each: int
) -> Iterator[Options]:
    """Yield the options with each schedule and number of stages on a rank, `each` or more, worth a
    look.
    """
    if options.schedule is None and inside.world_size == 1:
        # Ranks alone in their stage may put off gradients of weights.
        yield replace(options, schedule="zero_bubble", stages_per_rank=options.each_rank)
    if options.stages_per_rank is not None:
        yield options
        return
    numbers = _rounds(blocks, ranks)
    for number in [most for most in numbers if most >= each] or numbers[-1:]:
        yield replace(options, schedule=options.order, stages_per_rank=number)


def _rounds(blocks: int, ranks: int) -> list[int]:
    """Return the numbers of stages on each rank that are looked at, in order.

    Each is at least twice the one before it, and the blocks divide into so many stages about as
    evenly as into one on each rank: the longest stage is what all others wait for.

    >>> _rounds(blocks=96, ranks=8), _rounds(blocks=105, ranks=35), _rounds(blocks=4, ranks=8)
    ([1, 2, 4, 12], [1, 3], [1])
    """
    numbers = [1]
    for number in range(2, blocks // ranks + 1):
        even = _evenness(blocks, number * ranks) >= _AS_EVEN * _evenness(blocks, ranks)
        if even and number >= 2 * numbers[-1]:
            numbers.append(number)
    return numbers


def _widths(world_size: int, per_node: int) -> list[int]:
    """Return the sizes of the axis tp that are looked at: a node, and parts of it."""
    return [
        size
        for size in range(min(per_node, world_size // 2), 0, -1)
        if world_size % size == 0 and per_node % size == 0
    ]
