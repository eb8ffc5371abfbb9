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
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.pipeline_step import passes_of, step_of
from autoparallel.analysis.stage_paces import Busy, at_own_paces
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.shortened import Shortened, shortened
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Pipeline
from autoparallel.planning.eased_plans import Eased
from autoparallel.planning.least_pipeline import least_seconds, seconds_alone
from autoparallel.planning.quickest_stages import MOST_PASSES, quickest_starts
from autoparallel.planning.short_chains import Asked, ShortChains, TooLargeError
from autoparallel.planning.stage_chain import StageChain, mixed, most_saved
from autoparallel.planning.stage_estimates import Estimate, is_better
from autoparallel.planning.stage_work import StageBytes
from autoparallel.planning.ways_to_keep import WAYS, mode_of, regathered, worthwhile
from autoparallel.strategy.stage_shares import StageShares
from planners import InfeasibleError

__all__ = ["Estimator"]

# By how much an estimate from other meshes may be beyond the limit, to be looked at.
_NEARLY = 1.1
# What all bytes that stay are charged, one after the other, as shares of a plan's seconds.
_PRICES = (0.0, 0.1)
# Shares of the limit that estimates with some blocks recomputed are made to fill, one after the
# other: what the plan itself takes differs by a few percent.
_FILLED = (0.98, 0.96, 0.94, 0.92, 0.89, 0.85)


class Estimator:
    """Estimates of pipelines of one model. captured: as micro-batches compute it.

    whole: its graph. short: the model with few of its equal blocks; None where it has no chain of
    them, and there are no estimates. blocks: the number of blocks in chains. beat: pipelines whose
    steps can be no shorter are of no use, and are not estimated.
    """

    def __init__(self, captured: Captured, options: Options) -> None:
        self.options, self.captured, self.whole = options, captured, captured.graph
        self.beat = math.inf
        self._alone: float | None = None
        self.short: Shortened | None = shortened(captured.graph)
        self.blocks = 0
        # Seconds and bytes kept of all ways, on the first mesh with stages on which they were told,
        # and those that are worth a try. Tensors lie otherwise where a rank has all blocks.
        self._taken: dict[str, tuple[float, float]] = {}
        self._ways = WAYS
        # The place among them of the way with which an estimate last fitted.
        self._first = 0
        # How much more the way at a place keeps than the next one.
        self._more: dict[int, float] = {}
        self._estimates: dict[Any, Estimate | None] = {}
        # The shortest step so far, which ways of recomputing some blocks have to beat.
        self._shortest = math.inf
        # The schedules and stages on each rank of the meshes that were chosen.
        self._chosen: dict[Mesh, tuple[str, int]] = {}
        if self.short is not None:
            self.chains = ShortChains(captured, self.short, options)
            self.blocks, self.graph = self.chains.blocks, self.chains.graph

    def settle(self, mesh: Mesh, estimate: Estimate) -> None:
        """Remember with which schedule a mesh with stages was estimated to be quickest."""
        self._chosen[mesh] = estimate.schedule, estimate.stages_per_rank

    def settled(self, mesh: Mesh, options: Options) -> Options:
        """Return the options with the schedule that was chosen for a mesh."""
        schedule, each = self._chosen.get(mesh, (options.order, options.each_rank))
        return replace(options, schedule=schedule, stages_per_rank=each)

    def estimate(
        self,
        inside: Mesh,
        shares: StageShares,
        count: int,
        pins: Mapping[str, Layout] | None = None,
        options: Options | None = None,
    ) -> Estimate | None:
        """Return the estimate of the best way to recompute, among those that fit; of the one that
        needs least where none does. None where there is no such pipeline, no way to tell, or none
        can be shorter than `beat`.

        inside: the mesh of the ranks of a stage. shares: of a pipeline of so many micro-batches,
        count. pins: layouts of parameters, by path, over micro-batches. options: with another
        schedule or number of stages on each rank than the estimator's.
        """
        options = options or self.options
        if self.beat < math.inf and self._least(inside, shares.ranks, count, options) >= self.beat:
            return None
        key = inside, shares, count, options.order, options.each_rank, tuple((pins or {}).items())
        if key not in self._estimates:
            asked = Asked(inside, replace(shares, in_parts=True), count, pins or {}, options)
            found = self._estimated(asked)
            if found is None and count > 1:
                found = self._estimated(replace(asked, shares=replace(shares, in_parts=False)))
            limit = options.memory_limit
            if found is not None and (limit is None or found.nbytes <= limit):
                self._shortest = min(self._shortest, found.seconds)
            self._estimates[key] = found
        return self._estimates[key]

    def _least(self, inside: Mesh, ranks: int, count: int, options: Options) -> float:
        """Return the least that a step takes; arguments as of `estimate`."""
        if self._alone is None:
            graph = with_larger_hints(self.captured, self.options.tokens)
            self._alone = seconds_alone(graph, self.options)
        return least_seconds(self._alone, options, ranks, inside, count)

    def _estimated(self, of: Asked) -> Estimate | None:
        """Return the estimate, which is not known yet."""
        limit, asked = self.options.memory_limit, self.options.recompute
        if asked != "auto":
            given = self._fitting(of, asked)
            if given is None or limit is None or asked == "full":
                return given
            # Stages that fit only where they take unequal times may be equal with less kept.
            less = self._fitting(of, regathered(asked))
            return less if less is not None and is_better(less, given, limit) else given
        if not self._taken and of.shares.ranks > 1:
            self._tell_ways(of)
        tried: dict[int, Estimate | None] = {}

        def fits(place: int) -> bool:
            """Try a way to recompute; say whether it fits."""
            found = self._fitting(of, self._ways[place])
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
            for place in range(first + 1, len(self._ways)):
                before = tried[place - 1]
                # What recomputes more takes longer.
                if before is not None and self._shortest <= before.seconds < math.inf:
                    break
                if fits(place):
                    self._first = place
                    break
        found = [(place, each) for place, each in sorted(tried.items()) if each is not None]
        for (place, one), (other, less) in pairwise(found):
            if other == place + 1 and less.activations:
                self._more[place] = one.activations / less.activations
        best: Estimate | None = None
        for _, each in found:
            if best is None or is_better(each, best, limit):
                best = each
        return self._partly(of, best) if best is not None else None

    def _tell_ways(self, of: Asked) -> None:
        """Find which ways are worth a try, if all of them can be told on a mesh."""
        for price in _PRICES:
            try:
                chains = {way: self.chains.chain(of, way, price) for way in WAYS}
            except (PlanError, InfeasibleError, TooLargeError):
                continue
            self._taken = {
                way: (float(chain.seconds.sum()), float(chain.bytes.kept.sum()))
                for way, chain in chains.items()
            }
            self._ways = worthwhile(self._taken)
            self._first, self._more = 0, {}
            return

    def _mixtures(self, alike: str) -> list[tuple[str, ...]]:
        """Return ways that blocks may have beside each other, those that keep most first.

        alike: that with which all blocks fit, which is one of each. The others save most time for a
        byte.
        """
        place, taken = self._ways.index(alike), self._taken
        before, behind = self._ways[:place][::-1], self._ways[place + 1 :]

        def rate(other: str) -> float:
            """Return the seconds for a byte by which two ways differ."""
            if not taken:
                return 0.0
            (seconds, nbytes), (less, more) = taken[alike], taken[other]
            return (seconds - less) / (more - nbytes)

        more = (max(before, key=rate),) if before else ()
        less = (min(behind, key=rate),) if behind else ()
        mixtures = [(*more, alike), (alike, *less), (*more, alike, *less)]
        return [each for each in dict.fromkeys(mixtures) if len(each) > 1]

    def _partly(self, of: Asked, alike: Estimate) -> Estimate:
        """Return the best estimate with as many blocks recomputed less as fit.

        alike: the estimate with all blocks recomputed alike.
        """
        limit = self.options.memory_limit
        if limit is None or alike.nbytes > limit or not self.chains.numbered:
            return alike
        if of.shares.ranks == 1:
            return alike  # without stages, the search within the limit chooses block by block
        # What shares most of what stays leaves most room for activations.
        best, price = alike, _PRICES[-1]
        mixes: list[Eased] = []
        each = of.count / of.shares.ranks
        # Where all blocks fit alike only in stages that take unequal times, a few of them that are
        # recomputed more leave room for equal ones.
        for ways in self._mixtures(alike.recompute):
            try:
                # No cut is shorter than one into equal stages.
                least = self.chains.chain(of, ways[0], price).seconds.sum() * each
                if least >= min(self._shortest, best.seconds):
                    continue
                # Blocks lie beside each other as those do that keep least.
                layouts = mode_of(ways[-1])
                found = self._mixed(
                    of, {way: self.chains.chain(of, way, price, layouts) for way in ways}
                )
            except (PlanError, InfeasibleError, TooLargeError):
                continue
            if found is not None and is_better(found, alike, limit):
                found = replace(found, price=price)
                mixes += [replace(mix, price=price) for mix in found.mixes]
                best = found if is_better(found, best, limit) else best
        return replace(best, mixes=tuple(sorted(mixes, key=lambda mix: mix.seconds)))

    def _mixed(self, of: Asked, chains: Mapping[str, StageChain]) -> Estimate | None:
        """Return the estimate with blocks as in several chains, each with as much kept as its rank
        has room for; None where none has for more than the last chain keeps.

        chains: by the way to keep, that which keeps most first.
        """
        limit = self.options.memory_limit
        assert limit is not None
        *ways, least = chains
        starts = self._cut(of, chains[least])
        ranks, most = of.schedule.ranks, of.schedule.together
        best: Estimate | None = None
        for in_turn in (False, True):
            found: Estimate | None = None
            mixes: list[tuple[str, ...]] = []
            for filled in _FILLED:
                chain, blocks = chains[least], [least] * chains[least].count
                for way in reversed(ways):
                    room = limit * filled
                    marked = most_saved(chains[way], chain, starts, most, ranks, room, in_turn)
                    chain = mixed(chains[way], chain, marked)
                    pairs = zip(blocks, marked, strict=True)
                    blocks = [way if is_marked else other for other, is_marked in pairs]
                if set(blocks) == {least}:
                    break
                mixes.append(tuple(blocks))
                if found is None:
                    found = self._told(of, chain, starts, least)
            if found is not None and (best is None or is_better(found, best, limit)):
                of_all = Eased(least, 0.0, (), found.seconds, tuple(map(int, starts)))
                ways_of_blocks = dict.fromkeys(mixes)
                each = tuple(replace(of_all, blocks=blocks) for blocks in ways_of_blocks)
                best = replace(found, mixes=each)
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

    def _fitting(self, of: Asked, recompute: str) -> Estimate | None:
        """Return the estimate with one way to recompute; None where there is none.

        Where the quickest plan does not fit in the limit, bytes that stay are charged, so that
        ranks share more of what each would hold for itself.
        """
        limit = self.options.memory_limit
        best: Estimate | None = None
        for price in _PRICES:
            try:
                chain = self.chains.chain(of, recompute, price)
                found = self._told(of, chain, self._cut(of, chain), recompute)
                found = replace(found, price=price)
            except TooLargeError as error:
                found = Estimate(math.inf, error.nbytes, recompute, price=price)
            except (PlanError, InfeasibleError):
                break
            if best is None or is_better(found, best, limit):
                best = found
            if limit is None or found.nbytes <= limit or found.activations > limit:
                break
        return best

    def _cut(self, of: Asked, chain: StageChain) -> NDArray[np.intp]:
        """Return where the stages of a chain start: of cuts that are as even, where the step is
        shortest.
        """
        limit = self.options.memory_limit
        room = math.inf if limit is None else limit
        most, ranks = of.schedule.together, of.schedule.ranks
        even = chain.cut(most, ranks, room)
        times = chain.times(len(even), of.alone)
        return np.array(quickest_starts(even, times, of.pipeline, chain.bytes, room))

    def _told(
        self, of: Asked, chain: StageChain, starts: NDArray[np.intp], recompute: str
    ) -> Estimate:
        """Return the estimate of a chain whose stages start at these places."""
        most, ranks, stages = of.schedule.together, of.schedule.ranks, len(starts)
        ends = np.array([*starts[1:], len(chain.seconds)])
        pipeline = chain.times(stages, of.alone).pipeline(of.pipeline, starts.tolist())
        works = [
            np.add.reduceat(each, starts) for each in (chain.busy_forward, chain.busy_backward)
        ]
        busy = tuple(map(Busy, *(work.tolist() for work in works)))
        hardware = find_hardware(self.options.hardware)
        pipeline = at_own_paces(pipeline, busy, hardware, of.inside.world_size)
        if of.schedule.passes <= MOST_PASSES:
            step = step_of(pipeline, passes_of(pipeline, chain.link))[0]
        else:
            step = _long_step(pipeline, ranks)
        # What stands once, such as a head, keeps as much whatever the way.
        of_blocks = np.where(chain.block >= 0, chain.bytes.kept, 0.0)
        kept = StageBytes(
            np.zeros_like(chain.bytes.stays), of_blocks, chain.bytes.buffers, (), 0.0
        ).sizes(most)
        saved = max(float(kept(n, starts[n], ends[n])) for n in range(stages))
        return Estimate(
            step,
            chain.bytes.needs(most, ranks, starts.tolist()),
            recompute,
            saved,
            schedule=of.options.order,
            stages_per_rank=of.options.each_rank,
        )


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
