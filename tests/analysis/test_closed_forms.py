"""Closed forms: Megatron's, symbol by symbol, and the plan's own figures, to the byte."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import sympy
import torch

import autoparallel
from autoparallel.analysis.closed_forms import closed_forms
from autoparallel.analysis.communication import transfers
from autoparallel.analysis.memory import memory_of
from autoparallel.analysis.module_forms import ClosedForms, Form
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.parallel.parameters import ParameterLayouts
from autoparallel.placement import Collective, local_layout_size
from autoparallel.plan import Plan
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.closed_forms_text import expression_text, forms_text

pytestmark = pytest.mark.usefixtures("one_trace")
LAYERS, HIDDEN, HEADS, VOCABULARY, POSITIONS = 3, 4096, 32, 51200, 2048
BATCH, SEQUENCE = 8, 2048
NAMES = {HIDDEN: "h", VOCABULARY: "V", HEADS: "a"}


def planned(vocabulary: int = VOCABULARY, dropout: float = 0.0, **options: Any) -> Plan:
    """A GPT in half precision, planned without weights."""
    with torch.device("meta"):
        config = GPTConfig(LAYERS, HIDDEN, HEADS, vocabulary, POSITIONS, dropout)
        model = GPT(config).to(torch.float16)
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    return autoparallel.make_plan(
        model,
        example_inputs=(tokens, tokens),
        hardware="dgx-a100",
        optimizer="mixed_adam",
        **options,
    )


@pytest.fixture(scope="module")
def megatron(one_trace: None) -> Plan:
    return planned(world_size=8, sequence_parallel=False)


@pytest.fixture(scope="module")
def symbols() -> dict[str, sympy.Symbol]:
    return {
        name: sympy.Symbol(name, integer=True, positive=True)
        for name in ("b", "s", "h", "V", "a", "tp")
    }


def layer(forms: ClosedForms) -> Form:
    """Of the blocks, which are all alike."""
    (found,) = (form for form in forms.forms if form.count == LAYERS)
    return found


def test_megatrons_layer(megatron: Plan, symbols: dict[str, sympy.Symbol]) -> None:
    """Four all-reduces of b s h elements (arXiv:1909.08053); FLOPs and parameters of
    arXiv:2104.04473, equations 2 and 3, over the ranks; norms and row biases are whole."""
    b, s, h, tp = (symbols[name] for name in ("b", "s", "h", "tp"))
    forms = closed_forms(megatron, names=NAMES)
    block = layer(forms)
    sent = {(row.phase, row.collective): (row.count, row.nbytes) for row in block.sent}
    assert sent == {
        ("forward", Collective.ALL_REDUCE): (2, 2 * b * s * h),
        ("backward", Collective.ALL_REDUCE): (2, 2 * b * s * h),
    }
    flops = 72 * b * s * h**2 * (1 + s / (6 * h)) / tp
    assert sympy.expand(block.flops + block.backward_flops - flops) == 0
    assert sympy.expand(block.parameters - 2 * ((12 * h**2 + 7 * h) / tp + 6 * h)) == 0
    assert block.gradients == block.parameters
    assert sympy.expand(block.optimizer_state - 6 * block.parameters) == 0
    text = forms_text(forms, megatron)
    assert "blocks.{0..2} (each of 3)" in text
    assert "  4 all-reduces of 2 b s h bytes on tp: 2 forward, 2 backward\n" in text
    assert "  FLOPs forward: 4 b s h (6 h + s)/tp\n" in text


def test_all_flops_of_the_paper(megatron: Plan, symbols: dict[str, sympy.Symbol]) -> None:
    """arXiv:2104.04473, equation 3: 72 b s l h^2 (1 + s / 6 h + V / 12 l h)."""
    b, s, h, vocabulary, tp = (symbols[name] for name in ("b", "s", "h", "V", "tp"))
    total = closed_forms(megatron, names=NAMES).total
    paper = 72 * b * s * LAYERS * h**2 * (1 + s / (6 * h) + vocabulary / (12 * LAYERS * h)) / tp
    assert sympy.expand(total.flops + total.backward_flops - paper) == 0


def test_megatrons_layer_with_sequence_parallelism(symbols: dict[str, sympy.Symbol]) -> None:
    """Gathers and scatters in place of the all-reduces (arXiv:2205.05198, section 4.2.2)."""
    b, s, h = (symbols[name] for name in ("b", "s", "h"))
    block = layer(closed_forms(planned(world_size=8), names=NAMES))
    sent = Counter(
        {(r.phase, r.collective): r.count for r in block.sent if r.nbytes == 2 * b * s * h}
    )
    assert sent == {
        (phase, collective): 2
        for phase in ("forward", "backward")
        for collective in (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)
    }


def test_the_loss_of_a_split_vocabulary(megatron: Plan, symbols: dict[str, sympy.Symbol]) -> None:
    """A kernel sends a few numbers per token, however large the vocabulary is."""
    kernels = [row for row in closed_forms(megatron).total.sent if row.kernel]
    assert {row.nbytes for row in kernels} == {
        2 * symbols["b"] * symbols["s"],
        4 * symbols["b"] * symbols["s"],
    }


@pytest.mark.parametrize(
    "options",
    [
        {"world_size": 8, "sequence_parallel": False},
        {"world_size": 8, "vocabulary": 50257},
        {"world_size": 6, "sequence_parallel": False},
        {"mesh": Mesh(dp=2, tp=3)},
    ],
    ids=str,
)
def test_equals_the_plan(options: dict[str, Any]) -> None:
    """Where it was planned, by axis and kind; sizes that do not divide are the busiest rank's."""
    plan = planned(**options)
    forms = closed_forms(plan, names=NAMES)
    total = forms.total
    expected: Counter[tuple[str, str, Collective]] = Counter()
    found: Counter[tuple[str, str, Collective]] = Counter()
    for transfer in transfers(plan):
        axis = plan.mesh.axes[transfer.step.axis][0]
        expected[transfer.phase, axis, transfer.collective] += transfer.nbytes
    for row in total.sent:
        if not row.kernel:
            found[row.phase, row.axis, row.collective] += row.count * forms.at(row.nbytes)
    assert found == expected
    assert forms.at(total.flops) == pytest.approx(sum(op.flops for op in plan.ops), rel=1e-12)
    sizes = tuple(size for _, size in plan.mesh.axes)
    for name, layouts in (("parameters", "storage"), ("gradients", "gradient")):
        held = 0
        for parameter in plan.parameters:
            parts = [getattr(parameter, layouts)]
            # What no DTensor can say is there twice: as it computes, and as the optimizer has it.
            kept = ParameterLayouts.of(parameter, parameter.shape, sizes).state
            if name == "parameters" and kept != parameter.state:
                parts.append(kept)
            for layout in parts:
                elements = 1
                for dim, size in enumerate(parameter.shape):
                    elements *= local_layout_size(size, dim, layout, sizes)
                held += 2 * elements
        assert forms.at(getattr(total, name)) == held


def test_holds_at_other_sizes(megatron: Plan) -> None:
    """A plan for another batch and sequence that makes the same choices has the same forms."""
    with torch.device("meta"):
        config = GPTConfig(LAYERS, HIDDEN, HEADS, VOCABULARY, POSITIONS, dropout=0.0)
        model = GPT(config).to(torch.float16)
    tokens = torch.zeros(24, 1024, dtype=torch.long)
    other = autoparallel.make_plan(
        model, 8, example_inputs=(tokens, tokens), sequence_parallel=False, hardware="dgx-a100"
    )
    assert [op.operands for op in other.ops] == [op.operands for op in megatron.ops]
    forms = closed_forms(megatron)
    total = forms.total
    assert forms.at(total.flops, b=24, s=1024) == sum(op.flops for op in other.ops)
    sent = sum(t.nbytes for t in transfers(other))
    own = sum(row.count * row.nbytes for row in total.sent if not row.kernel)
    assert forms.at(own, b=24, s=1024) == sent
    assert forms.at(total.parameters, tp=16) < forms.at(total.parameters)


def test_no_forms_without_the_graph(megatron: Plan) -> None:
    with pytest.raises(PlanError, match="no closed forms"):
        closed_forms(Plan.from_json(megatron.to_json()))


def test_a_name_that_no_size_has_is_refused(megatron: Plan) -> None:
    forms = closed_forms(megatron)
    with pytest.raises(PlanError, match="no size of the closed forms is called 'batch'"):
        forms.at(forms.total.flops, batch=24)


def test_expressions_read_as_in_papers() -> None:
    s, b, h, a, t = sympy.symbols("s b h a t", positive=True)
    order = ("s", "b", "h", "a", "t")
    paper = s * b * h * (10 + 24 / t + 5 * a * s / (h * t))
    assert expression_text(paper, order) == "s b (5 s a/t + 10 h + 24 h/t)"
    assert expression_text(s / (a * t) + h / t, order) == "(h + s/a)/t"
    assert expression_text(2 * s**2 * b / (3 * t), order) == "2 s^2 b/(3 t)"
    assert expression_text(sympy.Integer(0), order) == "0"
    assert expression_text(h - 2 * t, order) == "h - 2 t"
    assert expression_text(7 * sympy.ceiling(h / (7 * t)), order) == "7 ceil(h/(7 t))"


@pytest.mark.parametrize(("sequence_parallel", "whole", "parts"), [(False, 10, 24), (True, 4, 30)])
def test_saved_activations_of_a_layer(
    sequence_parallel: bool, whole: int, parts: int, symbols: dict[str, sympy.Symbol]
) -> None:
    """arXiv:2205.05198, table 2: s b h (10 + 24/t + 5 a s / h t).

    Besides, norms keep mean and deviation of each row, and attention its causal mask. With sequence
    parallelism the paper gathers the two inputs of products again (4 b s h / t in place of
    4 b s h); nothing limits the memory here.
    """
    plan = planned(world_size=8, sequence_parallel=sequence_parallel, dropout=0.1)
    forms = closed_forms(plan, names=NAMES)
    b, s, h, a, t = (symbols[name] for name in ("b", "s", "h", "a", "tp"))
    matrix = 5 * a * s / (h * t)
    split = whole + parts / t + matrix
    rows = 8 * b * s / (t if sequence_parallel else 1)
    assert sympy.expand(layer(forms).activations - (s * b * h * split + rows + s**2)) == 0


def test_a_layer_that_is_run_again(symbols: dict[str, sympy.Symbol]) -> None:
    """96 b s h^2 (1 + s/6h) FLOPs (arXiv:2104.04473, equation 3), 2 s b h bytes kept
    (arXiv:2205.05198, table 2), 6 all-reduces.

    The last layer makes one less: its sum is left pending and made behind the layer, once.
    """
    plan = planned(world_size=8, sequence_parallel=False, recompute="full")
    b, s, h, t = (symbols[name] for name in ("b", "s", "h", "tp"))
    blocks = [form for form in closed_forms(plan, names=NAMES).forms if form.paths != ("",)]
    flops = 96 * b * s * h**2 * (1 + s / (6 * h)) / t
    for form in blocks:
        assert sympy.expand(form.flops + form.backward_flops - flops) == 0
        assert sympy.expand(form.activations - 2 * s * b * h) == 0
    sums = [(form.count, sum(row.count for row in form.sent)) for form in blocks]
    assert sums == [(LAYERS - 1, 6), (1, 5)]


@pytest.mark.parametrize(
    "options",
    [
        {"world_size": 8, "dropout": 0.1},
        {"world_size": 8, "vocabulary": 50257},
        {"mesh": Mesh(dp=2, tp=4), "memory_limit": "12GiB", "recompute": "auto"},
        {"world_size": 8, "dropout": 0.1, "recompute": "selective"},
        {"mesh": Mesh(dp=2, tp=4), "recompute": "full"},
    ],
    ids=str,
)
def test_saved_activations_are_the_account_s(options: dict[str, Any]) -> None:
    """To the byte, whether they divide or not."""
    plan = planned(**options)
    forms = closed_forms(plan, names=NAMES)
    assert forms.at(forms.total.activations) == memory_of(plan).activations
