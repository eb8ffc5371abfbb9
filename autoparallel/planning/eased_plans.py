"""Plans that keep less than the quickest one, in ways found on a shorter model of equal blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoparallel.analysis.timeline import step_and_waits
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.repeated_blocks import find_repeats
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.network_solver import NetworkSolver
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.planning.ways_to_keep import mode_of, regathers
from autoparallel.strategy.build_network import rebuilt
from autoparallel.strategy.constraints import constrain
from autoparallel.strategy.cost_network import CostNetwork
from planners import InfeasibleError, OverLimitError, Problem, Solution

__all__ = ["Eased", "EasedPlans", "solved_or_refused"]

Solver = Callable[[Problem], Solution]


@dataclass(frozen=True, slots=True)
class Eased:
    """A way to keep less than the quickest plan does, found on a shorter model of the same blocks.

    recompute: the way to keep what all blocks alike and the ops around them need, as in
    `ways_to_keep`. price: what all bytes of parameters, gradients and the optimizer's state are
    charged, as a share of the seconds of the quickest plan. blocks: the way of each repeated block,
    in order; empty where all are alike. seconds: of the step, as
    it was estimated. starts: of the stages for which it was, as numbers of ops; empty where stages
    are cut as those of any plan.
    """

    recompute: str
    price: float
    blocks: tuple[str, ...] = ()
    seconds: float = math.inf
    starts: tuple[int, ...] = ()

    @property
    def keeps_less(self) -> bool:
        """True where it is another way than that of the quickest plan."""
        return self.recompute != "none" or self.price > 0

    def __str__(self) -> str:
        """Return how blocks are recomputed, in words."""
        if not self.blocks:
            return f"blocks recomputed alike: {self.recompute}"
        counts = Counter(self.blocks)
        each = (f"{counts[mode]} {mode}" for mode in sorted(counts))
        return f"blocks recomputed: {', '.join(each)}"

    def solved(self, solve: Solver, problem: Problem, quickest: Solution) -> Solution:
        """Return the solution of a problem, with these bytes charged. quickest: without.

        Example: `Eased("full", 0.1).solved(solver, problem, solver(problem))`
        """
        if not self.price or not quickest.usage:
            return quickest
        usage = quickest.usage
        for _ in range(2):
            price = self.price * quickest.cost / usage
            priced = solve(problem.weighed(price))
            kept = Solution.of(problem, priced.assignment, "", -math.inf).usage
            if kept >= usage:
                break
            usage = max(kept, 1.0)  # the price was a share of bytes that are not kept at it
        bound = min(quickest.lower_bound, problem.cost(priced.assignment))
        return Solution.of(problem, priced.assignment, priced.method, bound, price)


@dataclass
class EasedPlans:
    """Plans without a limit in which blocks are recomputed in a given way, with bytes charged.

    free: the network by `unlimited` options. alike: solutions with all blocks recomputed alike, by
    that way and the price.

    Example: `EasedPlans(captured, "GPT", network, {}).plan(Eased("selective", 0.1))`
    """

    captured: Captured
    model: str
    free: CostNetwork
    pins: Mapping[str, Layout]
    alike: dict[tuple[str, float], Solution] = field(default_factory=dict)

    def plan(self, eased: Eased) -> Plan:
        """Return the plan of one way.

        Where blocks are recomputed in several ways, layouts are those of the plan with all blocks
        in the one that keeps less. Planned by themselves, blocks that meet others might pass on
        larger tensors than equal blocks do, which no stage has room for; and what is little to
        recompute a block of as the one way lies may be much as the other does.
        """
        modes = tuple(map(mode_of, eased.blocks))
        mode = mode_of(eased.recompute)
        network = self._network(mode)
        if (mode, eased.price) not in self.alike:
            solve, problem = NetworkSolver(network), network.problem(1.0, self.pins)
            quickest = solved_or_refused(lambda: solve(problem))
            # Nothing is kept in another way without a limit, and the next network has no problem.
            self.alike[mode, eased.price] = replace(
                eased.solved(solve, problem, quickest),
                factor_alternatives=(),
                variable_alternatives=(),
            )
        solution = self.alike[mode, eased.price]
        if set(modes) - {mode}:
            network = self._network("auto", modes)
            problem = network.problem(1.0, self.pins)
            solution = Solution.of(
                problem, solution.assignment, solution.method, -math.inf, solution.multiplier
            )
        plan = plan_of_solution(
            self.captured, self.model, network.mesh, network, solution, 1.0,
            regathering=self._regathering(eased),
        )  # fmt: skip
        step, _ = step_and_waits(plan, network.hardware, network.shares.once)
        return replace(plan, step_seconds=step, memory_price=solution.multiplier)

    def _regathering(self, eased: Eased) -> frozenset[str]:
        """Return the ops that keep no copies that are gathered for them."""
        graph = self.free.graph
        names = {node.name for node in graph.calls} if regathers(eased.recompute) else set()
        for block, way in zip(find_repeats(graph).blocks, eased.blocks, strict=False):
            inside = {node.name for node in graph.nodes[block.start : block.stop]}
            names = names | inside if regathers(way) else names - inside
        return frozenset(names)

    def _network(self, recompute: str, blocks: Sequence[str] = ()) -> CostNetwork:
        """Return the network with blocks recomputed alike, or each in its way."""
        free = self.free
        if not blocks and recompute == free.options.recompute:
            return free
        network = rebuilt(free, replace(free.options, recompute=recompute), modes=blocks)
        constrain(network, self.captured)
        return network


def solved_or_refused(solve: Callable[[], Solution]) -> Solution:
    """Return a solution. Raises PlanError where there is none.

    Example: `solved_or_refused(lambda: solver(problem))`
    """
    try:
        return solve()
    except OverLimitError:
        raise
    except InfeasibleError as error:
        raise PlanError(
            "no plan is possible", why=str(error), fix="loosen the options or the pins"
        ) from error
