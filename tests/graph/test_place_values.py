"""Formulas of values that follow from their places alone are right for all sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import sympy
import torch
from graph_text import graph_of_text
from torch import Tensor, nn

import autoparallel
from autoparallel.graph.graph import Graph, Node, Ref, Sym, Value, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.graph.place_formulas import Affine, Bias, Formula, Fraction, Truth
from autoparallel.graph.place_values import place_values

ATTENTION = "aten.scaled_dot_product_attention.default"


def numbers(formula: Formula, value: Value, sizes: dict[sympy.Expr, int]) -> Tensor:
    """The value as its formula has it; a bias is 0 or -inf."""
    shape = [int(n.expr.subs(sizes)) if isinstance(n, Sym) else n for n in value.shape]
    places = np.indices(shape)

    def affine(part: Affine) -> np.ndarray:
        assert len(part.steps) == len(shape)
        ends = zip(part.steps, places, strict=True)
        return int(part.start.subs(sizes)) + sum((s * p for s, p in ends), np.zeros(shape, int))

    def truth(part: Truth) -> np.ndarray:
        holds = [affine(each) >= 0 for each in part.conditions]
        return np.logical_and.reduce([np.ones(shape, bool), *holds])

    if isinstance(formula, Affine):
        return torch.from_numpy(affine(formula))
    if isinstance(formula, Truth):
        return torch.from_numpy(truth(formula))
    if isinstance(formula, Bias):
        return torch.from_numpy(np.where(truth(formula.seen), 0.0, -np.inf))
    assert isinstance(formula, Fraction)
    return torch.full(shape, formula.number)


def run(graph: Graph, formulas: dict[str, Formula], sizes: dict[sympy.Expr, int]) -> int:
    """Compare every value that has a formula with what the program computes; return how many."""
    tensors: dict[str, Tensor] = {}

    def leaf(item: object) -> object:
        if isinstance(item, Ref):
            return tensors[item.name]
        return int(item.expr.subs(sizes)) if isinstance(item, Sym) else item

    compared = 0
    for node in graph.calls:
        if node.name not in formulas or any(name not in tensors for name in node.operands()):
            continue
        kwargs = {k: leaf(v) for k, v in node.kwargs if k not in ("device", "pin_memory")}
        value = operator_of(node.target)(*map_leaves(leaf, node.args), **kwargs)
        tensors[node.name] = value
        told = numbers(formulas[node.name], node.result, sizes)
        assert told.shape == value.shape, node
        if isinstance(formulas[node.name], Bias):
            value = value.double().masked_fill(value <= torch.finfo(value.dtype).min, -torch.inf)
        assert torch.equal(told.double(), value.double()), node
        compared += 1
    return compared


PROGRAM = """
%a: int64[s0], no grad = call aten.arange.default(s0)
%b: int64[s0], no grad = call aten.arange.start_step(2, 2*s0 + 2, 2)
%c: int64[1, s0], no grad = call aten.reshape.default(%b, (1, s0))
%d: int64[3, s0], no grad = call aten.repeat.default(%c, (3, 1))
%e: int64[s0, 3], no grad = call aten.transpose.int(%d, 0, -1)
%f: int64[s0, 1], no grad = call aten.unsqueeze.default(%a, -1)
%g: int64[s0, 3], no grad = call aten.sub.Tensor(%e, %f, alpha=3)
%h: bool[s0, 3], no grad = call aten.ge.Scalar(%g, -1)
%i: int64[s0, 1], no grad = call aten.narrow.default(%g, 1, 1, 1)
%j: int64[1], no grad = call aten.slice.Tensor(%a, 0, 0, 1)
%k: int64[1], no grad = call aten.sub.Scalar(%j, 1)
%l: int64[s0 + 1], no grad = call aten.cat.default((%k, %a), -1)
%m: int64[s0], no grad = call aten.narrow.default(%l, 0, 1, s0)
%n: int64[s0], no grad = call aten.narrow.default(%l, 0, 0, s0)
%o: int64[s0], no grad = call aten.sub.Tensor(%m, %n)
%p: bool[s0], no grad = call aten.ne.Scalar(%o, 1)
%q: int64[s0], no grad = call aten.cumsum.default(%p, 0)
%r: bool[s0, s0], no grad = call aten.eq.Tensor(%f, %a)
%t: int64[s0, s0], no grad = call aten.index.Tensor(%e, (%f, %q))
%u: int64[2*s0], no grad = call aten.cat.default((%a, %a),)
%w: bool[s0], no grad = call aten.logical_not.default(%p)
%x: float64[s0, s0], no grad = call aten.ones.default((s0, s0), dtype=torch.float64)
%y: float64[s0, s0], no grad = call aten.tril.default(%x, -2)
%z: bool[s0, s0], no grad = call aten.eq.Scalar(%y, 0)
%aa: float64[s0, s0], no grad = call aten.zeros.default((s0, s0), dtype=torch.float64)
%bb: float64[s0, s0], no grad = call aten.masked_fill.Scalar(%aa, %z, -inf)
%cc: float64[s0, s0], no grad = call aten.full.default((s0, s0), -inf, dtype=torch.float64)
%dd: float64[s0, s0], no grad = call aten.triu.default(%cc, 2)
%ee: bool[s0, s0], no grad = call aten.bitwise_not.default(%z)
%ff: bool[s0, s0], no grad = call aten.__and__.Tensor(%ee, %w)
return %t
"""
UNKNOWN = {"u"}  # two ranges in a row are none


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_formulas_are_what_the_program_computes(size: int) -> None:
    graph = graph_of_text(PROGRAM, {"s0": 5})
    formulas = place_values(graph)
    assert {node.name for node in graph.calls} - formulas.keys() == UNKNOWN
    symbol = sympy.Symbol("s0", integer=True, positive=True)
    assert run(graph, formulas, {symbol: size}) == len(formulas)


def attention_masks(graph: Graph) -> list[Node]:
    return [node for node in graph.calls if node.target == ATTENTION]


class Masked(nn.Module):
    """Attention with a mask that is computed from the places of queries and keys."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.project, self.mask = nn.Linear(8, 24), mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        places = torch.arange(x.shape[1], device=x.device)
        mask = self.mask(places[:, None], places[None, :])
        return nn.functional.scaled_dot_product_attention(q, k, v, mask).square().mean()


CAUSAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "less or equal": lambda q, k: k <= q,
    "difference": lambda q, k: q - k > -1,
    "not behind": lambda q, k: ~(k > q),
    "triangle": lambda q, k: torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).tril(),
    "lowest": lambda q, k: torch.where(k <= q, 0.0, -torch.inf).double(),
    "upper": lambda q, k: torch.full((q.shape[0], q.shape[0]), -torch.inf).triu(1).double(),
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "without itself": lambda q, k: (k < q) | (q == 0),
    "one more": lambda q, k: k <= q + 1,
    "window": lambda q, k: (k <= q) & (k > q - 6),
    "ahead": lambda q, k: k >= q,
    "added ones": lambda q, k: (k <= q).double(),
    "little": lambda q, k: torch.where(k <= q, 0.0, -3.0).double(),
}


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_masks_are_seen_as_what_they_are(name: str) -> None:
    """Only a mask that hides what is behind each query is causal; losses and gradients stay."""
    torch.manual_seed(0)
    model = Masked({**CAUSAL, **OTHERS}[name]).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert plan.captured is not None
    (node,) = attention_masks(plan.captured.graph)
    assert bool(node.argument(5, "is_causal", False)) == (name in CAUSAL)
    assert (node.argument(3, "attn_mask") is None) == (name in CAUSAL)
    # Twice the sequence, where the window hides something.
    for length in (5, 10):
        x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
        loss = model(x)
        wanted = torch.autograd.grad(loss, [*model.parameters(), x])
        run = autoparallel.simulate(model, example_inputs=(x,), plan=plan)
        torch.testing.assert_close(run.output, loss, rtol=1e-12, atol=1e-14)
        gradients = [run.gradients[name] for name, _ in model.named_parameters()]
        torch.testing.assert_close(gradients, [*wanted[:-1]], rtol=1e-10, atol=1e-13)


def test_a_window_is_causal_where_the_sequence_is_fixed_and_short() -> None:
    """Then no key is outside of it."""
    for length, causal in ((5, True), (6, True), (7, False)):
        graph = graph_of_text(WINDOW.replace("LENGTH", str(length)), {})
        (node,) = attention_masks(autoparallel.graph.passes.run_passes.run_passes(graph))
        assert bool(node.argument(5, "is_causal", False)) == causal, length


WINDOW = """
%q: float64[2, 3, LENGTH, 8] = input 0()
%places: int64[LENGTH], no grad = call aten.arange.default(LENGTH)
%rows: int64[LENGTH, 1], no grad = call aten.unsqueeze.default(%places, 1)
%behind: bool[LENGTH, LENGTH], no grad = call aten.le.Tensor(%places, %rows)
%start: int64[LENGTH, 1], no grad = call aten.sub.Tensor(%rows, 6)
%near: bool[LENGTH, LENGTH], no grad = call aten.gt.Tensor(%places, %start)
%window: bool[LENGTH, LENGTH], no grad = call aten.__and__.Tensor(%behind, %near)
%y: float64[2, 3, LENGTH, 8] = call aten.scaled_dot_product_attention.default(%q, %q, %q, %window)
return %y
"""


@pytest.mark.parametrize(
    ("scale", "causal"), [(None, True), (0.5, True), (0.0, False), (-1, False)]
)
def test_scores_of_a_scale_that_a_kernel_cannot_hide_keep_their_mask(
    scale: float | None, causal: bool
) -> None:
    """A CPU's kernel for causal masks makes NaN of hidden scores times 0 or less."""
    text = WINDOW.replace("LENGTH", "5").replace("%window)\n", f"%window, scale={scale})\n")
    graph = autoparallel.graph.passes.run_passes.run_passes(graph_of_text(text, {}))
    (node,) = attention_masks(graph)
    assert bool(node.argument(5, "is_causal", False)) == causal
    assert node.keyword("scale") == scale


def test_dropped_attention_of_a_scale_of_zero_is_scaled() -> None:
    """Zero is a scale, and not the default."""
    text = WINDOW.replace("LENGTH", "5").replace("%window)\n", "%window, 0.5, scale=0.0)\n")
    graph = autoparallel.graph.passes.run_passes.run_passes(graph_of_text(text, {}))
    assert [node.args[1] for node in graph.calls if node.name.endswith("_scaled")] == [0.0]
