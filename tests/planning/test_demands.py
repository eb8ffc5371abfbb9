"""What users demand of a plan: constraints, a memory limit, a mesh, a plan to begin with."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from broad_cases import broad

import autoparallel
from autoparallel import Mesh
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import MemoryLimitError, PlanError
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import arrangements
from autoparallel.placement import Invariant, Replicate, Shard
from autoparallel.plan import Plan
from autoparallel.planning import memory_advice
from autoparallel.planning.solution_to_plan import solution_of_plan
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.support.units import bytes_text, parse_bytes
from autoparallel.train.models import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_trace")
MESH = Mesh(dp=2, tp=2)


def planned(mesh: Mesh | str = MESH, batch: int = 256, layers: int = 2, **options: Any) -> Plan:
    """A plan of a GPT, for a batch of 32 tokens each."""
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=layers, hidden=64, heads=4, vocabulary=256, positions=32))
        inputs = model.example_inputs(batch=batch)
    return autoparallel.make_plan(
        model, mesh=mesh, example_inputs=inputs, hardware="dgx-a100", **options
    )


@pytest.fixture(scope="module")
def free(one_trace: None) -> Plan:
    """The plan without demands."""
    return planned()


def test_constraints_are_kept(free: Plan) -> None:
    """By parameter, by axis, by dim; in no shorter step than any can have."""
    plan = planned(
        constraints=["blocks.*.feed_forward.expand.weight on tp is S(0)", "* on dp is not split 1"]
    )
    assert plan.step_seconds >= free.step_bound * (1 - 1e-12)
    for parameter in plan.parameters:
        if parameter.path.endswith("expand.weight"):
            assert parameter.storage[1] == Shard(0)
    for op in plan.ops:
        for layout in op.results if op.where else ():
            assert not (isinstance(layout[0], Shard) and layout[0].dim == 1), op.name


@pytest.mark.parametrize("word", [*broad("whole"), "replicated"])
def test_a_module_is_kept_whole(word: str) -> None:
    """What a module makes, and its parameters."""
    plan = planned(constraints=[f"blocks.1 is {word}"])
    inside = [op for op in plan.ops if op.where.startswith("blocks.1")]
    assert inside
    for op in inside:
        assert all(isinstance(p, Invariant | Replicate) for layout in op.results for p in layout)
    for parameter in plan.parameters:
        if parameter.path.startswith("blocks.1."):
            assert parameter.storage == (Invariant(), Invariant())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blocks.0.feed_forward.expnd is whole", "did you mean blocks.0.feed_forward.expand"),
        ("blocks.0.attention_norm.weight on tp is P", "cannot be as"),
        ("blocks.* on pp is whole", "no axis 'pp'"),
        ("blocks.* is purple", "says not how"),
        ("blocks.*", "is no constraint"),
    ],
)
def test_impossible_demands_say_why(text: str, words: str) -> None:
    """Misspelt, unknown or unable."""
    with pytest.raises(PlanError, match=words):
        planned(constraints=[text])


def test_contradictions_are_no_plan() -> None:
    """Two constraints that no state satisfies."""
    with pytest.raises(PlanError, match="cannot be as"):
        planned(
            constraints=["token_embedding.weight is split 0", "token_embedding.weight is split 1"]
        )


def test_a_plan_that_fits(free: Plan) -> None:
    """Within the limit by the account, dearer than the free one, its bound below it."""
    need = planned(memory_limit="1GiB")
    assert need.cost == pytest.approx(free.cost)
    total = sum(size for _, size in need.memory)
    tight = planned(memory_limit=int(total * 0.8))
    assert sum(size for _, size in tight.memory) <= total * 0.8
    assert free.step_seconds < tight.step_seconds
    assert tight.lower_bound <= tight.cost
    assert Plan.from_json(tight.to_json()) == replace(tight, captured=None)


def test_a_smaller_batch_needs_less() -> None:
    """Memory is counted for the user's own inputs, be they small."""
    limit = "5MiB"
    with pytest.raises(MemoryLimitError):
        planned(memory_limit=limit)
    assert sum(size for _, size in planned(batch=8, memory_limit=limit).memory) <= 5 * 2**20


def test_what_does_not_fit_says_by_how_much() -> None:
    """With what takes the memory, and a limit that does."""
    with pytest.raises(MemoryLimitError) as caught:
        planned(batch=8, layers=1, memory_limit="300KiB")
    text = str(caught.value)
    assert "more than allowed" in text
    assert "activations" in text
    limit = caught.value.fix.split('"')[1]
    plan = planned(batch=8, layers=1, memory_limit=limit)
    assert sum(size for _, size in plan.memory) <= parse_bytes(limit)


def test_how_many_ranks_would_do_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many meshes were tried: for the one whose plan needs least."""
    asked: list[Mesh] = []
    find = memory_advice._enough_ranks

    def counted(captured: Any, network: CostNetwork, *others: Any) -> Mesh | None:
        asked.append(network.mesh)
        return find(captured, network, *others)

    monkeypatch.setattr(memory_advice, "_enough_ranks", counted)
    with pytest.raises(MemoryLimitError, match=r"use \d+ ranks \(Mesh"):
        planned(mesh="auto", world_size=4, batch=8, memory_limit="700KiB")
    assert len(asked) == 1


@pytest.mark.parametrize("gap", [True, -0.1, 1.0, math.nan, "1%"])
def test_a_gap_is_a_share(gap: Any) -> None:
    with pytest.raises(PlanError, match="gap="):
        planned(gap=gap)


def test_a_gap_that_is_asked_for_is_kept() -> None:
    """Between the plan and what is proven; an integer is as good as a float."""
    assert planned(batch=8, memory_limit="5MiB", gap=0).options.gap == 0.0
    plan = planned(batch=8, memory_limit="5MiB", gap=0.25)
    assert plan.cost - plan.lower_bound <= 0.25 * plan.cost


@pytest.mark.parametrize("size", ["40 gigs", "-1GiB", "", 0, -5, True])
def test_no_amount_of_memory(size: Any) -> None:
    """Refused, with an example of one."""
    with pytest.raises(PlanError, match="amount of memory"):
        parse_bytes(size)


def test_amounts_of_memory() -> None:
    """Binary and decimal units."""
    assert parse_bytes("40GiB") == 40 * 2**30
    assert parse_bytes("80 GB") == 80 * 10**9
    assert parse_bytes("1.5MiB") == 3 * 2**19
    assert bytes_text(3 * 2**19) == "1.5 MiB"


@pytest.mark.parametrize("options", [{}, *broad({"memory_limit": "30MiB"})], ids=str)
def test_a_plan_is_an_assignment(options: dict[str, Any]) -> None:
    """Read back into states it costs what it says, and planning may begin with it."""
    plan = planned(**options)
    assert plan.captured is not None
    graph = with_larger_hints(plan.captured, plan.options.tokens)
    network = build_network(graph, plan.mesh, find_hardware("dgx-a100"), plan.options)
    problem = network.problem()
    # Copies made again are choices beside the states: at no charge per byte none is.
    if not any(conversion.again for conversion in plan.conversions):
        assert problem.cost(solution_of_plan(network, plan)) == pytest.approx(plan.cost, rel=1e-9)
    assert planned(start=plan, **options).cost <= plan.cost * (1 + 1e-12)


def test_a_plan_of_another_mesh_is_no_beginning(free: Plan) -> None:
    """Nor one of a mesh that is not tried."""
    with pytest.raises(PlanError, match="another mesh"):
        planned(mesh=Mesh(dp=4, tp=1), start=free)
    with pytest.raises(PlanError, match="another mesh"):
        planned(mesh="auto", world_size=8, start=free)


def test_arrangements_fill_nodes() -> None:
    """Inner axes are parts of a node, or whole nodes."""
    assert arrangements(16, 8) == (
        Mesh(dp=16),
        Mesh(dp=8, tp=2),
        Mesh(dp=4, tp=4),
        Mesh(dp=2, tp=8),
    )
    assert arrangements(6, 8) == (Mesh(dp=6), Mesh(dp=3, tp=2))
    assert arrangements(1, 8) == (Mesh(tp=1),)


def test_the_fastest_mesh_is_taken() -> None:
    """No arrangement that was tried has a shorter step."""
    best = planned(mesh="auto", world_size=8, layers=1)
    for mesh in arrangements(8, 8):
        one = planned(mesh=mesh, layers=1)
        assert best.step_seconds <= one.step_seconds * (1 + 1e-12), mesh


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": None}, "over how many ranks"),
        ({"mesh": "automatic", "world_size": 4}, "mesh='automatic'"),
        ({"mesh": MESH, "world_size": 8}, "has 4 ranks"),
        ({"mesh": None, "world_size": 2.0}, "world_size=2.0"),
        ({"mesh": "auto", "world_size": 0}, "world_size=0"),
        ({"recompute": "some"}, "choose one of"),
        ({"recompute": ""}, "choose one of"),
        ({"data_parallel": "no"}, "True or False"),
        ({"constraints": "* is whole"}, "give a list"),
        ({"constraints": "batch on dp, heads on tp"}, r"\['batch on dp', 'heads on tp'\]"),
        ({"constraints": [3]}, "no text"),
        ({"pins": [("lm_head.weight", Shard(0))]}, "give a table"),
        ({"pins": {"token_embedding.weight": "S(0)"}}, "no placement"),
        ({"product_weight": -1.0}, "product_weight=-1.0"),
        ({"product_weight": 2.0, "memory_limit": "1GiB"}, "under a memory limit"),
        ({"start": "plan.json"}, "start is a str"),
    ],
)
def test_unclear_questions(options: dict[str, Any], words: str) -> None:
    """Refused with what to write."""
    with pytest.raises(PlanError, match=words):
        planned(**options)
