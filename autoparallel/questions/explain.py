"""Explanations: what was decided, the best alternative, what it would cost, and what forces it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Node
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan
from autoparallel.questions.demands import demanded, names_product
from autoparallel.questions.differences import (
    Choice,
    Difference,
    choice_text,
    differences,
)
from autoparallel.questions.explanation import Alternative, Explanation
from autoparallel.questions.forcing import Forcing
from autoparallel.questions.subjects import find_subject
from autoparallel.rewrite.stages import stages_of_calls
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.view.words import Words

__all__ = ["Alternative", "Explainer", "Explanation", "explain"]

# Alternatives that are told, and those that are solved one by one where no pass over the network
# tells the costs of all.
_TOLD = 4
_SOLVED = 2


def stages_of_ops(plan: Plan) -> dict[str, str]:
    """Return which stage computes each op of a plan with stages, in words; empty for another.

    Example: `stages_of_ops(plan)["linear_3"]` is "stage 1 of 2"
    """
    if plan.pipeline is None or plan.captured is None:
        return {}
    places = stages_of_calls(plan.captured.graph, plan.pipeline.starts)
    return {name: f"stage {stage} of {plan.pipeline.stages}" for name, stage in places.items()}


def explain(plan: Plan, subject: str, *, why_not: str = "", search: bool = False) -> Explanation:
    """Return why one decision of a plan is as it is: the alternatives, and what each would cost.

    plan: of make_plan; one that was read has no graph, which traced_plan gives it. subject: the
    path of a parameter or of a module, the name of an op or a value, or "collective VALUE"; of a
    path its end is enough. why_not: an alternative to be told first: "row", "column", "whole",
    "split 1", a placement, "on AXIS" behind it. Each alternative is the best plan with that choice
    forced and everything else planned anew, so that its cost is what the choice really costs.
    search: under a memory limit, each alternative is told with bytes charged at the price at which
    the plan's own search has ended, and with a bound on its cost within the limit. True looks for
    its best plan within the limit, which takes as long as planning.
    Of a plan with stages, costs are those of one micro-batch on all stages, and each alternative is
    cut into stages anew, so that what its step would take is told.
    For many questions about one plan, `Explainer` shares the work.

        >>> import autoparallel, torch
        >>> layers = [torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)]
        >>> model, inputs = torch.nn.Sequential(*layers), torch.ones(8, 64)
        >>> plan = autoparallel.make_plan(model, 2, example_inputs=inputs, hardware="dgx-a100")
        >>> why = autoparallel.explain(plan, "0.weight")
        >>> why.chosen, why.alternatives[0].text, why.alternatives[0].added_cost > 0
        ('S(0), column: output dim', 'I', True)

    Raises PlanError where nothing is called so, for an alternative that is none, and for a plan
    without its graph.
    """
    return Explainer(plan).explain(subject, why_not=why_not, search=search)


class Explainer:
    """An Explainer answers questions about one plan; equal parts of them are computed once.

    plan: see `explain`, as for the errors.

    >>> import autoparallel, torch
    >>> layer, inputs = torch.nn.Linear(64, 64, bias=False), torch.ones(8, 64)
    >>> explainer = Explainer(autoparallel.make_plan(layer, 2, example_inputs=inputs))
    >>> explainer.explain("weight", why_not="split 1").asked.added_cost >= 0
    True
    """

    def __init__(self, plan: Plan) -> None:
        require_kind(plan, Plan, MAKE_ONE)
        self.forcing = Forcing(plan)
        # Of a plan with stages, decisions are those of one micro-batch on all of them.
        self.plan, self.step = self.forcing.plan, plan.step_seconds
        self.stages = stages_of_ops(plan)
        self.words = Words(self.plan)
        self.search = False

    def explain(self, subject: str, *, why_not: str = "", search: bool = False) -> Explanation:
        """Return the explanation of one decision; see the function `explain`."""
        self.search = search
        about = find_subject(self.plan, subject)
        if names_product(why_not) and isinstance(about.choice, ParameterChoice):
            # A weight is split by row or column in the product that reads it.
            about = replace(about, choice=self._product_of(about.choice))
        choice = about.choice
        asked: Alternative | None = None
        if isinstance(choice, Conversion):
            if why_not not in ("", "none", "whole"):
                raise PlanError(
                    f"{why_not!r} in place of a redistribution",
                    fix='say "none": what a plan without it would cost is told',
                )
            alternatives = self._without(choice)
            kind, seconds = "redistribution", choice.seconds
        else:
            node = next(n for n in self.forcing.network.graph.nodes if n.name == choice.name)
            alternatives = self._others(node, choice)
            if why_not:
                mask = demanded(self.forcing.network, node, why_not)
                asked = self._asked(node, choice, why_not, mask)
                labels = self._labels(node, choice)
                told = {label for label, one in zip(labels, mask, strict=True) if one}
                alternatives = [other for other in alternatives if other.text not in told]
            kind = "op" if isinstance(choice, OpChoice) else "parameter"
            seconds = choice.seconds if isinstance(choice, OpChoice) else 0.0
        text = choice_text(self.words, choice)
        price = 0.0 if search else self.forcing.price
        shown = tuple(alternatives[:_TOLD])
        stage = self.stages.get(choice.name, "") if isinstance(choice, OpChoice) else ""
        return Explanation(self.plan, about, kind, text, seconds, shown, asked, price, stage)

    def _product_of(self, parameter: ParameterChoice) -> OpChoice | ParameterChoice:
        """Return the product that reads a parameter; itself where there is none."""
        readers = (op for op in self.plan.ops if parameter.name in op.reads and op.whole_flops)
        return next(readers, parameter)

    def _asked(
        self, node: Node, choice: Choice, why_not: str, mask: NDArray[np.bool_]
    ) -> Alternative:
        """Return the best plan in which a decision is as a user names it. mask: such states."""
        if mask[self.forcing.chosen[node.name]]:
            return Alternative(f"{why_not}, as it is", 0.0, 0.0)
        return self._forced(why_not, node.name, choice, {node.name: mask})

    def _others(self, node: Node, choice: OpChoice | ParameterChoice) -> list[Alternative]:
        """Return the alternatives of an op or a parameter, the cheapest first, that one with its
        plan. States that read alike are one alternative.
        """
        labels = self._labels(node, choice)
        chosen = labels[self.forcing.chosen[node.name]]
        groups: dict[str, NDArray[np.bool_]] = {
            label: np.array([other == label for other in labels])
            for label in dict.fromkeys(labels)
            if label != chosen
        }
        costs = self.forcing.state_costs(node.name)
        if costs is None or (self.search and self.forcing.problem.limit is not None):
            # The cheapest by themselves are looked at first; each takes a search of its own.
            own = self.forcing.problem.variable(node.name).unary if costs is None else costs.most
            first = sorted(groups, key=lambda label: float(np.min(own[groups[label]])))
            priced = [
                self._forced(label, node.name, choice, {node.name: groups[label]})
                for label in first[:_SOLVED]
            ]
            return sorted(priced, key=lambda other: other.added_cost)
        priced = []
        for label, mask in groups.items():
            bound = self.forcing.proven({node.name: mask}) - self.plan.cost
            added = float(costs.most[mask].min()) - self.forcing.own_cost
            priced.append(Alternative(label, added, min(bound, added)))
        priced.sort(key=lambda other: (other.added_cost, other.proven))
        if priced and priced[0].added_cost < math.inf:
            label = priced[0].text
            priced[0] = self._forced(label, node.name, choice, {node.name: groups[label]})
        return priced

    def _labels(self, node: Node, choice: OpChoice | ParameterChoice) -> list[str]:
        """Return each state of an op or a parameter in words."""
        network = self.forcing.network
        if isinstance(choice, ParameterChoice):
            return [self.words.stored(way) for way in network.storages[node.name]]
        return [
            choice_text(
                self.words,
                replace(choice, operands=j.operands, results=j.results, kernels=j.kernels),
            )
            for j in network.strategies[node.name]
        ]

    def _without(self, choice: Conversion) -> list[Alternative]:
        """Return the two ways to do without a redistribution, the cheaper first."""
        ways = (self.forcing.made_as(choice), self.forcing.never_read_as(choice))
        found = []
        for text, allowed in zip(self.words.without(choice), ways, strict=True):
            if allowed is None:
                found.append(Alternative(text, math.inf, math.inf))
            else:
                found.append(self._forced(text, choice.value, choice, allowed))
        return sorted(found, key=lambda other: other.added_cost)

    def _forced(
        self, text: str, node: str, choice: Choice, allowed: Mapping[str, NDArray[np.bool_]]
    ) -> Alternative:
        """Return the best plan in the allowed states, with all in which it differs."""
        solution = self.forcing.solve(allowed, self.search)
        if solution is None:
            return Alternative(text, math.inf, math.inf)
        plan = self.forcing.plan_of(solution)
        rows = differences(self.plan, plan)
        added = solution.cost - self.plan.cost
        if self.plan.memory_limit is not None and not self.search:
            charged = solution.cost + self.forcing.price * solution.usage
            added = charged - self.forcing.own_cost
        return Alternative(
            text,
            added,
            min(solution.lower_bound - self.plan.cost, added),
            plan,
            plan.seconds - self.plan.seconds,
            rows,
            _chain(self.plan, node, rows),
            self.forcing.excess(plan),
            self._added_step(plan),
        )

    def _added_step(self, plan: Plan) -> float:
        """Return what another plan's step takes longer, NaN where this one's is not known."""
        if not self.step or self.plan.product_weight != 1.0:
            return math.nan
        try:
            return self.forcing.step_of(plan) - self.step
        except PlanError:  # it cannot be cut into so many stages
            return math.inf


def _chain(plan: Plan, start: str, rows: tuple[Difference, ...]) -> tuple[str, ...]:
    """Return the names of the ops from a decision to the one that adds most to the step.

    start: the name of an op, a parameter or a value. The way is the shortest in the dataflow, in
    either direction. Empty where nothing adds anything, or the two are not connected.
    """
    dearer = [row for row in rows if row.seconds > 0 and row.kind != "update"]
    if not dearer:
        return ()
    goal = max(dearer, key=lambda row: row.seconds).name
    # Parameters and inputs are told by the names that users know.
    users = {parameter.path: parameter.name for parameter in plan.parameters}
    users |= {item.path: item.name for item in plan.inputs if item.path}
    goal = users.get(goal, goal)
    around: dict[str, dict[str, None]] = {}
    for op in plan.ops:
        for value in (*op.reads, *op.makes):
            around.setdefault(op.name, {})[f"={value}"] = None
            around.setdefault(f"={value}", {})[op.name] = None
    begin = start if start in around else f"={start}"
    ends = {goal, f"={goal}"}
    before: dict[str, str] = {begin: ""}
    waiting = deque([begin])
    while waiting:
        here = waiting.popleft()
        if here in ends:
            path = [here]
            while before[path[-1]]:
                path.append(before[path[-1]])
            names = [name.removeprefix("=") for name in reversed(path)]
            return tuple(dict.fromkeys(names))
        for other in around.get(here, ()):
            if other not in before:
                before[other] = here
                waiting.append(other)
    return ()
