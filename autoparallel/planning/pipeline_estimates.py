"""Pipelines compared quickly: what a step would take, from a model with few of its equal blocks.

How many stages, how many micro-batches and which splits inside of a stage suit each other: there
are many combinations, and each plan of a deep model takes seconds. Equal blocks are planned alike.
So a model with three of them is planned for every combination, what its second one takes is
repeated as often as the block is, and that chain is cut into stages and timed as a plan is. What
comes out best is then planned in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from autoparallel.analysis.abstract_execution import Seen
from autoparallel.analysis.pipeline import send_seconds
from autoparallel.analysis.pipeline_step import link_of_stages, passes_of, step_of
from autoparallel.analysis.pipeline_walk import held
from autoparallel.analysis.timeline import passes_of_stage
from autoparallel.cost.hardware import find_hardware
from autoparallel.cost.links import Link
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.shortened import Shortened, shortened
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Pipeline
from autoparallel.planning.memory_limit import Eased
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.planning.stage_work import NEAR, StageBytes, StageWork, fewer_places
from autoparallel.runtime.schedule_orders import (
    ranks_of_stages,
    schedule_order,
)
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.stage_shares import StageShares
from planners import InfeasibleError, partition

__all__ = ["Estimate", "Estimator", "is_better"]

# Steps of more passes than these are told by a formula.
_MOST_PASSES = 20_000
# Ways to recompute, from the quickest to the one that saves least.
_MODES = ("none", "selective", "full")
# By how much an estimate from other meshes may be beyond the limit, to be looked at.
_NEARLY = 1.1
# What all bytes that stay are charged, one after the other, as shares of a plan's seconds.
_PRICES = (0.0, 0.1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """An Estimate tells what a step of a pipeline would take.

    seconds: of the step. nbytes: of the rank that needs most; without activations where memory is
    not limited. recompute: as of Options. activations: those of nbytes that are saved activations,
    of one stage. price: as of `Eased`.
    """

    seconds: float
    nbytes: float
    recompute: str
    activations: float = 0.0
    price: float = 0.0

    @property
    def eased(self) -> Eased:
        """How a plan of the whole model keeps as little as this one."""
        return Eased(self.recompute, self.price)


class Estimator:
    """Estimates of pipelines of one model. captured: as micro-batches compute it.

    whole: its graph. short: the model with few of its equal blocks; None where it has no chain of
    them, and there are no estimates. blocks: the number of blocks in chains.
    """

    def __init__(self, captured: Captured, options: Options) -> None:
        self.options, self.whole = options, captured.graph
        self.short: Shortened | None = shortened(captured.graph)
        self.blocks = 0
        # The network that was built last, and what calls save on its mesh.
        self._known: tuple[CostNetwork, Seen] | None = None
        # The place in _MODES of the way to recompute with which an estimate last fitted.
        self._first = 0
        # How much more the way to recompute at a place saves than the next one.
        self._more: dict[int, float] = {}
        self._estimates: dict[tuple[Mesh, StageShares, int], Estimate | None] = {}
        if self.short is not None:
            self.blocks = sum(times + 2 for _, _, times in self.short.times)
            self.captured = replace(captured, graph=self.short.graph)
            self.graph = with_larger_hints(self.captured, options.tokens)

    def estimate(
        self,
        inside: Mesh,
        shares: StageShares,
        count: int,
        pins: Mapping[str, Layout] | None = None,
    ) -> Estimate | None:
        """Return the estimate of the best way to recompute, among those that fit; of the one that
        needs least where none does. None where there is no such pipeline, or no way to tell.

        inside: the mesh of the ranks of a stage. shares: of a pipeline of so many micro-batches,
        count. pins: layouts of parameters, by path, over micro-batches.
        """
        key = inside, shares, count
        if pins:
            return self._estimated(inside, shares, count, pins)
        if key not in self._estimates:
            self._estimates[key] = self._estimated(inside, shares, count, {})
        return self._estimates[key]

    def _estimated(
        self, inside: Mesh, shares: StageShares, count: int, pins: Mapping[str, Layout]
    ) -> Estimate | None:
        """Return the estimate, which is not known yet."""
        limit, asked = self.options.memory_limit, self.options.recompute
        if asked != "auto":
            return self._fitting(inside, shares, count, asked, pins)
        tried: dict[int, Estimate | None] = {}

        def fits(place: int) -> bool:
            """Try a way to recompute; say whether it fits."""
            found = self._fitting(inside, shares, count, _MODES[place], pins)
            tried[place] = found
            return found is not None and (limit is None or found.nbytes <= limit)

        # A mode behind one that fits recomputes more; one before it may fit on this mesh as well.
        first = self._first
        if fits(first):
            while self._first and self._may_fit(tried[self._first], self._first - 1):
                if not fits(self._first - 1):
                    break
                self._first -= 1
        else:
            able = (place for place in range(first + 1, len(_MODES)) if fits(place))
            self._first = next(able, first)
        found = [(place, each) for place, each in sorted(tried.items()) if each is not None]
        for (place, one), (other, less) in pairwise(found):
            if other == place + 1 and less.activations:
                self._more[place] = one.activations / less.activations
        best: Estimate | None = None
        for _, each in found:
            if best is None or is_better(each, best, limit):
                best = each
        return best

    def _may_fit(self, found: Estimate | None, place: int) -> bool:
        """Return whether a way to recompute less may fit where the next one does.

        found: the estimate with that one. What the other saves is told by meshes before.
        """
        limit = self.options.memory_limit
        if found is None or limit is None:
            return True
        more = found.activations * (self._more.get(place, 1.0) - 1.0)
        return found.nbytes + more <= limit * _NEARLY

    def _fitting(
        self,
        inside: Mesh,
        shares: StageShares,
        count: int,
        recompute: str,
        pins: Mapping[str, Layout],
    ) -> Estimate | None:
        """Return the estimate with one way to recompute; None where there is none.

        Where the quickest plan does not fit in the limit, bytes that stay are charged, so that
        ranks share more of what each would hold for itself.
        """
        limit = self.options.memory_limit
        best: Estimate | None = None
        for price in _PRICES:
            try:
                found = self._of(inside, shares, count, recompute, pins, price)
            except (PlanError, InfeasibleError):
                break
            if best is None or is_better(found, best, limit):
                best = found
            if limit is None or found.nbytes <= limit or found.activations > limit:
                break
        return best

    def _network(
        self, mesh: Mesh, options: Options, shares: StageShares
    ) -> tuple[CostNetwork, Seen]:
        """Return the cost network of the short model, and what calls save on this mesh."""
        known, seen = self._known or (None, {})
        if known is not None and known.mesh != mesh:
            seen = {}
        if known is None or (known.mesh, known.options, known.shares) != (mesh, options, shares):
            hardware, part = find_hardware(options.hardware), self.captured.part
            known = build_network(self.graph, mesh, hardware, options, None, part, shares, known)
            constrain(known, self.captured)
        self._known = known, seen
        return known, seen

    def _of(
        self,
        inside: Mesh,
        shares: StageShares,
        count: int,
        recompute: str,
        pins: Mapping[str, Layout],
        price: float,
    ) -> Estimate:
        """Return the estimate with one way to recompute. price: of all bytes that stay, as a share
        of the seconds of the quickest plan.
        """
        assert self.short is not None
        options = replace(self.options, memory_limit=None, recompute=recompute)
        hardware = find_hardware(options.hardware)
        mesh = Mesh(**{MICROBATCH: count}, **dict(inside.axes))
        network, seen = self._network(mesh, options, shares)
        nodes = {node.target: node.name for node in self.graph.nodes if node.kind == "parameter"}
        pinned = {nodes[path]: pin for path, pin in pins.items() if path in nodes}
        solve, problem = NetworkSolver(network), network.problem(1.0, pinned)
        solution = solve(problem)
        if price:
            solution = Eased(recompute, price).solved(solve, problem, solution)
        plan = plan_of_solution(self.captured, "", mesh, network, solution, 1.0)
        limit = self.options.memory_limit
        chain = _Chain(StageWork(self.graph, plan), self.short, count, limit is not None, seen)
        passes = passes_of_stage(plan, hardware)
        stages = shares.ranks * options.stages_per_rank
        link = link_of_stages(plan, shares.ranks, hardware)
        order = schedule_order(options.schedule, shares.ranks, options.stages_per_rank, count)
        most = [1] * stages
        for moment in held(order, [1.0] * stages):
            for stage, batches in moment.stages:
                most[stage] = batches
        each = math.inf if limit is None else limit / options.stages_per_rank
        places = chain.cut(stages, link, chain.bytes, most, each)
        ends = np.array([*places[1:], len(chain.seconds)])
        starts = np.array(places)
        # Part of what is sent overlaps, in the short model as in the whole one.
        both = passes.forward + passes.backward
        overlapped = both / max(chain.short_seconds, 1e-300)
        sums = np.concatenate([[0.0], np.cumsum(chain.seconds)])
        seconds = (sums[ends] - sums[starts]) * overlapped
        stays = np.concatenate([[0.0], np.cumsum(chain.bytes.stays)])
        part = (stays[ends] - stays[starts]) / max(chain.short_stays, 1.0)
        rows = sum(op.seconds for op in plan.ops) + sum(row.seconds for row in plan.conversions)
        updates = max(plan.seconds - rows, 0.0) / shares.once + passes.reduction
        sent = [int(chain.nbytes[end]) for end in ends[:-1]]
        pipeline = Pipeline(
            stages,
            shares.ranks,
            count,
            options.schedule,
            (),
            tuple(map(float, seconds)),
            (*sent, 0),
            0.0,
            tuple(map(float, seconds * (passes.forward / max(both, 1e-300)))),
            tuple(map(float, seconds * (passes.weights / max(both, 1e-300)))),
            tuple(map(float, part * updates)),
            (0, *sent),
        )
        sizes = chain.bytes.sizes(most)
        of_rank = [0.0] * shares.ranks
        for stage, rank in enumerate(ranks_of_stages(order)):
            of_rank[rank] += float(sizes(stage, starts[stage], ends[stage]))
        if sum(map(len, order)) <= _MOST_PASSES:
            step = step_of(pipeline, passes_of(pipeline, link))[0]
        else:
            step = _long_step(pipeline, ranks_of_stages(order))
        kept = StageBytes(
            np.zeros_like(chain.bytes.stays), chain.bytes.kept, chain.bytes.buffers, (), 0.0
        ).sizes(most)
        alone = max(float(kept(n, starts[n], ends[n])) for n in range(stages))
        return Estimate(step, max(of_rank), recompute, alone, price)


def is_better(one: Estimate, other: Estimate, limit: int | None) -> bool:
    """Return whether an estimate is better than another: fits, where that does not, or is shorter;
    of two that do not fit, needs less.

    >>> is_better(Estimate(2.0, 10.0, "full"), Estimate(1.0, 30.0, "none"), limit=20)
    True
    """
    bound = math.inf if limit is None else limit
    fits = (one.nbytes <= bound, other.nbytes <= bound)
    if fits == (False, False):
        return one.nbytes < other.nbytes
    return one.seconds < other.seconds if all(fits) else fits[0]


def _long_step(pipeline: Pipeline, ranks: tuple[int, ...]) -> float:
    """Return about what a step of very many passes takes.

    The rank that works most does so all the time, but for one micro-batch's way through all others;
    stages that share a rank shorten it.
    """
    work, once = [0.0] * pipeline.ranks, [0.0] * pipeline.ranks
    for stage, rank in enumerate(ranks):
        work[rank] += pipeline.seconds[stage]
        once[rank] += pipeline.once_seconds[stage]
    each = pipeline.stages // pipeline.ranks
    way = (sum(work) - max(work)) / each
    return pipeline.microbatches * max(work) + way + max(once)


class _Chain:
    """The ops of the whole model, from those of the short one: its repeated run stands repeatedly.

    seconds, nbytes, joined: by op, see StageWork. bytes: see StageBytes. short_seconds,
    short_stays: the sums over the short model.
    """

    def __init__(
        self, work: StageWork, short: Shortened, count: int, activations: bool, seen: Seen
    ) -> None:
        runs = {first: (last, times) for first, last, times in short.times}
        index: list[int] = []
        place = 0
        copies: dict[int, int] = {}
        while place < len(work.names):
            last, times = runs.get(work.names[place], (work.names[place], 1))
            end = work.place.get(last, place) + 1
            for at in range(place, end):
                copies[at] = len(index) + (end - place) * (times - 1) + at - place
            index += list(range(place, end)) * times
            place = end
        self.index = np.array(index)
        self.seconds = np.array(work.seconds)[self.index]
        self.nbytes = np.array([*work.nbytes, 0.0])[np.append(self.index, len(work.nbytes))]
        self.joined = np.array(work.joined)[self.index]
        own = work.bytes_of(count, activations, seen)
        self.bytes = StageBytes(
            own.stays[self.index],
            own.kept[self.index],
            own.buffers[np.append(self.index, len(own.buffers) - 1)],
            tuple((copies[one], copies[other], size) for one, other, size in own.twice),
            own.besides,
        )
        self.short_seconds = float(sum(work.seconds))
        self.short_stays = float(own.stays.sum())

    def cut(
        self, stages: int, link: Link, sizes: StageBytes, most: list[int], limit: float
    ) -> tuple[int, ...]:
        """Return where stages start. most: micro-batches of which each keeps activations. limit:
        bytes of a stage, within which they stay if they can.
        """
        sends = {size: send_seconds(size, link) for size in set(self.nbytes.tolist())}
        allowed = [
            math.inf if place and (not size or joined) else sends[size]
            for place, (size, joined) in enumerate(
                zip(self.nbytes[:-1].tolist(), self.joined.tolist(), strict=True)
            )
        ]
        allowed = fewer_places(allowed, stages)
        seconds = self.seconds.tolist()
        if math.isfinite(limit):
            try:
                return partition(seconds, allowed, stages, None, sizes.fits(most, limit), NEAR)
            except InfeasibleError:
                pass
        return partition(seconds, allowed, stages, near=NEAR)
