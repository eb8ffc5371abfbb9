"""A part of what a limited search looks at: the problem with some variables pinned.

Where one variable decides for all layers together, the search has a branch for each of its states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planners.charged_solutions import Told
from planners.problem import Problem
from planners.solution import Solution

__all__ = ["Branch"]


@dataclass
class Branch:
    """A branch of the search: the problem with some variables pinned.

    pins: their states, by name. bound: no assignment of the branch costs less. multiplier: the best
    one known for the branch. ends: the solutions whose lines meet at that multiplier, one over and
    one within the limit. possible: per variable, the states that are not forbidden; None for all.
    most: no bound of the branch exceeds this, as states that cost more may be forbidden. charged:
    solutions of the problem with usage charged.
    """

    problem: Problem
    pins: dict[str, int]
    bound: float
    multiplier: float = 0.0
    ends: tuple[Solution, ...] = field(default=())
    possible: dict[str, NDArray[np.bool_]] | None = None
    most: float = math.inf
    charged: dict[Told, Solution] = field(default_factory=dict)

    def holds(self, solution: Solution) -> bool:
        """Say whether the branch has the solution's assignment."""
        states = solution.assignment
        return all(states[name] == state for name, state in self.pins.items()) and (
            self.possible is None or all(self.possible[name][s] for name, s in states.items())
        )

    def raise_bound(self, bound: float) -> None:
        """Take a lower bound on the branch's problem for the branch, if it is a better one."""
        self.bound = max(self.bound, min(bound, self.most))

    def children(self, whole: Problem) -> list[Branch]:
        """Return a branch for each state of a variable that reaches through much of the model.

        whole: the problem without pins, in whose order of variables reach is measured. Such a
        variable, a tied embedding say, decides for all layers at once, so that the solutions at
        both ends differ in it and none in between exists. Returns no branches where there is none.
        """
        if len(self.ends) < 2:
            return []
        one, two = (solution.assignment for solution in self.ends)
        names = whole.names
        tables, reach = [0] * len(names), [0] * len(names)
        for scope in whole.scopes():
            for place in scope:
                tables[place] += 1
                reach[place] = max(reach[place], *(abs(place - other) for other in scope))
        hubs = [
            place
            for place, name in enumerate(names)
            if 2 * reach[place] >= len(names) and one[name] != two[name] and name not in self.pins
        ]
        if not hubs:
            return []
        hub = names[max(hubs, key=lambda place: tables[place])]
        children = []
        for state in range(whole.variable(hub).size):
            pins = {**self.pins, hub: state}
            pinned = self.problem.pinned({hub: state})
            children.append(
                Branch(pinned, pins, self.bound, possible=self.possible, most=self.most)
            )
        return children
