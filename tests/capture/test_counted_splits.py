"""Rows that are split into as many as values say: experts' rows are one op, others stay Python."""

from __future__ import annotations

import expert_families
import pytest
import torch
from families import relative_error, worst_gradient
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.capture.graph_breaks import trace
from autoparallel.errors import CaptureError
from autoparallel.graph.row_program import ROUTED
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.planning.search import search
from autoparallel.rules.lookup import find_rule

WIDTH, EXPERTS, CHOICES = 4, 5, 2


class Routed(nn.Module):
    """Tokens whose rows are sorted by expert and split by counts. form: of what is done so."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 12, WIDTH) / 2)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 6) / 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 6), nn.SiLU(), nn.Linear(6, WIDTH))
            for _ in range(EXPERTS)
        )
        with torch.no_grad():
            self.gate.bias[-1] -= 0.4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        scores, chosen = self.gate(flat).topk(CHOICES, dim=1)
        weights = scores.softmax(1)
        flags = torch.zeros(flat.shape[0], EXPERTS, dtype=x.dtype).scatter(1, chosen, 1)
        order = chosen.flatten().sort(0).indices
        y = getattr(self, self.form)(flat, weights, chosen, flags.long().sum(0), order)
        return y.reshape(*x.shape[:-1], -1).pow(2).sum()

    def products(self, x, weights, chosen, counts, order):
        """Products alone are done part by part, and what lies between them with all rows."""
        sizes = counts.tolist()
        token = order.div(CHOICES, rounding_mode="trunc")
        left, right = self.each(self.up, x[token], sizes).chunk(2, -1)
        made = self.each(self.down, functional.silu(left) * right, sizes)
        made = made * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, token, made)

    def each(self, table, rows, sizes):
        parts = rows.split(sizes, dim=0)
        made = [functional.linear(part, table[at]) for at, part in enumerate(parts)]
        return torch.cat(made, dim=0)

    def modules_of_a_list(self, x, weights, chosen, counts, order):
        """Counts of flags for each choice; experts are modules with a bias."""
        counts = functional.one_hot(chosen, EXPERTS).sum((0, 1))
        token = order // CHOICES
        parts = torch.split(x[token], counts.tolist())
        made = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        made = made * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, token, made)

    def apart(self, x, weights, chosen, counts, order):
        """Rows go back to their choices, something is done there, and they go to experts again."""
        sizes = counts.tolist()
        token = order.div(CHOICES, rounding_mode="trunc")
        made = self.each(self.up[:, :6], x[token], sizes)
        apart = torch.zeros(x.shape[0] * CHOICES, 6, dtype=x.dtype).index_add(0, order, made)
        apart = apart.view(x.shape[0], CHOICES, 6)
        apart = (apart - apart.mean(1, keepdim=True)).reshape(-1, 6)
        made = self.each(self.down, apart[order], sizes) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, token, made)

    # -- others: parts that are not those of the experts, or of which more is wanted

    def counted_otherwise(self, x, weights, chosen, counts, order):
        return self.products(x, weights, chosen, counts.flip(0), order)

    def sorted_backwards(self, x, weights, chosen, counts, order):
        order = chosen.flatten().sort(0, descending=True).indices
        return self.products(x, weights, chosen, counts, order)

    def of_fewer_rows(self, x, weights, chosen, counts, order):
        """There is one row less than is counted: it fails unsplit."""
        return self.each(self.up, x[order // CHOICES][:-1], counts.tolist())

    def written_in_between(self, x, weights, chosen, counts, order):
        """The counts are read before they are changed."""
        sizes = counts.tolist()
        counts.zero_()
        token = order // CHOICES
        made = self.each(self.up, x[token], sizes)
        return torch.zeros(x.shape[0], 12, dtype=x.dtype).index_add(0, token, made) + counts.sum()

    def of_different_sizes(self, x, weights, chosen, counts, order):
        parts = x[order // CHOICES].split(counts.tolist())
        return torch.cat([part * (at + 1) for at, part in enumerate(parts)])

    def in_another_order(self, x, weights, chosen, counts, order):
        parts = x[order // CHOICES].split(counts.tolist())
        made = [functional.linear(part, self.up[at]) for at, part in enumerate(parts)]
        return torch.cat(made[::-1])

    def divided(self, x, weights, chosen, counts, order):
        sizes = counts.tolist()
        parts = x[order // CHOICES].split(sizes)
        return torch.cat([part / max(size, 1) for part, size in zip(parts, sizes, strict=True)])


def inputs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, WIDTH, dtype=torch.float64, generator=generator)


def require_right(model: Routed, plan: autoparallel.Plan, x: torch.Tensor) -> None:
    """A step of the plan has the model's own loss and gradients."""
    model.zero_grad()
    expected = model(x)
    expected.backward()
    run = autoparallel.simulate(model, plan=plan, example_inputs=(x,))
    assert relative_error(run.output.detach(), expected.detach()) < 1e-10
    gradients = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    error, where = worst_gradient({path: run.gradients[path] for path in gradients}, gradients)
    assert error < 1e-10, where


@pytest.mark.parametrize(
    ("form", "count"), [("products", 1), ("modules_of_a_list", 1), ("apart", 2)]
)
def test_rows_that_are_split_by_expert_are_one_op(form: str, count: int) -> None:
    """It is right for other numbers of rows than it was planned for, on 2 and on 3 ranks."""
    model = Routed(form).double()
    traced = autoparallel.make_plan(model, 1, example_inputs=(inputs(0),))
    assert not traced.breaks
    assert sum(op.target == ROUTED for op in traced.ops) == count
    assert traced.captured is not None
    for world_size, seed in ((2, 1), (3, 2)):
        with expert_families.only("experts_summed", "experts_summed"):
            plan = search(traced.captured, traced.model, Mesh(tp=world_size), Options())
        require_right(model, plan, inputs(seed))


def test_rows_that_are_not_those_that_were_counted() -> None:
    with pytest.raises(CaptureError, match="expects split_sizes to sum exactly to 23"):
        autoparallel.make_plan(Routed("of_fewer_rows").double(), 2, example_inputs=(inputs(0),))


@pytest.mark.parametrize("form", ["written_in_between", "sorted_backwards"])
def test_parts_have_as_many_rows_as_were_read(form: str) -> None:
    """Counts may change afterwards, and the rows need not be those of the experts."""
    model = Routed(form).double()
    plan = autoparallel.make_plan(model, 3, example_inputs=(inputs(0),))
    assert not plan.breaks
    require_right(model, plan, inputs(1))


@pytest.mark.parametrize(
    "form",
    ["counted_otherwise", "of_different_sizes", "in_another_order", "divided"],
)
def test_other_parts_are_refused(form: str) -> None:
    with pytest.raises(CaptureError, match=r"depends on the values|a tensor's value|branches"):
        trace(Routed(form).double(), (inputs(0),), {}, known=find_rule)
