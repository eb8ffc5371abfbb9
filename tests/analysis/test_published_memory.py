"""The memory of stages against the formulas of arXiv:2205.05198, in Megatron-LM's own layouts."""

from __future__ import annotations

from typing import Any

import pytest
from broad_cases import broad

from autoparallel.analysis.memory_account import Account
from autoparallel.analysis.stage_memory import memory_of_pipeline
from autoparallel.cost.hardware import find_hardware
from autoparallel.plan import Plan
from autoparallel.planning import pipeline_estimates, stage_cuts
from autoparallel.support import torch_versions
from benchmarks.published_choices import LIMIT
from benchmarks.published_pipelines import ROWS, planned
from megatron_rules.papers import Transformer

HIDDEN, HEADS, SEQUENCE, VOCABULARY, TENSOR = 12288, 96, 2048, 51200, 8
# s b h, for one sequence.
UNIT = SEQUENCE * HIDDEN
# Bytes that a layer keeps, in s b h: the paper's table 2. With selective recomputation and split
# sequences, what is gathered for products is gathered again; full recomputation keeps the input.
LAYERS = {
    ("selective", False): 10 + 24 / TENSOR,
    ("selective", True): 34 / TENSOR,
    ("full", False): 2,
    ("full", True): 2 / TENSOR,
}


@pytest.fixture
def between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have stages cut as evenly as can be, as papers have it, also where another cut is quicker."""
    for user in (pipeline_estimates, stage_cuts):
        monkeypatch.setattr(user, "quickest_starts", lambda even, *_: even)


def accounts(
    layers: int, stages: int, chunks: int, recompute: str, sequence: bool
) -> tuple[Plan, tuple[Account, ...]]:
    """Return the plan of GPT-3's layers in Megatron's layout, and the memory of its ranks."""
    batch = 4 * stages
    row: dict[str, Any] = {
        "tensor": TENSOR,
        "stages": stages,
        "devices": TENSOR * stages,
        "batch": batch,
        "micro_batch": 1,
        "chunks": chunks,
    }
    model = Transformer(HIDDEN, HEADS, layers, SEQUENCE, VOCABULARY)
    hardware = find_hardware("dgx-a100")
    # A limit that copies which are kept exceed.
    limit = None
    if recompute == "selective" and sequence:
        whole = planned(model, row, hardware, recompute, sequence, True)
        limit = max(account.total for account in memory_of_pipeline(whole)) - 1
    plan = planned(model, row, hardware, recompute, sequence, True, memory_limit=limit)
    return plan, memory_of_pipeline(plan)


def in_layers(account: Account) -> float:
    """Return the bytes that the layers' own ops keep, in s b h."""
    rows = (item for item in account.items if item.category == "activations")
    return sum(item.nbytes for item in rows if "blocks." in item.where) / UNIT


@pytest.mark.parametrize(
    ("recompute", "sequence"), [*broad(*list(LAYERS)[::2]), *list(LAYERS)[1::2]], ids=str
)
@pytest.mark.usefixtures("between_layers")
def test_a_layer_keeps_what_the_paper_says(recompute: str, sequence: bool) -> None:
    """A stage holds its two layers' activations of as many micro-batches as stages follow, and
    itself. The first two are cut between layers; 16 bits of weights and of gradients, and 12 bytes
    of the optimizer's, lie on the ranks that split them.
    """
    plan, ranks = accounts(8, 4, 1, recompute, sequence)
    for held, account in zip((4, 3), ranks, strict=False):
        # What a later release lets go of, once it has arrived, is the second layer's result.
        sent = 0 if torch_versions.KEEPS_WHAT_IS_SENT else held * LAYERS["full", sequence]
        kept = 2 * held * LAYERS[recompute, sequence] - sent
        assert in_layers(account) == pytest.approx(kept, rel=0.01)
    # A layer's products with their biases, of which those by rows are whole, and two norms.
    elements = 2 * ((12 * HIDDEN**2 + 7 * HIDDEN) / TENSOR + 6 * HIDDEN)
    stays = ranks[1].parameters + ranks[1].gradients + ranks[1].optimizer_state
    assert stays == pytest.approx(16 * elements, rel=0.001)
    assert plan.step > 0


@pytest.mark.usefixtures("between_layers")
def test_interleaved_stages_keep_what_the_paper_says() -> None:
    """Of m stages on each of p ranks, the first keeps L (1 + (p - 1) / (p m)) layers (equation 5's
    text)."""
    _, ranks = accounts(8, 4, 2, "selective", True)
    layers = 8 * (1 + 3 / (4 * 2))
    assert in_layers(ranks[0]) == pytest.approx(layers * LAYERS["selective", True], rel=0.01)


@pytest.mark.broad
@pytest.mark.parametrize(("number", "layers"), [(2, 105 * (1 + 34 / 105)), (3, 128.0)])
def test_published_layouts_fit(number: int, layers: float) -> None:
    """530 B and 1 T parameters on A100 of 80 GB ran; the first rank needs what the formulas say."""
    table = ROWS["selective"]
    row = table["rows"][number]
    model = Transformer.of(row, table)
    hardware = find_hardware(table["hardware"])
    plan = planned(model, row, hardware, "selective", True, True, memory_limit=LIMIT)
    first = memory_of_pipeline(plan)[0]
    unit = model.sequence * model.hidden
    weights = 12 * model.hidden**2 * model.layers / row["stages"] + model.vocabulary * model.hidden
    formula = 16 * (weights / TENSOR + unit) + layers * unit * LAYERS["selective", True]
    # The input's dropout is kept of every micro-batch in flight: equation 5 has it without a name.
    assert formula < first.total < 1.06 * formula
    assert first.total < LIMIT
