"""Chains of the ops of a whole model, planned on a model with few of its equal blocks.

Equal blocks are planned alike. So a model with three of them is planned for each mesh of a stage,
number of micro-batches and way to keep activations, and what its second block takes is repeated as
often as the block is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.observed_runs import Seen
from autoparallel.analysis.pipeline_step import link_of_stages
from autoparallel.analysis.timeline import passes_of_stage
from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.captured import Captured
from autoparallel.graph.repeated_blocks import find_repeats
from autoparallel.graph.shortened import Shortened
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import MICROBATCH, Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Pipeline, Plan
from autoparallel.planning.eased_plans import Eased
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.schedule_figures import ScheduleFigures, figures_of, shares_of
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.planning.stage_chain import StageChain, chain_of, stays_of
from autoparallel.planning.stage_work import StageWork
from autoparallel.planning.ways_to_keep import mode_of, regathers
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.stage_shares import StageShares
from planners import Alternative, Factor, Problem, Solution, Variable
from planners.table_memo import Memo

__all__ = ["Asked", "ShortChains", "TooLargeError"]

# What stays in one way is too much in the others if it is so many times the limit.
_FAR = 2.0


class TooLargeError(Exception):
    """The error that what stays takes more than all ranks have.

    nbytes: of each rank, if they share it evenly.
    """

    def __init__(self, nbytes: float) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


@dataclass(frozen=True)
class Asked:
    """The figures of an estimate: see `Estimator.estimate`."""

    inside: Mesh
    shares: StageShares
    count: int
    pins: Mapping[str, Layout]
    options: Options

    @property
    def alone(self) -> bool:
        """True where stages have one rank each: those of several go back in whole passes."""
        return self.inside.world_size == 1

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline, of which nothing is told yet that its cuts decide."""
        ranks, each = self.shares.ranks, self.options.each_rank
        return Pipeline(ranks * each, ranks, self.count, self.options.order, (), (), (), 0.0)

    @property
    def schedule(self) -> ScheduleFigures:
        """The figures of its schedule."""
        options = self.options
        return figures_of(options.order, self.shares.ranks, options.each_rank, self.count)


class ShortChains:
    """The chains of one model. captured: as micro-batches compute it. short: with few blocks.

    graph: of the short model, with the sizes planned for. blocks: the number of blocks in chains.
    numbered: whether blocks of the whole model are told by number, where the short one's are the
    same.
    """

    def __init__(self, captured: Captured, short: Shortened, options: Options) -> None:
        self.options, self.short = options, short
        # Networks of one mesh by mode, what calls save on it, and the network that was built last.
        self._of: tuple[Any, ...] = ()
        self._networks: dict[str, CostNetwork] = {}
        self._solvers: dict[str, tuple[NetworkSolver, Problem]] = {}
        self._seen: Seen = {}
        self._memo = Memo()
        self._last: CostNetwork | None = None
        # By mesh, numbers and the way to keep: stages on each rank and schedules differ in cuts and
        # passes alone.
        self._chains: dict[Any, StageChain] = {}
        # By the same, and of any way, what stays of those that cannot fit.
        self._too_large: dict[Any, float] = {}
        # Solutions, which do not depend on what is gathered again.
        self._solutions: dict[Any, Solution] = {}
        self.blocks = sum(times + 2 for _, _, times in short.times)
        self.captured = replace(captured, graph=short.graph)
        self.graph = with_larger_hints(self.captured, options.tokens)
        repeats = find_repeats(self.graph).blocks
        every = len(find_repeats(captured.graph).blocks)
        left = sum(times - 1 for _, _, times in short.times)
        self.numbered = len(repeats) + left == every
        places = {node.name: place for place, node in enumerate(self.graph.nodes)}
        # What is read first in a block, and the way to recompute it, lie a little before it.
        self._spans = [
            (places[first] - 0.75, places[last] + 0.25, number)
            for first, last, number in short.chains
        ]
        self._blocks = {
            node.name: number
            for number, block in enumerate(repeats)
            for node in self.graph.nodes[block.start : block.stop]
        }

    def chain(self, of: Asked, way: str, price: float, layouts: str = "") -> StageChain:
        """Return the ops of the whole model in one of the ways to keep.

        price: of all bytes that stay, as a share of the seconds of the quickest plan. layouts: the
        mode of recomputation that tensors lie as planned for; by default that of the way.
        Raises TooLargeError where that is known to be too much without counting activations.
        """
        layouts = layouts or mode_of(way)
        key = *_key(of), way, price, layouts
        if key in self._chains:
            return self._chains[key]
        # What stays is much alike in all ways.
        largest = self._too_large.get((*_key(of), price), 0.0)
        if key in self._too_large or largest > _FAR * (self.options.memory_limit or math.inf):
            raise TooLargeError(self._too_large.get(key, largest))
        if layouts != mode_of(way) and self._lie_alike(of, layouts, mode_of(way), price):
            return self.chain(of, way, price)
        plan = self._plan(of, way, price, layouts)
        if regathers(way) and not any(row.again for row in plan.conversions):
            chain = self._chains[key] = self.chain(of, mode_of(way), price, layouts)
            return chain
        shares, limit = of.shares, self.options.memory_limit
        work = StageWork(self.graph, plan)
        if limit is not None:
            each = stays_of(work, self.short, work.bytes_of(activations=False)) / shares.ranks
            if each > limit:
                self._too_large[key] = self._too_large[*_key(of), price] = each
                raise TooLargeError(each)
        hardware = find_hardware(self.options.hardware)
        passes = passes_of_stage(plan, hardware)
        rows = sum(op.seconds for op in plan.ops) + sum(row.seconds for row in plan.conversions)
        updates = max(plan.seconds - rows, 0.0) / self._shares(of).once + passes.reduction
        sizes = work.bytes_of(limit is not None, self._seen)
        link = link_of_stages(plan, shares.ranks, hardware)
        chain = chain_of(work, self.short, self._blocks, passes, updates, sizes, link)
        self._chains[key] = chain
        return chain

    def _plan(self, of: Asked, way: str, price: float, layouts: str) -> Plan:
        """Return the plan of the short model. way, price, layouts: as of `chain`."""
        solution, network = self._solved(of, layouts, price)
        if layouts != mode_of(way):
            # States of tensors are the same, whatever is recomputed.
            network = self._network(of, mode_of(way))
        every = (node.name for node in self.graph.calls if regathers(way))
        return plan_of_solution(
            self.captured, "", network.mesh, network, solution, 1.0, regathering=frozenset(every)
        )

    def _lie_alike(self, of: Asked, one: str, other: str, price: float) -> bool:
        """Return whether tensors lie alike as planned for two modes of recomputation."""
        assignments = [self._solved(of, mode, price)[0].assignment for mode in (one, other)]
        return assignments[0] == assignments[1]

    def _solved(self, of: Asked, mode: str, price: float) -> tuple[Solution, CostNetwork]:
        """Return the solution for a mode of recomputation and its network. price: as of `chain`."""
        network = self._network(of, mode)
        key = *_key(of), mode, price
        if key not in self._solutions:
            if mode not in self._solvers:
                nodes = {
                    node.target: node.name for node in self.graph.nodes if node.kind == "parameter"
                }
                pinned = {nodes[path]: pin for path, pin in of.pins.items() if path in nodes}
                # It remembers tables, which problems of other prices have as well.
                problem = self._as_whole(network, network.problem(1.0, pinned))
                self._solvers[mode] = NetworkSolver(network, memo=self._memo), problem
            solve, problem = self._solvers[mode]
            if price:
                quickest, _ = self._solved(of, mode, 0.0)
                solution = Eased(mode, price).solved(solve, problem, quickest)
            else:
                solution = solve(problem)
            # Nothing is kept in another way without a limit, and the next network has no problem.
            self._solutions[key] = replace(
                solution, factor_alternatives=(), variable_alternatives=()
            )
        return self._solutions[key], network

    def _as_whole(self, network: CostNetwork, problem: Problem) -> Problem:
        """Return a problem of the short model in which its blocks count as all of the whole model.

        Without that, what is around the blocks, which stands once, would choose how tensors lie in
        each of them.
        """
        shares = dict.fromkeys(problem.names, 1.0)
        for start, stop, number in self._spans:
            inside = (name for name in shares if start <= network.position(name) < stop)
            shares.update(dict.fromkeys(inside, number))
        return _counted(problem, shares)

    def _network(self, of: Asked, mode: str) -> CostNetwork:
        """Return the cost network of the short model for a mode of recomputation."""
        options = replace(self.options, memory_limit=None, recompute=mode)
        mesh, shares = Mesh(**{MICROBATCH: of.count}, **dict(of.inside.axes)), self._shares(of)
        if self._of != _key(of):
            # Networks that differ in what is recomputed alone are kept beside each other.
            self._of, self._networks, self._solvers, self._seen = _key(of), {}, {}, {}
            self._memo = Memo()
        if mode not in self._networks:
            hardware, part = find_hardware(options.hardware), self.captured.part
            known = build_network(
                self.graph, mesh, hardware, options, None, part, shares, self._last
            )
            constrain(known, self.captured)
            self._last = self._networks[mode] = known
        return self._networks[mode]

    def _shares(self, of: Asked) -> StageShares:
        """Return what a micro-batch bears in networks: as with the stages on a rank that are asked
        for, whatever their number is in the estimate, as more change it by next to nothing.
        """
        options = replace(of.options, stages_per_rank=self.options.stages_per_rank)
        shares = shares_of(of.shares.ranks, of.count, options)
        return replace(shares, in_parts=of.shares.in_parts)


def _key(of: Asked) -> tuple[Any, ...]:
    """Return what solutions depend on, of the figures of an estimate."""
    shares, order = of.shares, of.options.order
    return of.inside, shares.ranks, shares.in_parts, of.count, order, tuple(of.pins.items())


def _counted(problem: Problem, shares: Mapping[str, float]) -> Problem:
    """Return a problem in which tables count several times: those of a variable as its share says,
    those over several variables as the least of theirs.
    """
    known: dict[tuple[int, float], NDArray[np.float64]] = {}

    def times(table: NDArray[np.float64], share: float) -> NDArray[np.float64]:
        """Return so many times a table; those that are shared stay shared."""
        if share == 1.0:
            return table
        if (id(table), share) not in known:
            known[id(table), share] = table * share
        return known[id(table), share]

    def ways(item: Variable | Factor, share: float) -> list[Alternative]:
        """Return the ways to pay for a table, so many times."""
        return [
            Alternative(
                times(way.cost, share), None if way.usage is None else times(way.usage, share)
            )
            for way in item.prices.ways
        ]

    variables, factors = [], []
    for variable in problem.variables:
        own, *others = ways(variable, shares[variable.name])
        variables.append(Variable(variable.name, own.cost, own.usage, tuple(others)))
    for factor in problem.factors:
        own, *others = ways(factor, min(shares[name] for name in factor.scope))
        factors.append(Factor(factor.scope, own.cost, own.usage, tuple(others)))
    return Problem(tuple(variables), tuple(factors))
