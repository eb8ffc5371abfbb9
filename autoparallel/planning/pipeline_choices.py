"""The choices that make a pipeline of given stages: micro-batches, and what they are parts of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Graph, Sym, hint
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.graph.passes.equal_sizes import with_equal_sizes
from autoparallel.graph.passes.flattened_rows import unflatten_rows
from autoparallel.graph.passes.global_counts import split_loss_counts
from autoparallel.mesh import Mesh
from autoparallel.options import SCHEDULES, Options
from autoparallel.placement import Invariant, Layout, Replicate
from autoparallel.planning.pipeline_estimates import Estimator
from autoparallel.planning.schedule_figures import shares_of
from autoparallel.planning.stage_estimates import Estimate, is_better

__all__ = [
    "batch_of",
    "chosen_of",
    "in_parts",
    "is_even",
    "microbatch_counts",
    "middle_of",
    "over_time",
    "refuse_pipeline",
]

# Micro-batches for each stage that are tried first: of the passes' time, the stages then wait a
# fifth.
_PER_STAGE = 4
# So many numbers of micro-batches are tried at most.
_MOST_COUNTS = 12


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
