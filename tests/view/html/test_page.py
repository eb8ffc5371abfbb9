"""The page of a plan: what it says in data, and that it is one file that asks for nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import broad
from torch import nn

import autoparallel
from autoparallel.analysis.communication import transfers
from autoparallel.plan import Plan
from autoparallel.questions.explain import Explainer
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.view.html.module_tree import module_tree
from autoparallel.view.html.page import page_text
from autoparallel.view.html.page_data import page_data

ROOT = Path(__file__).parents[3]


@cache
def plan_of_gpt(weight: float | None = None) -> Plan:
    """Three layers on two axes."""
    config = GPTConfig(layers=3, hidden=48, heads=4, vocabulary=210, positions=32, dropout=0.0)
    tokens = torch.zeros(4, 10, dtype=torch.long)
    mesh = autoparallel.Mesh(dp=2, tp=2)
    return autoparallel.make_plan(
        GPT(config), mesh=mesh, example_inputs=(tokens, tokens), product_weight=weight
    )


@cache
def data() -> dict[str, Any]:
    return page_data(plan_of_gpt(), {"linear_product": ("Because it was asked for.",)})


def modules(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [tree, *(one for child in tree.get("c", []) for one in modules(child))]


def op(name: str) -> dict[str, Any]:
    row: dict[str, Any] = next(one for one in data()["elements"] if one["n"] == name)
    return row


def test_every_op_is_drawn_once_in_its_module() -> None:
    """And everything else that is drawn is in one place, too."""
    plan = plan_of_gpt()
    elements = data()["elements"]
    assert [one["n"] for one in elements if one["k"] == "op"] == [one.name for one in plan.ops]
    places = [number for module in modules(data()["tree"]) for number in module.get("e", [])]
    assert sorted(places) == list(range(len(elements)))
    where = {
        elements[number]["n"]: module["p"]
        for module in modules(data()["tree"])
        for number in module.get("e", [])
        if elements[number]["k"] == "op"
    }
    assert {one.name: one.where for one in plan.ops}.items() <= where.items()


def test_every_collective_is_drawn() -> None:
    """But for gradients that are summed together at the end, which are told of the parameters."""
    plan = plan_of_gpt()
    parameters = {parameter.name for parameter in plan.parameters}
    planned = sorted(
        (one.phase, plan.mesh.axes[one.step.axis][0], one.collective.value.replace("_", "-"))
        for one in transfers(plan)
        if not (one.conversion.value in parameters and one.conversion.together)
    )
    drawn = sorted(tuple(move[:3]) for one in data()["elements"] for move in one.get("moves", []))
    assert drawn == planned


def test_edges_lead_from_makers_to_readers() -> None:
    """Through the collective where there is one."""
    elements, edges = data()["elements"], data()["edges"]
    number = {one["n"]: at for at, one in enumerate(elements) if one["k"] == "op"}
    reach: dict[int, set[int]] = {}
    for source, target in edges:
        assert source != target
        reach.setdefault(source, set()).add(target)
    for one in plan_of_gpt().ops:
        for value in one.reads:
            maker = next((other for other in plan_of_gpt().ops if value in other.makes), None)
            if maker is None:
                continue
            direct = reach[number[maker.name]]
            behind = {
                far for near in direct if elements[near]["k"] == "sync" for far in reach[near]
            }
            assert number[one.name] in direct | behind


def test_an_op_is_told_in_full() -> None:
    """Shapes in sizes and in threads, placements, cost, source, threads, alternatives and more."""
    row = op("linear_product")
    _, shape, threads, layout = row["out"][0]
    assert shape == "float32[batch, sequence, 144]"
    assert threads == "[batch, sequence, fused parts * heads * head size]"
    assert layout
    assert row["s"][0] > row["s"][1] > 0
    assert re.fullmatch(r"[\w.]+\.py:\d+", row["line"])
    assert ["hidden", "summed", "", 0] in row["loops"]
    assert row["why"] == ["Because it was asked for."]
    assert data()["parameters"][row["params"][0]][0] == "blocks.0.attention.query_key_value.weight"
    told = [what for what, *_ in row["alt"]]
    assert told
    assert len(told) == len(set(told))
    for _, seconds, anew, why in row["alt"]:
        assert seconds > 0
        assert anew is not None
        assert why


@pytest.mark.parametrize("weight", [*broad(None), 1024.0])
def test_parameters_and_collectives_have_alternatives(weight: float | None) -> None:
    """The best of them are those that `explain` tells, and cost as much more.

    Where products count more than their seconds, both tell the weighted cost, and the page says so.
    """
    plan = plan_of_gpt(weight)
    shown_data = page_data(plan, {})
    assert shown_data["weight"] == (weight or 1.0)
    explainer = Explainer(plan)
    syncs = [one for one in shown_data["elements"] if one["k"] == "sync"]
    told = {f"collective {one['n']}": one["alt"] for one in syncs}
    told |= {row[0]: row[-1] for row in shown_data["parameters"]}
    for name in list(told)[: len(syncs) + 4]:
        shown = {text: seconds for text, seconds in told[name] if seconds is not None}
        if name.startswith("collective"):
            assert len(told[name]) == 2
        assert list(shown.values()) == sorted(shown.values())
        known = {one.text: one.added_cost for one in explainer.explain(name).alternatives}
        both = {*shown} & {*known}
        assert both
        for text in both:
            # Both are differences of whole costs: so much of one is rounding.
            assert shown[text] == pytest.approx(known[text], abs=1e-11 * plan.cost)


def test_collectives_say_why() -> None:
    """A sentence for each pass that it runs in."""
    rows = [one for one in data()["elements"] if one["k"] == "sync"]
    assert rows
    for row in rows:
        assert len(row["why"]) >= len(row["moves"]), row


def test_equal_modules_are_a_run() -> None:
    """The layers are, as they are planned alike; what is in one is no run."""
    (blocks,) = [module for module in modules(data()["tree"]) if module["p"] == "blocks"]
    assert blocks["r"] == [["{0..2}", 0, 3]]
    assert sum("r" in module for module in modules(data()["tree"])) == 1


def test_modules_that_differ_are_no_run() -> None:
    """Nor are those whose numbers do not follow each other."""
    tree = module_tree(["a.0", "a.1", "a.3", "b.0", "b.1"], ["mm", "mm", "mm", "mm", "add"])
    assert tree.children["a"].runs == [("{0..1}", ("0", "1"))]
    assert tree.children["b"].runs == []


def test_the_page_is_one_file_that_asks_for_nothing() -> None:
    """No address but in comments of licences, and a policy that forbids to ask."""
    text = page_text(plan_of_gpt())
    assert "default-src 'none'" in text
    head = text.partition('<script type="application/octet-stream"')[0]
    assert re.findall(r"(?:src|href)=\"?([^\" >]*)", head) == ["data:,"]
    assert "url(" not in head
    assert "@import" not in head
    for name in ("cytoscape", "@dagrejs/dagre", "fflate"):
        assert name in text
    packed = re.search(r'id="data">\n(.*?)\n</script>', text, re.DOTALL)
    assert packed is not None
    read = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    assert read["model"] == "GPT"
    assert text == page_text(plan_of_gpt())


def test_a_plan_that_was_read_has_a_page(tmp_path: Path) -> None:
    """Without what needs the graph, and it says so."""
    read = Plan.from_json(plan_of_gpt().to_json())
    autoparallel.write_html(read, tmp_path / "plan.html")
    rows = page_data(read, {})
    assert rows["threads"] == ""
    assert rows["memory"]["rows"]
    assert not rows["memory"]["items"]
    assert len(rows["elements"]) >= len(read.ops)


def test_a_plan_for_one_rank_has_a_page() -> None:
    """Nothing moves, and there is nothing to choose."""
    rows = page_data(
        autoparallel.make_plan(nn.Linear(8, 8), 1, example_inputs=torch.ones(4, 8)), {}
    )
    assert {one["k"] for one in rows["elements"]} == {"op", "input"}
    assert not any("alt" in one for one in rows["elements"])


class Stays(nn.Module):
    """A Stays model cannot be traced whole, its two layers can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y.new_tensor(y.detach().numpy()) + y).sum()


def test_a_plan_in_parts_has_a_page() -> None:
    """The ops of each part have shapes and threads, and what stays Python is told."""
    plan = autoparallel.make_plan(Stays(), 2, example_inputs=torch.ones(4, 8))
    assert plan.parts
    rows = page_data(plan, {})
    assert len(rows["stays"]) == 1
    shapes = [one["out"][0][2] for one in rows["elements"] if one["k"] == "op"]
    assert shapes
    assert all(shapes)


def test_the_bundle_is_of_its_sources() -> None:
    """Whoever changes a source or a pin builds again, with `make page`."""
    web, built = ROOT / "web", ROOT / "autoparallel" / "view" / "html"
    digest = hashlib.sha256()
    for path in (web / "package.json", *sorted((web / "src").glob("*"))):
        digest.update(path.read_bytes())
    assert f"//sources {digest.hexdigest()}\n" in (built / "page.js").read_text()
    pins = json.loads((web / "package.json").read_text())["dependencies"]
    for name, version in pins.items():
        assert f"{name} {version} (MIT)" in (built / "LICENCES.txt").read_text()


@pytest.mark.parametrize("name", ["page.html", "page.css", "page.js", "LICENCES.txt"])
def test_what_the_page_needs_is_package_data(name: str) -> None:
    """It is listed for the wheel."""
    assert f'"{name}"' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "autoparallel" / "view" / "html" / name).stat().st_size
