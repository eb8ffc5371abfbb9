"""Rows of plans that come from elsewhere."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache, partial
from typing import Any

import torch
from edited_plans import Edited, Mixed
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.plan import Plan
from autoparallel.planning.plan_graphs import with_graphs
from autoparallel.planning.plan_model import trace_model
from autoparallel.view.report import plan_text

from .registry import note, row


@cache
def _edited(mesh: Mesh, schedule: str = "") -> Edited:
    """Return plans on a mesh. schedule: of those with stages."""
    tokens = torch.randint(10, (4, 6), generator=torch.Generator().manual_seed(0))
    stages = {"microbatches": 2, "schedule": schedule} if schedule else {}
    return Edited(Mixed().double(), tokens, mesh, stages)


def _edits(draw: random.Random, count: int, mesh: Mesh, schedule: str = "") -> Counter[str]:
    counts: Counter[str] = Counter()
    edited = _edited(mesh, schedule)
    for _, text in edited.edits(draw.randrange(2**32), count):
        note(counts, partial(edited.tried, text))
    return counts


@row("one random edit of a plan's JSON, on Mesh(tp=2)")
def edits(draw: random.Random, count: int) -> Counter[str]:
    return _edits(draw, count, Mesh(tp=2))


@row("one random edit of a plan's JSON, on Mesh(dp=2, tp=2)")
def edits_on_two_axes(draw: random.Random, count: int) -> Counter[str]:
    return _edits(draw, count, Mesh(dp=2, tp=2))


@row("one random edit of the JSON of a plan with stages, on Mesh(pp=2, tp=2)")
def edits_of_stages(draw: random.Random, count: int) -> Counter[str]:
    return _edits(draw, count, Mesh(pp=2, tp=2), "1f1b")


@row("one random edit of the JSON of a plan with stages, zero bubble on Mesh(pp=2)")
def edits_of_halves(draw: random.Random, count: int) -> Counter[str]:
    return _edits(draw, count, Mesh(pp=2), "zero_bubble")


@row("one random edit of a plan's JSON, which is then shown without its model")
def edits_that_are_shown(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()

    def tried(text: str) -> str:
        try:
            plan = Plan.from_json(text)
        except PlanError:
            return "refused"
        repr(plan)
        return "read" if plan_text(plan) else "nothing shown"

    for mesh, schedule in ((Mesh(dp=2, tp=2), ""), (Mesh(pp=2, tp=2), "1f1b")):
        for _, text in _edited(mesh, schedule).edits(draw.randrange(2**32), count):
            note(counts, partial(tried, text))
    return counts


@row("a layout of a normalization, a product, a view or a loss that its rule forbids")
def forbidden_layouts(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    edited = _edited(Mesh(tp=2))
    for target, side, place, layout in (
        ("layer_norm", "operands", 1, "I"),
        ("layer_norm", "operands", 2, "S(0)"),
        ("linear", "operands", 0, "I"),
        ("linear", "operands", 1, "P"),
        ("matmul", "operands", 1, "R"),
        ("reshape", "results", 0, "R"),
        ("reshape", "results", 0, "S(3)"),
        ("transpose", "results", 0, "S(0)"),
        ("embedding", "results", 0, "P"),
        ("dropout", "results", 0, "I"),
        ("cross_entropy_loss", "operands", 0, "S(1)"),
        ("add", "operands", 0, "S(0)"),
    ):
        rows = json.loads(edited.text)
        op = next(op for op in rows["ops"] if op["target"].startswith(f"aten.{target}."))
        op[side][place] = layout
        edited.repair(rows)
        note(counts, partial(edited.tried, json.dumps(rows)))
    return counts


@row("names of kernels in a plan that are none of the op's rule")
def kernels(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    edited = _edited(Mesh(tp=2))
    names = ("cross_entropy_classes", "os.system", "__import__", "torch.load", "x); import os; (")
    for name in names:
        for op in range(0, len(json.loads(edited.text)["ops"]), 5):
            rows = json.loads(edited.text)
            if rows["ops"][op]["kernels"] != [name]:
                rows["ops"][op]["kernels"] = [name]
                note(counts, partial(edited.tried, json.dumps(rows)))
    return counts


@row("numbers, types, keys and texts that no plan has")
def no_plans(draw: random.Random, count: int) -> Counter[str]:
    text = _edited(Mesh(tp=2)).text

    def edit(**changes: Any) -> str:
        return json.dumps({**json.loads(text), **changes})

    texts = [
        *(edit(cost=cost) for cost in (float("nan"), float("inf"), 10**400, "3", True, None)),
        *(edit(mesh=mesh) for mesh in ({"tp": 2**62}, {"tp": 0}, {"tp": -2}, {}, {"tp": 1.5})),
        *(edit(version=version) for version in (2.0, True, "1", 10**6, None)),
        *(edit(outputs=outputs) for outputs in (["S(0, blocks=0)"], ["S(\u0661)"], "R", [[]])),
        *(edit(options=options) for options in ({"fast": True}, {"tokens": "many"}, 3)),
        *(edit(model=model) for model in ("\ud800", "GPT\0", 3)),
        edit(outputs=json.loads("[" * 90 + "]" * 90)),
        edit(overlaps=True),
        text.replace("{", '{"model": "other",', 1),
        text.rstrip()[:-1],
        "[" * 10**6,
        "",
        "null",
    ]

    def tried(changed: str) -> str:
        try:
            Plan.from_json(changed)
        except PlanError:
            return "refused"
        return "read as a plan"

    counts: Counter[str] = Counter()
    for changed in texts:
        note(counts, partial(tried, changed))
    return counts


@row("names of mesh axes that are no ASCII identifiers")
def axes(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()

    def tried(name: str) -> str:
        try:
            Mesh(**{name: 2})
        except PlanError:
            return "refused"
        return "taken"

    names = "t\u0440,\uff54\uff50,d\u00e9,x y,1x,import os,a.b,a\0,\u1d57p".split(",")
    for name in (*names, "", "x" * 100):
        note(counts, partial(tried, name))
    return counts


class _Other(nn.Module):
    """It differs from `Mixed` in one thing, by number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = 13 if number == 0 else 12
        self.embedding, self.up = nn.Embedding(10, width), nn.Linear(width, 24, bias=number != 1)
        self.head = nn.Linear(24, 10)
        self.number = number

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.up(self.embedding(tokens))
        x = torch.relu(x) if self.number == 2 else x.tanh()
        return self.head(x).square().mean()


@row("a plan of another width, without a bias, or with another op, applied to a model")
def other_models(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    tokens = torch.randint(10, (4, 6), generator=torch.Generator().manual_seed(0))
    texts = [
        autoparallel.make_plan(
            _Other(number), 2, example_inputs=tokens, product_weight=1e6
        ).to_json()
        for number in range(4)
    ]

    def tried(of: int, to: int) -> str:
        traced = trace_model(_Other(to), (tokens,), {}, Options())
        try:
            plan = with_graphs(Plan.from_json(texts[of]), traced)
            made = autoparallel.simulate(_Other(to), plan=plan, example_inputs=tokens)
        except AutoParallelError:
            return "refused"
        wanted = autoparallel.simulate(_Other(to), 1, example_inputs=tokens)
        same = torch.allclose(made.output, wanted.output, rtol=1e-5)
        return ("equal" if of == to else "right") if same else "wrong"

    for of in range(4):
        for to in range(4):
            note(counts, partial(tried, of, to))
    return counts
