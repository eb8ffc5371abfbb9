"""Explanations: their costs are those of planning anew with the choice forced, proven on random
choices; their differences add up; and their texts say what a reader asks for.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from broad_cases import broad
from torch import nn

import autoparallel
from autoparallel import Mesh, make_plan
from autoparallel.analysis.memory import memory_of
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import MemoryLimitError, PlanError
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.placement import Invariant, Layout, Partial, Replicate, Shard
from autoparallel.plan import Conversion, Plan
from autoparallel.questions.explain import Explainer
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.train.models import GPT, GPTConfig
from planners import InfeasibleError, Problem, exact
from planners.state_costs import StateCosts

CHOICES = 50
# Without data parallelism products weigh more than their seconds until they are split.
OPTIONS = {"hardware": "dgx-a100", "data_parallel": False}


def plan_of(mesh: Mesh) -> Plan:
    """A plan of one block, whose sizes all differ."""
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=1, hidden=48, heads=6, vocabulary=60, positions=16, dropout=0))
    return make_plan(model, mesh=mesh, example_inputs=model.example_inputs(3, 8), **OPTIONS)


@pytest.fixture(scope="module", params=[Mesh(tp=2), Mesh(dp=2, tp=3)], ids=str)
def explainer(request: pytest.FixtureRequest) -> Explainer:
    """Of a plan on one and on two axes."""
    return Explainer(plan_of(request.param))


def network_of(plan: Plan) -> CostNetwork:
    """The cost network, built anew."""
    assert plan.captured is not None
    graph = with_larger_hints(plan.captured, plan.options.tokens)
    return build_network(graph, plan.mesh, find_hardware(plan.hardware), plan.options)


def least(problem: Problem, name: str, states: list[int]) -> float:
    """The cost of the best plan with a variable in one of these states, each solved by itself."""
    costs = [math.inf]
    for state in states:
        try:
            costs.append(exact.solve(problem.pinned({name: state})).cost)
        except InfeasibleError:
            continue
    return min(costs)


def some(test: Callable[[object], bool]) -> Callable[[Layout], bool]:
    """Whether a layout has such a placement on some axis."""
    return lambda layout: any(map(test, layout))


DEMANDS: dict[str, Callable[[Layout], bool]] = {
    "whole": lambda layout: all(isinstance(p, Invariant | Replicate) for p in layout),
    "split": some(lambda p: isinstance(p, Shard)),
    "split 0": some(lambda p: isinstance(p, Shard) and p.dim == 0),
    "split 1": some(lambda p: isinstance(p, Shard) and p.dim == 1),
    "P": some(lambda p: p == Partial()),
    "I": some(lambda p: p == Invariant()),
}


def test_costs_are_those_of_planning_anew(explainer: Explainer) -> None:
    """Random choices of ops and parameters, against solves that share nothing with each other."""
    plan = explainer.plan
    network = network_of(plan)
    problem = network.problem(plan.product_weight)
    draws, tried, priced = random.Random(0), 0, 0
    layouts = {
        **{p.name: [s.storage for s in network.storages[p.name]] for p in plan.parameters},
        **{op.name: [s.results[0] for s in network.strategies[op.name]] for op in plan.ops},
    }
    while tried < CHOICES // 2:
        name = draws.choice(list(layouts))
        demand = draws.choice(list(DEMANDS))
        states = [i for i, layout in enumerate(layouts[name]) if DEMANDS[demand](layout)]
        # What is chosen already costs nothing; solving many states one by one takes long.
        if not 0 < len(states) <= 12 or explainer.forcing.chosen[name] in states:
            continue
        tried += 1
        answer = explainer.explain(name, why_not=demand)
        assert answer.asked is not None
        wanted = least(problem, name, states) - plan.cost
        assert answer.asked.added_cost == pytest.approx(wanted, rel=1e-9, abs=1e-12 * plan.cost)
        priced += 0 < wanted < math.inf
    assert priced > CHOICES // 8


def test_differences_add_up(explainer: Explainer) -> None:
    """Whatever differs is told once: the rows sum to the difference of the plans' seconds."""
    plan = explainer.plan
    sent = f"collective {plan.conversions[0].value}"
    for subject in ("token_embedding.weight", "attention.projection", sent):
        answer = explainer.explain(subject)
        best = answer.alternatives[0]
        assert best.plan is not None
        assert best.added_cost >= -1e-12 * plan.cost
        assert best.proven <= best.added_cost
        seconds = sum(row.seconds for row in best.differences)
        assert seconds == pytest.approx(best.plan.seconds - plan.seconds, abs=1e-12 * plan.seconds)
        assert best.added_seconds == best.plan.seconds - plan.seconds
        # What is told of all alternatives by one pass is what a plan with it forced costs.
        assert [a.added_cost for a in answer.alternatives] == sorted(
            a.added_cost for a in answer.alternatives
        )


def test_a_redistribution_that_is_forbidden_is_gone(explainer: Explainer) -> None:
    """In both ways to do without it."""
    for row in explainer.plan.conversions[:4]:
        answer = explainer.explain(f"collective {row.value}")
        chosen = answer.subject.choice
        assert isinstance(chosen, Conversion)
        for other in answer.alternatives:
            if other.plan is not None:
                kept = {(c.value, c.target) for c in other.plan.conversions}
                assert (chosen.value, chosen.target) not in kept


def test_costs_equal_plans_with_pins() -> None:
    """The way that a user has without explanations: make_plan with the layout pinned."""
    plan = plan_of(Mesh(tp=2))
    explainer = Explainer(plan)
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=1, hidden=48, heads=6, vocabulary=60, positions=16, dropout=0))
    inputs = model.example_inputs(3, 8)
    for path, pin in (
        ("blocks.0.feed_forward.expand.weight", Shard(1)),
        ("token_embedding.weight", Invariant()),
    ):
        answer = explainer.explain(path, why_not=str(pin))
        assert answer.asked is not None
        pinned = make_plan(model, mesh=Mesh(tp=2), example_inputs=inputs, pins={path: pin},
                           product_weight=plan.product_weight, **OPTIONS)  # fmt: skip
        assert plan.cost + answer.asked.added_cost == pytest.approx(pinned.cost, rel=1e-9)


def test_it_says_what_a_reader_asks_for(explainer: Explainer) -> None:
    """Modules, lines, what was chosen, what it would cost, and by what."""
    text = str(explainer.explain("feed_forward.expand", why_not="row"))
    assert "in blocks.0.feed_forward.expand" in text
    assert "column-parallel" in text
    assert "  row: would cost +" in text
    assert "with all else planned anew" in text
    assert "reduce-scatter" in text
    assert "row, as it is" in str(explainer.explain("attention.projection", why_not="row"))
    # Asked of a weight, it is meant of the product that reads it.
    of_weight = explainer.explain("feed_forward.expand.weight", why_not="row")
    assert of_weight.asked is not None
    assert of_weight.asked == explainer.explain("feed_forward.expand", why_not="row").asked


def test_each_kind_of_subject_is_told_with_its_place(explainer: Explainer) -> None:
    """Of a parameter where it is read, of a collective where its value is made, of a module all
    that it takes; and of what is decided nothing about, that it is so.
    """
    plan, line = explainer.plan, r"\(\w+\.py:\d+\)"
    block = r"blocks\.0\.feed_forward"
    parameter = str(explainer.explain("feed_forward.expand.weight"))
    assert re.match(rf"{block}\.expand\.weight, read in {block}\.expand {line}, is ", parameter)
    op = next(op for op in plan.ops if op.target == "aten.gelu.default")
    assert re.match(rf"{op.name} in {op.where} {line} makes ", str(explainer.explain(op.name)))
    made = next(row for row in plan.conversions if row.value in explainer.words.producers)
    sent = str(explainer.explain(f"collective {made.value}"))
    assert re.match(rf"{made.value}, made( in [\w.]+)? {line}, is .+ → .+ of a step\.", sent)
    module = str(explainer.explain("feed_forward"))
    assert re.match(rf"{block} takes .+ of a step: \d+ ops, and \d+ redistribution", module)
    inside = [op for op in plan.ops if f"{op.where}.".startswith("blocks.0.feed_forward.")]
    assert f": {len(inside)} ops, " in module.splitlines()[0]
    with pytest.raises(PlanError, match="nothing is decided about input_ids"):
        explainer.explain("input_ids")


def test_the_chain_leads_to_what_costs_most(explainer: Explainer) -> None:
    """From the decision on, each op with its module and line; parameters by their paths."""
    plan = explainer.plan
    chains = 0
    for subject in ("feed_forward.expand", "attention.projection", "token_embedding.weight"):
        answer = explainer.explain(subject)
        for other in answer.alternatives[:1]:
            dearer = [row for row in other.differences if row.seconds > 0 and row.kind != "update"]
            if not dearer:
                continue
            goal = max(dearer, key=lambda row: row.seconds).name
            paths = {one.name: one.path for one in (*plan.parameters, *plan.inputs)}
            named = [paths.get(name, name) for name in other.chain]
            assert named[-1] == goal
            assert other.chain[0] == answer.subject.node
            told = [line for line in str(answer).splitlines() if re.match(" +(→|forced)", line)]
            assert (not told) == (len(named) == 1)
            assert all(re.search(r"\.py:\d+\)$|[\w.]+\.\w+$| more$", line) for line in told)
            chains += len(named) > 1
    assert chains


@pytest.fixture(scope="module", params=["Sequential", *broad("GPT")])
def limited(request: pytest.FixtureRequest) -> Explainer:
    """Of a plan that has to give way to its memory limit."""
    with torch.device("meta"):
        if request.param == "GPT":
            model = GPT(GPTConfig(1, 768, 12, vocabulary=6000, positions=128, dropout=0))
            inputs, limit = model.example_inputs(8, 128), 100_000_000
        else:
            model, inputs, limit = three_layers(), torch.ones(64, 256), 2_700_000
    plan = make_plan(
        model,
        mesh=Mesh(dp=2, tp=2),
        example_inputs=inputs,
        hardware="dgx-a100",
        memory_limit=limit,
    )
    assert plan.memory_price > 0
    assert Plan.from_json(plan.to_json()).memory_price == plan.memory_price
    return Explainer(plan)


def three_layers() -> nn.Module:
    first, second, last = (nn.Linear(*pair) for pair in pairwise((256, 1024, 256, 64)))
    return nn.Sequential(first, nn.GELU(), second, nn.LayerNorm(256), last)


# What is asked of a model, and why it is not otherwise.
ASKED = {
    "Sequential": [("linear", "split 0 on tp"), ("0.weight", "whole")],
    "GPT": [("feed_forward.expand", "split 0 on tp"), ("token_embedding.weight", "whole")],
}


@pytest.mark.parametrize("number", range(2))
def test_at_the_price_of_memory(number: int, limited: Explainer) -> None:
    """Nothing that is searched within the limit costs less than the bound; what costs less takes
    more bytes than there are.
    """
    subject, why_not = ASKED[limited.plan.model][number]
    both = [limited.explain(subject, why_not=why_not, search=search) for search in (False, True)]
    quick, searched = (answer.asked for answer in both)
    charged = ["Memory is charged at" in str(answer) for answer in both]
    assert charged == [True, False]
    assert quick is not None
    assert searched is not None
    slack = 1e-9 * limited.plan.cost
    assert quick.proven <= searched.added_cost + slack
    # So it is of those that one pass has told.
    told = {other.text: other for other in both[1].alternatives}
    common = [other for other in both[0].alternatives if other.text in told]
    assert common
    assert all(other.proven <= told[other.text].added_cost + slack for other in common)
    assert quick.proven <= quick.added_cost
    assert quick.plan is not None
    memory = sum(nbytes for _, nbytes in memory_of(quick.plan, graph=limited.plan.graphs[0]).rows)
    assert limited.plan.memory_limit is not None
    assert quick.excess_nbytes == max(memory - limited.plan.memory_limit, 0)


def test_searched_alternatives_are_plans_within_the_limit() -> None:
    """All of their memory is, and not what the tables count alone; or they say by how much not.

    The limit leaves little beside the plan that takes least, so that some are within it.
    """
    with torch.device("meta"):
        model = three_layers()
    asked = {"mesh": Mesh(dp=2, tp=2), "example_inputs": torch.ones(64, 256)}
    with pytest.raises(MemoryLimitError) as refused:
        make_plan(model, **asked, memory_limit=1000)
    limit = int(1.03 * refused.value.least)
    plan = make_plan(model, **asked, memory_limit=limit)
    answers = [Explainer(plan).explain(name, search=True) for name in ("linear_2", "0.weight")]
    told = [other for answer in answers for other in answer.alternatives if other.plan is not None]
    assert told
    for other in told:
        assert other.plan is not None
        taken = memory_of(other.plan, graph=plan.graphs[0]).total
        assert other.excess_nbytes == max(taken - limit, 0)
        # What is within the limit and costs less would be the plan, or its step is longer.
        if other.added_cost < -1e-9 * plan.cost and not other.excess_nbytes:
            assert other.added_step > 0
    assert not all(other.excess_nbytes for other in told)


def test_costs_at_the_price_are_optima(limited: Explainer) -> None:
    """Of all alternatives at once, against a solve for each."""
    forcing = limited.forcing
    problem = forcing.problem.weighed(limited.plan.memory_price)
    own = problem.cost(forcing.chosen)
    weight = {"GPT": "p_token_embedding_weight", "Sequential": "p_2_weight"}
    for name in (weight[limited.plan.model], "linear_2_product"):
        answer = limited.explain(name)
        variable = problem.variable(name)
        each = []
        for state in range(variable.size):
            try:
                each.append(exact.solve(problem.pinned({name: state})).cost - own)
            except InfeasibleError:
                each.append(math.inf)
        for other in answer.alternatives:
            assert min(abs(other.added_cost - cost) for cost in each) <= 1e-9 * own


def test_of_a_wide_network_a_few_decisions_are_held() -> None:
    """What is told is a plan, and a bound that is none too high."""
    plan = plan_of(Mesh(tp=2))
    quick = Explainer(plan)
    costs = StateCosts(quick.forcing.priced, quick.forcing.chosen, max_table_entries=40)
    quick.forcing.costs = costs
    true = Explainer(plan)
    proven = 0
    for name in ("linear_2_product", "p_token_embedding_weight"):
        told = quick.explain(name)
        right = {other.text: other for other in true.explain(name).alternatives}
        assert costs.held
        for other in told.alternatives:
            assert other.proven <= other.added_cost
            if other.text in right:
                slack = 1e-9 * plan.cost
                assert other.proven - slack <= right[other.text].added_cost
                assert right[other.text].added_cost <= other.added_cost + slack
                proven += other.proven > 0
    assert proven


@pytest.mark.parametrize(
    ("subject", "why_not", "message"),
    [
        ("feed_forwad.expand", "", "did you mean"),
        ("feed_forward.expand", "diagonal", "is no choice"),
        ("feed_forward.expand", "row on pp", "no axis 'pp'"),
        ("collective nothing", "", "redistributes no value"),
        ("collective", "row", "in place of a redistribution"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    subject: str, why_not: str, message: str, explainer: Explainer
) -> None:
    """With what could have been meant."""
    if subject == "collective":
        subject = f"collective {explainer.plan.conversions[0].value}"
    with pytest.raises(PlanError, match=message):
        explainer.explain(subject, why_not=why_not)


def test_a_plan_without_its_graph_is_refused_until_it_is_traced() -> None:
    """A plan that was read; traced_plan gives it its graph."""
    model, inputs = nn.Linear(8, 8), torch.ones(4, 8)
    plan = Plan.from_json(make_plan(model, 2, example_inputs=inputs).to_json())
    with pytest.raises(PlanError, match="has no graph"):
        autoparallel.explain(plan, "weight")
    traced = autoparallel.traced_plan(model, plan, example_inputs=inputs)
    assert autoparallel.explain(traced, "weight").kind == "parameter"
