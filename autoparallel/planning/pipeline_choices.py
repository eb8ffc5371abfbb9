"""The choices that make a pipeline: stages, micro-batches, and the ranks of a stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from autoparallel.analysis.pipeline_walk import held
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Graph, Sym, hint
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.graph.passes.equal_sizes import with_equal_sizes
from autoparallel.graph.passes.flattened_rows import unflatten_rows
from autoparallel.graph.passes.global_counts import split_loss_counts
from autoparallel.mesh import PIPELINE, Mesh
from autoparallel.options import SCHEDULES, Options
from autoparallel.placement import Invariant, Layout, Replicate
from autoparallel.planning.pipeline_estimates import Estimate, Estimator, is_better
from autoparallel.runtime.schedule_orders import schedule_order
from autoparallel.strategy.stage_shares import StageShares
from planners.effort import current

__all__ = [
    "batch_of",
    "best_mesh",
    "best_order",
    "chosen_of",
    "estimator_of",
    "in_parts",
    "is_even",
    "likely_meshes",
    "microbatch_counts",
    "middle_of",
    "over_time",
    "refuse_pipeline",
    "shares_of",
]

# Micro-batches for each stage that are tried first: of the passes' time, the stages then wait a
# fifth.
_PER_STAGE = 4
# So many numbers of micro-batches are tried at most.
_MOST_COUNTS = 12
# More stages are no longer looked at after so many numbers of them that were worse.
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
    best = None if estimator is None else _with_stages(estimator, world_size, options)
    if best is None or not _fits(best[0], options) or best[0].seconds >= beat:
        return None
    assert estimator is not None
    estimator.settle(best[1], best[0])
    return best[1], estimator


def likely_meshes(
    estimator: Estimator, meshes: Sequence[Mesh], options: Options
) -> tuple[Mesh, ...] | None:
    """Return those of many meshes, and one with stages, of which the shortest steps are estimated,
    the shortest first; None where no estimate fits.

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
    staged = _with_stages(estimator, meshes[0].world_size, options)
    if staged is not None:
        estimator.settle(staged[1], staged[0])
    found += [staged] if staged is not None else []
    found = [each for each in found if _fits(each[0], options)]
    if not found:
        return None
    found.sort(key=lambda each: each[0].seconds)
    enough = found[0][0].seconds * _LIKELY
    return tuple(mesh for estimate, mesh in found if estimate.seconds <= enough)[:_MOST_LIKELY]


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
) -> tuple[Estimate, Mesh] | None:
    """Return the best estimate of a mesh with stages, and that mesh; None where there is none."""
    per_node = find_hardware(options.hardware).devices_per_node
    limit = options.memory_limit
    best: tuple[Estimate, Mesh] | None = None
    fewest, each = 2, 1
    for tensor in _widths(world_size, per_node):
        ladder = [
            pp
            for pp in range(fewest, estimator.blocks // options.each_rank + 1)
            if world_size % (pp * tensor) == 0
        ]
        of_width = _best_of_width(estimator, ladder, tensor, world_size, options, each)
        if of_width is None:
            continue
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
    return best


def _best_of_width(
    estimator: Estimator,
    ladder: Sequence[int],
    tensor: int,
    world_size: int,
    options: Options,
    each: int,
) -> tuple[Estimate, Mesh] | None:
    """Return the best estimate of so many ranks on the inner axis, and its mesh.

    ladder: numbers of stages, in order. each: as of `best_order`. Every number that is about twice
    the one before it is looked at as long as they are better, and then those beside the best.
    """
    tried: dict[int, tuple[Estimate, Mesh] | None] = {}

    def at(pp: int) -> tuple[Estimate, Mesh] | None:
        """Return the estimate for so many stages, and its mesh."""
        if pp not in tried:
            data = world_size // (pp * tensor)
            axes = {"dp": data} if data > 1 else {}
            axes |= {"tp": tensor} if tensor > 1 or not axes else {}
            inside = Mesh(**axes)
            found = best_order(estimator, pp, inside, options, each)
            tried[pp] = None if found is None else (found, Mesh(**{PIPELINE: pp}, **axes))
        return tried[pp]

    best: tuple[Estimate, Mesh] | None = None
    limit = options.memory_limit
    place, least, worse = -1, 0.0, 0

    def look(number: int) -> bool:
        """Look at a place of the ladder; say whether it is the best so far."""
        nonlocal best, place
        found = at(ladder[number])
        better = found is not None and (best is None or is_better(found[0], best[0], limit))
        if better:
            best, place = found, number
        return better

    for number, pp in enumerate(ladder):
        if pp < least:
            continue
        found = at(pp)
        # What a stage holds goes down as their number goes up. Where no more than what stays is
        # known, no smaller number has room for that.
        over = found[0].nbytes / limit if found is not None and limit is not None else 1.0
        known = found is not None and found[0].seconds == math.inf
        least = pp * (over if known else max(_STEP, over / _STEP))
        worse = 0 if look(number) else worse + 1
        if worse >= _MOST_WORSE or current().is_over:
            break
    for way in (-1, 1):
        while best is not None and 0 <= place + way < len(ladder) and not current().is_over:
            beside, even = ladder[place + way], _evenness(estimator.blocks, ladder[place])
            # Numbers that blocks divide into much less evenly leave most ranks waiting for a few.
            if beside in tried or _evenness(estimator.blocks, beside) < _AS_EVEN * even:
                break
            if not look(place + way):
                break
    return best


def _evenness(blocks: int, ranks: int) -> float:
    """Return the mean number of blocks of a rank as a share of the largest."""
    return blocks / ranks / -(-blocks // ranks)


def best_order(
    estimator: Estimator, ranks: int, inside: Mesh, options: Options, each: int = 1
) -> Estimate | None:
    """Return the best estimate of so many ranks that share out stages, of all ways to order them.

    What was asked for is not chosen. each: the fewest stages on a rank that are looked at; twice as
    many are as long as they are better. They send more often, and hold more micro-batches.

    Example: `best_order(estimator, 4, Mesh(tp=2), options).stages_per_rank`
    """
    best: Estimate | None = None
    for asked in _orders(options, ranks, inside, estimator.blocks, each):
        counts = [asked.microbatches or 0]
        if not asked.microbatches:
            counts = [middle_of(microbatch_counts(estimator.whole, ranks, inside, asked), ranks)]
        elif not is_even(counts[0], ranks, asked):
            continue
        chosen = chosen_of(estimator, counts, ranks, inside, asked)
        if chosen is None:
            continue
        found = chosen[0]
        longer = replace(found, seconds=found.seconds * _WORTH)
        if best is None or is_better(longer, best, options.memory_limit):
            best = found
        elif asked.order == best.schedule:
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
    each = each if each * ranks <= blocks else 1
    while each == 1 or each * ranks <= blocks:
        yield replace(options, schedule=options.order, stages_per_rank=each)
        each *= 2


def _widths(world_size: int, per_node: int) -> list[int]:
    """Return the sizes of the axis tp that are looked at: a node, and parts of it."""
    return [
        size
        for size in range(min(per_node, world_size // 2), 0, -1)
        if world_size % size == 0 and per_node % size == 0
    ]


def chosen_of(
    estimator: Estimator,
    counts: list[int],
    ranks: int,
    inside: Mesh,
    options: Options,
    pins: Mapping[str, Layout] | None = None,
) -> tuple[Estimate, int] | None:
    """Return the best estimate of these numbers of micro-batches, and its number; None for none.

    ranks, inside: see `microbatch_counts`. pins: see `pipeline_plan`. From the number at which
    stages wait a fifth of the time, others are looked at as long as they are better.

    Example: `chosen_of(Estimator(captured, options), [4, 8, 16], 2, Mesh(tp=2), options)`
    """
    start = counts.index(middle_of(counts, ranks))
    best: tuple[Estimate, int] | None = None
    for way in (counts[start:], counts[:start][::-1]):
        if best is not None and best[1] != counts[start]:
            break  # where more are better, fewer are not
        for count in way:
            over = None if pins is None else over_time(estimator.graph, pins, count)
            shares = shares_of(ranks, count, options)
            found = estimator.estimate(inside, shares, count, over, options)
            if found is None:
                break
            if best is not None and not is_better(found, best[0], options.memory_limit):
                break
            best = found, count
    return best


def middle_of(counts: list[int], ranks: int) -> int:
    """Return the one of these numbers of micro-batches that leaves about a fifth of the time
    waiting. ranks: that share out the stages.

    >>> middle_of([4, 8, 16, 32], ranks=4)
    16
    """
    return max((count for count in counts if count <= _PER_STAGE * ranks), default=counts[0])


def shares_of(ranks: int, count: int, options: Options) -> StageShares:
    """Return what one of so many micro-batches bears of a step. ranks: that share out the stages.

    >>> shares_of(4, 8, Options(schedule="1f1b"))
    StageShares(ranks=4, passes=11.0, in_flight=4.0)
    """
    each = options.each_rank
    order = schedule_order(options.order, ranks, each, count)
    most = max(moment.nbytes for moment in held(order, [1.0] * (ranks * each)))
    return StageShares(ranks, count + (ranks - 1) / each, most / each)


def microbatch_counts(graph: Graph, ranks: int, inside: Mesh, options: Options) -> list[int]:
    """Return the numbers of micro-batches that are worth a try, in order.

    graph: with the sizes of the example inputs. ranks: that share out the stages; inside: the mesh
    of those of one stage, on whose outermost axis the batch may be split as well. Those that cut
    the batch evenly, each about twice as many as the one before it.
    """
    batch = batch_of(graph)
    able = [count for count in range(1, batch + 1) if is_even(count, ranks, options)]
    even = [count for count in able if batch % count == 0] or able or [1]
    outer = inside.axes[0][1] if len(inside.axes) > 1 else 1
    whole = [count for count in even if (batch // count) % outer == 0] or even
    counts: list[int] = []
    for count in whole:
        if not counts or count >= 2 * counts[-1]:
            counts.append(count)
    # Fewer than there are stages leave most of them without work.
    enough = [count for count in counts if count >= ranks] or counts[-1:]
    return enough[:_MOST_COUNTS]


def is_even(count: int, ranks: int, options: Options) -> bool:
    """Return whether a schedule takes so many micro-batches: interleaved ones have equal rounds.

    >>> is_even(6, 4, Options(stages_per_rank=2)), is_even(10, 4, Options(stages_per_rank=2))
    (True, True)
    """
    schedule = SCHEDULES[options.order]
    if schedule.folded:
        return not schedule.per_stage or count >= options.each_rank * ranks
    in_rounds = options.each_rank > 1 or schedule.alone == schedule.several
    return not in_rounds or count % max(1, count // ranks) == 0


def batch_of(graph: Graph) -> int:
    """Return the size of the batch: of the inputs' first dim, where it is symbolic if any is."""
    first = [
        node.result.shape[0] for node in graph.nodes if node.kind == "input" and node.result.shape
    ]
    symbolic = [size for size in first if isinstance(size, Sym)]
    return max((hint(size) for size in symbolic or first), default=1)


def over_time(graph: Graph, stored: Mapping[str, Layout], count: int) -> dict[str, Layout]:
    """Return layouts of parameters with a placement on the axis of micro-batches before them."""
    nodes = {node.target: node.result for node in graph.nodes if node.kind == "parameter"}
    return {
        path: (
            Replicate()
            if count > 1 and path in nodes and nodes[path].requires_grad
            else Invariant(),
            *layout,
        )
        for path, layout in stored.items()
    }


def in_parts(captured: Captured) -> Captured:
    """Return a traced model as its micro-batches compute it; the same one if it is so already."""
    captured = with_equal_sizes(captured)
    graph = split_loss_counts(captured.graph).verify()
    graph = unflatten_rows(graph).verify()
    return captured if graph == captured.graph else replace(captured, graph=graph)


def refuse_pipeline(captured: Captured, options: Options) -> None:
    """Raise PlanError for what no pipeline does."""
    what, why = "", ""
    if options.rng == "fast":
        what = 'rng="fast"'
        why = "the streams of several stages would draw the same numbers"
    elif captured.own:
        what = "a model that returns its own parameters or buffers"
        why = "the ranks of other stages do not hold them"
    else:
        inert = inert_calls(captured.graph)
        for node in captured.graph.calls:
            if node.target == BRANCH_TAKEN and node.name not in inert:
                what = f"a branch on a value that the model computes ({node.line or node.where})"
                why = "one stage alone would know which way it goes"
    if what:
        raise PlanError(f"{what}: not on a mesh with stages", why=why, fix="leave pp out")
