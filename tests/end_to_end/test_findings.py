"""What the planner finds by itself, on models of real width and clusters as they are sold.

Published ways to train are not written down anywhere: they are the cheapest plans of their cases.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from any_plans import network_of
from releases import attention_without_heads
from torch import nn

import autoparallel
from autoparallel.analysis.communication import transfers
from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.memory_account import Account
from autoparallel.errors import MemoryLimitError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Shard, layout_text
from autoparallel.plan import OpChoice, Plan
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.strategy.parameter_storage import ParameterStorage
from autoparallel.train.models import GPT, GPTConfig
from planners import Solution, exact

pytestmark = pytest.mark.usefixtures("one_trace")


def gpt(hidden: int, layers: int = 1, **sizes: int) -> nn.Module:
    """Without weights, in 16 bits, heads of 64 (below 1024) or 128."""
    heads = hidden // (64 if hidden <= 1024 else 128)
    with torch.device("meta"):
        config = GPTConfig(layers=layers, hidden=hidden, heads=heads, dropout=0.0, **sizes)
        model: nn.Module = GPT(config).to(torch.bfloat16)
    return model


def planned(model: nn.Module, batch: int, sequence: int, **options: Any) -> Plan:
    """Its plan, updated by Adam with a master copy."""
    tokens = torch.empty(batch, sequence, dtype=torch.long, device="meta")
    options = {"optimizer": "mixed_adam", "hardware": "dgx-a100", **options}
    return autoparallel.make_plan(
        model, example_inputs={"input_ids": tokens, "labels": tokens}, **options
    )


def products(plan: Plan) -> dict[str, OpChoice]:
    """The products with a weight, by the last part of their path."""
    return {
        op.where.split(".")[-1]: op for op in plan.ops if op.whole_flops and len(op.operands) == 2
    }


def texts(op: OpChoice) -> tuple[str, str]:
    """Layouts of the activations and of the weight."""
    return layout_text(op.operands[0]), layout_text(op.operands[1])


def test_a_small_model_and_a_large_batch_are_data_parallel() -> None:
    """Every product has its part of the batch on every axis, and the whole weight."""
    plan = planned(gpt(512, vocabulary=8192), 64, 512, mesh=Mesh(dp=2, tp=4), hardware="dgx-h100")
    assert {texts(op) for op in products(plan).values()} == {("S(0) | S(0)", "R | R")}
    sent = [move for move in transfers(plan) if not move.conversion.value.startswith("p_")]
    # The loss, and what the positions of all sequences share.
    batch = plan.inputs[0].dims[0]
    assert all(batch not in move.conversion.shape.split(", ") for move in sent)


def test_as_memory_shrinks_states_then_gradients_then_parameters_are_split() -> None:
    """ZeRO's stages one after the other (arXiv:1910.02054), and weights split for good.

    Where collectives are waited for: computing would hide the gathers of split weights.
    """
    asked = {"mesh": Mesh(dp=8), "recompute": "none", "overlap": False}
    model, steps, kept = gpt(4096, layers=2, vocabulary=51200), [], []
    for limit in ("5GiB", "3GiB", "2.5GiB"):
        plan = planned(model, 16, 1024, **asked, memory_limit=limit)
        assert plan.memory_limit is not None
        assert sum(size for _, size in plan.memory) <= plan.memory_limit
        assert plan.cost <= plan.lower_bound * 1.01
        matrices = [parameter for parameter in plan.parameters if len(parameter.shape) > 1]
        assert all(isinstance(parameter.state[0], Shard) for parameter in matrices)
        whole = sum(parameter.storage == (Invariant(),) for parameter in matrices)
        late = sum(parameter.gradient == (Invariant(),) for parameter in matrices)
        kept.append((whole, late))
        steps.append(plan.step_seconds)
    assert steps == sorted(steps)
    assert kept[0][0] == kept[0][1] >= 8  # the first stage
    assert kept[1][1] < kept[1][0] < kept[0][0]  # the second, and split weights
    assert kept[2][0] < kept[1][0]  # the third
    assert kept[2][1] == 0  # no gradient waits whole
    assert any(conversion.again for conversion in plan.conversions)


@pytest.mark.parametrize("nodes", [2, 4])
def test_wide_layers_are_split_inside_of_nodes(nodes: int) -> None:
    """The MLP as Megatron-LM has it (arXiv:1909.08053, figure 3; arXiv:2104.04473, section 3.4).

    Columns, then rows, over the eight devices of a node, and its activations stay in the node; over
    the nodes the tokens are split, and gradients summed. With more tokens on each device, computing
    hides gathers of whole weights, and nothing else is sent.
    """
    plan = planned(gpt(12288, vocabulary=8192), 16 * nodes, 1024, mesh=Mesh(dp=nodes, tp=8))
    found = products(plan)
    # Sequences or parts of them are the same work.
    assert texts(found["expand"]) in [(f"S({dim}) | R", "R | S(0)") for dim in (0, 1)]
    assert texts(found["contract"]) in [(f"S({dim}) | S(2)", "R | S(1)") for dim in (0, 1)]
    own = [op for op in plan.ops if "feed_forward" in op.where]
    made = {value for op in own for value in (*op.reads, *op.makes) if not value.startswith("p_")}
    weights = {value for op in own for value in op.reads if value.startswith("p_")}
    axes = {move.step.axis for move in transfers(plan) if move.conversion.value in made}
    assert axes == {1}
    sums = [move for move in transfers(plan) if move.conversion.value in weights]
    assert {move.step.axis for move in sums if move.phase == "backward"} >= {0}


def test_one_long_sequence_is_split_along_itself() -> None:
    """Nothing else can be: a batch of one. Attention changes between heads and sequence, or
    gathers keys and values; everything else works on its part of the sequence."""
    plan = planned(gpt(2048, vocabulary=8192, positions=65536), 1, 65536, mesh=Mesh(dp=8))
    assert {texts(op) for op in products(plan).values()} == {("S(1)", "R")}
    norms = [op for op in plan.ops if "layer_norm" in op.target]
    assert all(layout_text(op.operands[0]) == "S(1)" for op in norms)


@attention_without_heads
def test_heads_that_do_not_divide_are_split_all_the_same() -> None:
    """GPT-2, a batch of one, eight ranks: 12 heads; no attention is left whole."""
    plan = planned(gpt(768), 1, 1024, world_size=8)
    attention = [op for op in plan.ops if "attention" in op.target]
    assert attention
    assert all(layout_text(op.operands[0]) == "S(1)" for op in attention)


def test_fused_query_key_and_value_cost_nothing_more() -> None:
    """GPT-3's layer: two all-reduces forward, two backward, no gather, no exchange."""
    counts = []
    for layers in (1, 2):
        plan = planned(
            gpt(12288, layers, positions=2048), 1, 2048, world_size=8, sequence_parallel=False
        )
        counts.append([move.movement.value for move in transfers(plan)])
    assert set(counts[1]) == {"all_reduce"}
    assert len(counts[1]) - len(counts[0]) == 4


@pytest.mark.broad
def test_limits_are_bytes_and_are_not_relaxed() -> None:
    """What cannot be is said, with what would do; what would do, does."""
    model = gpt(1024, layers=2, vocabulary=8192)
    options: dict[str, Any] = {"mesh": Mesh(dp=8), "recompute": "none"}
    with pytest.raises(MemoryLimitError) as caught:
        planned(model, 8, 1024, memory_limit="32MiB", **options)
    least = caught.value.least
    assert least > 32 * 2**20
    plan = planned(model, 8, 1024, memory_limit=int(least * 1.05), **options)
    assert memory_of(plan).total <= least * 1.05


# Bytes per parameter on one of n ranks, mixed precision Adam: parameter, gradient, state.
ZERO = {
    0: lambda n: (2, 2, 12),
    1: lambda n: (2, 2, 12 / n),
    2: lambda n: (2, 2 / n, 12 / n),
    3: lambda n: (2 / n, 2 / n, 12 / n),
}
# GB for 7.5 billion parameters, stages 1, 2, 3. Both: arXiv:1910.02054, table 1.
PRINTED = {
    4: (52.5, 41.3, 30),
    16: (35.6, 21.6, 7.5),
    64: (31.4, 16.6, 1.88),
    256: (30.4, 15.4, 0.47),
}


@pytest.mark.parametrize("ranks", PRINTED)
def test_the_formulas_are_those_that_are_printed(ranks: int) -> None:
    for stage, printed in enumerate(PRINTED[ranks], 1):
        assert 7.5 * sum(ZERO[stage](ranks)) == pytest.approx(printed, abs=0.06)


def stored(choices: tuple[ParameterStorage, ...], stage: int) -> int:
    """The place of the choice that is a stage of ZeRO."""
    whole = (Invariant(),)
    for place, choice in enumerate(choices):
        split = [part != whole for part in (choice.state, choice.gradient, choice.storage)]
        if split == [stage >= 1, stage >= 2, stage >= 3]:
            return place
    raise AssertionError(f"no stage {stage} among {choices}")


@cache
def with_stages(ranks: int) -> tuple[int, Captured, CostNetwork]:
    """The elements of a model, its graph, and the choices for data parallelism of so many ranks."""
    model = gpt(64, vocabulary=128, positions=64)
    count = sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.empty(64, 64, dtype=torch.long, device="meta")
    captured, network = network_of(
        model,
        {"input_ids": tokens, "labels": tokens},
        Mesh(dp=ranks),
        hardware="dgx-a100",
        optimizer="mixed_adam",
        memory_limit=2**40,
    )
    return count, captured, network


@pytest.mark.parametrize("stage", ZERO)
@pytest.mark.parametrize("ranks", [8, 64])
def test_bytes_of_zero_to_the_byte(stage: int, ranks: int) -> None:
    """Parameters, gradients and optimizer state of a plan with every parameter at one stage."""
    count, captured, network = with_stages(ranks)
    problem = network.problem()
    chosen = {name: stored(choices, stage) for name, choices in network.storages.items()}
    solution = Solution.of(problem, exact.solve(problem.weighed(0.0).pinned(chosen)).assignment, "")
    plan = plan_of_solution(captured, "GPT", network.mesh, network, solution, 1.0)
    taken: Account = memory_of(plan)
    own = (taken.parameters, taken.gradients, taken.optimizer_state)
    assert own == tuple(count * each for each in ZERO[stage](ranks))
