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
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.observed_runs import Seen
from autoparallel.analysis.pipeline_step import link_of_stages, passes_of, step_of
from autoparallel.analysis.pipeline_walk import held_together
from autoparallel.analysis.timeline import passes_of_stage
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.repeated_blocks import find_repeats
from autoparallel.graph.shortened import Shortened, shortened
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Pipeline
from autoparallel.planning.eased_plans import Eased
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.planning.stage_chain import StageChain, chain_of, mixed, most_saved, stays_of
from autoparallel.planning.stage_work import StageBytes, StageWork
from autoparallel.runtime.schedule_orders import Pass, ranks_of_stages, schedule_order
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.stage_shares import StageShares
from planners import InfeasibleError

__all__ = ["Estimate", "Estimator", "is_better"]

# Steps of more passes than these are told by a formula.
_MOST_PASSES = 20_000
# Ways to recompute, from the quickest to the one that saves least.
_MODES = ("none", "selective", "full")
# By how much an estimate from other meshes may be beyond the limit, to be looked at.
_NEARLY = 1.1
# What all bytes that stay are charged, one after the other, as shares of a plan's seconds.
_PRICES = (0.0, 0.1)
# Shares of the limit that estimates with some blocks recomputed are made to fill, one after the
# other: what the plan itself takes differs by a few percent.
_FILLED = (0.98, 0.95, 0.91, 0.85)


@dataclass(frozen=True, slots=True)
class Estimate:
    """An Estimate tells what a step of a pipeline would take.

    seconds: of the step. nbytes: of the rank that needs most; without activations where memory is
    not limited. recompute: as of Options. activations: those of nbytes that are saved activations,
    of one stage. price: as of `Eased`. mixes: ways in which some blocks are recomputed less, as of
    `Eased.blocks`, those that keep most first; the first one has these seconds and bytes. starts:
    as of `Eased`, of their stages. schedule, stages_per_rank: as of Options.
    """

    seconds: float
    nbytes: float
    recompute: str
    activations: float = 0.0
    price: float = 0.0
    mixes: tuple[tuple[str, ...], ...] = ()
    starts: tuple[int, ...] = ()
    schedule: str = "1f1b"
    stages_per_rank: int = 1

    @property
    def eased(self) -> tuple[Eased, ...]:
        """The ways in which a plan of the whole model keeps as little as this one."""
        alike = Eased(self.recompute, self.price, seconds=self.seconds)
        return (
            *(replace(alike, blocks=blocks, starts=self.starts) for blocks in self.mixes),
            alike,
        )


class _TooLargeError(Exception):
    """The error that what stays takes more than all ranks have.

    nbytes: of each rank, if they share it evenly.
    """

    def __init__(self, nbytes: float) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


@dataclass(frozen=True)
class _Asked:
    """The figures of an estimate: see `Estimator.estimate`."""

    inside: Mesh
    shares: StageShares
    count: int
    pins: Mapping[str, Layout]
    options: Options

    @property
    def order(self) -> tuple[tuple[Pass, ...], ...]:
        """The passes of each rank."""
        options = self.options
        return schedule_order(options.order, self.shares.ranks, options.each_rank, self.count)

    @cached_property
    def most(self) -> tuple[int, ...]:
        """The micro-batches of which each stage keeps activations when its rank keeps most."""
        return held_together(self.order)


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
        self._estimates: dict[Any, Estimate | None] = {}
        # Chains of the whole model, by mesh, numbers and the way to recompute: stages on each rank
        # and schedules differ in cuts and passes alone.
        self._chains: dict[Any, StageChain] = {}
        # By the same, what stays of those that cannot fit.
        self._too_large: dict[Any, float] = {}
        # The shortest step so far, which ways of recomputing some blocks have to beat.
        self._shortest = math.inf
        # The schedules and stages on each rank of the meshes that were chosen.
        self._chosen: dict[Mesh, tuple[str, int]] = {}
        if self.short is not None:
            self.blocks = sum(times + 2 for _, _, times in self.short.times)
            self.captured = replace(captured, graph=self.short.graph)
            self.graph = with_larger_hints(self.captured, options.tokens)
            repeats = find_repeats(self.graph).blocks
            # Blocks of the whole model are told by number, where the short one's are the same.
            every = len(find_repeats(captured.graph).blocks)
            left = sum(times - 1 for _, _, times in self.short.times)
            self._numbered = len(repeats) + left == every
            self._blocks = {
                node.name: number
                for number, block in enumerate(repeats)
                for node in self.graph.nodes[block.start : block.stop]
            }

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
        needs least where none does. None where there is no such pipeline, or no way to tell.

        inside: the mesh of the ranks of a stage. shares: of a pipeline of so many micro-batches,
        count. pins: layouts of parameters, by path, over micro-batches. options: with another
        schedule or number of stages on each rank than the estimator's.
        """
        options = options or self.options
        key = inside, shares, count, options.order, options.each_rank, tuple((pins or {}).items())
        if key not in self._estimates:
            asked = _Asked(inside, shares, count, pins or {}, options)
            found = self._estimated(asked)
            limit = options.memory_limit
            if found is not None and (limit is None or found.nbytes <= limit):
                self._shortest = min(self._shortest, found.seconds)
            self._estimates[key] = found
        return self._estimates[key]

    def _estimated(self, of: _Asked) -> Estimate | None:
        """Return the estimate, which is not known yet."""
        limit, asked = self.options.memory_limit, self.options.recompute
        if asked != "auto":
            return self._fitting(of, asked)
        tried: dict[int, Estimate | None] = {}

        def fits(place: int) -> bool:
            """Try a way to recompute; say whether it fits."""
            found = self._fitting(of, _MODES[place])
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
        return self._partly(of, best) if best is not None else None

    def _partly(self, of: _Asked, alike: Estimate) -> Estimate:
        """Return the best estimate with as many blocks recomputed less as fit.

        alike: the estimate with all blocks recomputed alike.
        """
        limit = self.options.memory_limit
        if limit is None or alike.nbytes > limit or not self._numbered:
            return alike
        if of.shares.ranks == 1:
            return alike  # without stages, the search within the limit chooses block by block
        # What shares most of what stays leaves most room for activations.
        best, price = alike, _PRICES[-1]
        place = _MODES.index(alike.recompute)
        # Where all blocks fit alike only in stages that take unequal times, a few of them that are
        # recomputed more leave room for equal ones.
        for fewer, more in pairwise(_MODES[max(place - 1, 0) : place + 2]):
            try:
                one = self._chain(of, fewer, price)
                # No cut is shorter than one into equal stages.
                least = one.seconds.sum() / of.shares.ranks * of.count
                if least >= min(self._shortest, best.seconds):
                    continue
                found = self._mixed(of, one, self._chain(of, more, price), fewer, more)
            except (PlanError, InfeasibleError, _TooLargeError):
                continue
            if found is not None and is_better(found, best, limit):
                best = replace(found, price=price)
        return best

    def _mixed(
        self, of: _Asked, one: StageChain, other: StageChain, fewer: str, more: str
    ) -> Estimate | None:
        """Return the estimate with some blocks as in a chain that recomputes fewer ops; None where
        none fits.
        """
        limit = self.options.memory_limit
        assert limit is not None
        starts = self._cut(of, other)
        ranks = ranks_of_stages(of.order)
        best: Estimate | None = None
        for in_turn in (False, True):
            found: Estimate | None = None
            mixes: list[tuple[str, ...]] = []
            for filled in _FILLED:
                room = limit * filled
                marked = most_saved(one, other, starts, of.most, ranks, room, in_turn)
                if not any(marked):
                    break
                mixes.append(tuple(fewer if each else more for each in marked))
                if found is None:
                    found = self._told(of, mixed(one, other, marked), starts, more)
            if found is not None and (best is None or is_better(found, best, limit)):
                best = replace(
                    found,
                    mixes=tuple(dict.fromkeys(mixes)),
                    starts=tuple(map(int, starts)),
                )
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

    def _fitting(self, of: _Asked, recompute: str) -> Estimate | None:
        """Return the estimate with one way to recompute; None where there is none.

        Where the quickest plan does not fit in the limit, bytes that stay are charged, so that
        ranks share more of what each would hold for itself.
        """
        limit = self.options.memory_limit
        best: Estimate | None = None
        for price in _PRICES:
            try:
                chain = self._chain(of, recompute, price)
                found = self._told(of, chain, self._cut(of, chain), recompute)
                found = replace(found, price=price)
            except _TooLargeError as error:
                found = Estimate(math.inf, error.nbytes, recompute, price=price)
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

    def _chain(self, of: _Asked, recompute: str, price: float) -> StageChain:
        """Return the ops of the whole model with one way to recompute. price: of all bytes that
        stay, as a share of the seconds of the quickest plan. Raises _TooLargeError where that is
        known to be too much without counting activations.
        """
        assert self.short is not None
        key = of.inside, of.shares.ranks, of.count, tuple(of.pins.items()), recompute, price
        if key in self._chains:
            return self._chains[key]
        if key in self._too_large:
            raise _TooLargeError(self._too_large[key])
        shares = of.shares
        options = replace(self.options, memory_limit=None, recompute=recompute)
        hardware = find_hardware(options.hardware)
        mesh = Mesh(**{MICROBATCH: of.count}, **dict(of.inside.axes))
        network, seen = self._network(mesh, options, shares)
        nodes = {node.target: node.name for node in self.graph.nodes if node.kind == "parameter"}
        pinned = {nodes[path]: pin for path, pin in of.pins.items() if path in nodes}
        solve, problem = NetworkSolver(network), network.problem(1.0, pinned)
        solution = solve(problem)
        if price:
            solution = Eased(recompute, price).solved(solve, problem, solution)
        plan = plan_of_solution(self.captured, "", mesh, network, solution, 1.0)
        work = StageWork(self.graph, plan)
        limit = self.options.memory_limit
        if limit is not None:
            each = stays_of(work, self.short, work.bytes_of(of.count, False)) / shares.ranks
            if each > limit:
                self._too_large[key] = each
                raise _TooLargeError(each)
        passes = passes_of_stage(plan, hardware)
        rows = sum(op.seconds for op in plan.ops) + sum(row.seconds for row in plan.conversions)
        updates = max(plan.seconds - rows, 0.0) / shares.once + passes.reduction
        sizes = work.bytes_of(of.count, self.options.memory_limit is not None, seen)
        link = link_of_stages(plan, shares.ranks, hardware)
        chain = chain_of(work, self.short, self._blocks, passes, updates, sizes, link)
        self._chains[key] = chain
        return chain

    def _cut(self, of: _Asked, chain: StageChain) -> NDArray[np.intp]:
        """Return where the stages of a chain start."""
        limit = self.options.memory_limit
        room = math.inf if limit is None else limit
        return np.array(chain.cut(of.most, ranks_of_stages(of.order), room))

    def _told(
        self, of: _Asked, chain: StageChain, starts: NDArray[np.intp], recompute: str
    ) -> Estimate:
        """Return the estimate of a chain whose stages start at these places."""
        ranks, stages = of.shares.ranks, len(of.most)
        ends = np.array([*starts[1:], len(chain.seconds)])

        def summed(each: NDArray[np.float64]) -> tuple[float, ...]:
            """Return the sum of each stage."""
            return tuple(map(float, np.add.reduceat(each, starts)))

        sent = [int(chain.nbytes[end]) for end in ends[:-1]]
        # Stages of several ranks go back in whole passes.
        alone = of.inside.world_size == 1
        pipeline = Pipeline(
            stages,
            ranks,
            of.count,
            of.options.order,
            (),
            summed(chain.seconds),
            (*sent, 0),
            0.0,
            summed(chain.forward),
            summed(chain.weights) if alone else (0.0,) * stages,
            summed(chain.once),
            (0, *sent),
        )
        sizes = chain.bytes.sizes(of.most)
        of_rank = [chain.bytes.besides] * ranks
        places = ranks_of_stages(of.order)
        for stage, rank in enumerate(places):
            size = float(sizes(stage, starts[stage], ends[stage]))
            of_rank[rank] += size - chain.bytes.besides
        if sum(map(len, of.order)) <= _MOST_PASSES:
            step = step_of(pipeline, passes_of(pipeline, chain.link))[0]
        else:
            step = _long_step(pipeline, places)
        kept = StageBytes(
            np.zeros_like(chain.bytes.stays), chain.bytes.kept, chain.bytes.buffers, (), 0.0
        ).sizes(of.most)
        saved = max(float(kept(n, starts[n], ends[n])) for n in range(stages))
        return Estimate(
            step,
            max(of_rank),
            recompute,
            saved,
            schedule=of.options.order,
            stages_per_rank=of.options.each_rank,
        )


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
