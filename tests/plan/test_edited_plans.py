"""A plan whose text was edited is refused, equal or right, and never fails in another way."""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import one_of_each
from edited_plans import Edited, Mixed

import autoparallel
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.placement import parse_layout
from autoparallel.plan import Plan
from autoparallel.planning.plan_check import require_sound
from autoparallel.planning.plan_graphs import with_graphs

MESHES: dict[str, tuple[Mesh, dict[str, Any]]] = {
    "one": (Mesh(tp=2), {}),
    "two": (Mesh(dp=2, tp=2), {}),
    "stages": (Mesh(pp=2, tp=2), {"microbatches": 2}),
    "zero bubble": (Mesh(pp=2), {"microbatches": 2, "schedule": "zero_bubble"}),
}


@pytest.fixture(scope="module")
def all_edited() -> dict[str, Edited]:
    return {}


@pytest.fixture
def edited(request: pytest.FixtureRequest, all_edited: dict[str, Edited]) -> Edited:
    """Return the plans on one mesh, made once."""
    name: str = getattr(request, "param", "one")
    if name not in all_edited:
        tokens = torch.randint(10, (4, 6), generator=torch.Generator().manual_seed(0))
        all_edited[name] = Edited(Mixed().double(), tokens, *MESHES[name])
    return all_edited[name]


def changed(edited: Edited, where: str, layout: str) -> str:
    """Return the plan's text with one layout changed, and the conversions that follow from it.

    where: the op's target, which side of it, and the place there.
    """
    target, side, place = where.split()
    rows = json.loads(edited.text)
    op = next(op for op in rows["ops"] if op["target"].startswith(f"aten.{target}."))
    assert op[side][int(place)] != layout
    op[side][int(place)] = layout
    edited.repair(rows)
    return json.dumps(rows)


@pytest.mark.parametrize("edited", one_of_each(MESHES, lambda name: name != "two"), indirect=True)
def test_edits_are_refused_or_right(edited: Edited) -> None:
    outcomes = {words: edited.tried(text) for words, text in edited.edits(seed=7, count=30)}
    bad = {words: kind for words, kind in outcomes.items() if kind not in Edited.GOOD}
    assert not bad
    assert len(set(outcomes.values())) > 1  # or no edit would have come so far


@pytest.mark.fuzz
@pytest.mark.parametrize("edited", MESHES, indirect=True)
def test_many_edits_are_refused_or_right(edited: Edited) -> None:
    count = int(os.environ.get("FUZZ_PROGRAMS", "2000"))
    seed = int(os.environ.get("FUZZ_SEED") or int.from_bytes(os.urandom(4), "big"))
    bad = {}
    for words, text in edited.edits(seed, count):
        try:
            outcome = edited.tried(text)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"{type(error).__name__}: {error}, {Path(place.filename).name}:{place.lineno}"
        if outcome not in Edited.GOOD:
            bad[words] = outcome
    print(seed, dict(edited.counts))
    assert not bad, (seed, bad)


@pytest.mark.parametrize(
    ("where", "layout"),
    [
        ("layer_norm operands 1", "I"),
        ("layer_norm operands 2", "S(0)"),
        ("linear operands 0", "I"),
        ("linear operands 1", "P"),
        ("matmul operands 1", "R"),
        ("reshape results 0", "R"),
        ("reshape results 0", "S(3)"),
        ("transpose results 0", "S(0)"),
        ("embedding results 0", "P"),
        ("dropout results 0", "I"),
        ("cross_entropy_loss operands 0", "S(1)"),
        ("add operands 0", "P"),
    ],
)
def test_a_layout_that_no_rule_allows_is_refused_by_name(
    edited: Edited, where: str, layout: str
) -> None:
    text = changed(edited, where, layout)
    plan = with_graphs(Plan.from_json(text), edited.traced)
    with pytest.raises(PlanError) as caught:
        require_sound(plan, edited.model)
    target = where.split()[0]
    assert f"aten.{target}" in str(caught.value)
    assert ".py:" in caught.value.where


@pytest.mark.parametrize("edited", ["stages"], indirect=True)
@pytest.mark.parametrize(
    ("place", "content", "why"),
    [
        ("ops 5 reads 0", "other", "it reads, or makes, other values"),
        ("ops 5 name", "other", "its ops are not those of the model"),
        ("parameters 1 path", "other", "its parameters are not those of the model"),
        ("parameters 1 shape", [7], "it is "),
        ("conversions 0 value", "other", "nothing reads it so"),
        ("outputs 1", "R | I", "there is none, and return reads it so"),
        ("outputs", [], "it returns 2 tensors"),
    ],
)
def test_a_plan_with_stages_is_checked_by_name(
    edited: Edited, place: str, content: Any, why: str
) -> None:
    rows = json.loads(edited.text)
    del rows["returned"]  # as in older texts, or outputs would be compared with it
    *way, last = [int(step) if step.isdecimal() else step for step in place.split()]
    owner = rows
    for step in way:
        owner = owner[step]
    assert owner[last] != content
    owner[last] = content
    plan = with_graphs(Plan.from_json(json.dumps(rows)), edited.traced)
    with pytest.raises(PlanError, match="cannot be followed") as caught:
        require_sound(plan, edited.model)
    assert why in caught.value.why


@pytest.mark.parametrize("edited", MESHES, indirect=True)
def test_the_planners_own_text_is_followed(edited: Edited) -> None:
    require_sound(with_graphs(Plan.from_json(edited.text), edited.traced), edited.model)


@pytest.mark.parametrize("edited", ["stages"], indirect=True)
def test_a_conversion_of_stages_begins_where_its_value_is_made(edited: Edited) -> None:
    """One that begins elsewhere, by steps that are possible from there, is refused by its value."""
    rows = json.loads(edited.text)
    row = next(row for row in rows["conversions"] if row["source"].endswith("| P"))
    made, target = row["source"], row["target"]
    row["source"] = f"{made[:-1]}R" if not target.endswith("R") else f"{made[:-1]}I"
    row["steps"] = [[1, row["source"][-1], target.split(" | ")[1]]]
    plan = with_graphs(Plan.from_json(json.dumps(rows)), edited.traced)
    with pytest.raises(PlanError, match="cannot be followed") as caught:
        require_sound(plan, edited.model)
    assert row["value"] in str(caught.value)
    assert "it is made as" in caught.value.why


def test_a_plan_changed_in_memory_is_checked(edited: Edited) -> None:
    """The planner's own plan is taken as it is; a copy with a change is another plan."""
    assert edited.plan.is_checked
    ops = list(edited.plan.ops)
    norm = next(i for i, op in enumerate(ops) if op.target.startswith("aten.layer_norm."))
    operands = (ops[norm].operands[0], parse_layout("P"), ops[norm].operands[2])
    ops[norm] = replace(ops[norm], operands=operands)
    plan = replace(edited.plan, ops=tuple(ops))
    assert not plan.is_checked
    with pytest.raises(PlanError, match="cannot be followed"):
        edited.run(plan)
    with pytest.raises(PlanError, match="cannot be followed"):
        autoparallel.apply_plan(edited.model, plan)


def test_kernels_are_those_of_the_rule(edited: Edited) -> None:
    rows = json.loads(edited.text)
    for name in ("cross_entropy_classes", "os.system"):
        rows["ops"][0]["kernels"] = [name]
        assert edited.tried(json.dumps(rows)) == "refused"


def edit(text: str, **changes: Any) -> str:
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "change",
    {
        "not a number": lambda text: edit(text, cost=float("nan")),
        "infinite": lambda text: edit(text, seconds=float("inf")),
        "reads as infinite": lambda text: text.replace(
            '"product_weight": 1', '"product_weight": 1e9991'
        ),
        "huge whole number": lambda text: edit(text, cost=10**400),
        "huge size": lambda text: edit(text, mesh={"tp": 2**62}),
        "number for a text": lambda text: edit(text, method=3),
        "text for a number": lambda text: edit(text, cost="3"),
        "truth for a number": lambda text: edit(text, cost=True),
        "truth for a version": lambda text: edit(text, version=2.0),
        "unknown key": lambda text: edit(text, overlaps=True),
        "unknown option": lambda text: edit(text, options={"fast": True}),
        "option of another type": lambda text: edit(text, options={"tokens": "many"}),
        "key twice": lambda text: text.replace("{", '{"model": "other",', 1),
        "nested": lambda text: edit(text, outputs=json.loads("[" * 90 + "]" * 90)),
        "nested without end": lambda text: "[" * 10**6,
        "part in a part": lambda text: edit(
            text,
            parts=[
                {"paths": ["a"], "plan": {**json.loads(text), "parts": [{"paths": [], "plan": {}}]}}
            ],
        ),
        "other digits": lambda text: edit(text, outputs=["S(\u0661)"]),
        "no blocks": lambda text: edit(text, outputs=["S(0, blocks=0)"]),
        "letters that look alike": lambda text: edit(text, mesh={"t\u0440": 2}),
        "half of a letter": lambda text: edit(text, model="\ud800"),
        "end of a text": lambda text: edit(text, model="GPT\0"),
        "no text": lambda text: text.encode(),
    }.items(),
    ids=lambda change: change[0],
)
def test_what_is_no_plan_is_refused(edited: Edited, change: tuple[str, Any]) -> None:
    text = change[1](edited.text)
    assert text != edited.text
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_axes_have_ascii_names() -> None:
    """Python takes fullwidth letters for plain ones: two axes would become one variable."""
    for name in ("t\u0440", "\uff54\uff50", "d\u00e9", "x" * 100):
        with pytest.raises(PlanError, match="ASCII"):
            Mesh(**{name: 2})
