"""Models with routed experts, split in every way: loss and gradients are the unsplit module's."""

from __future__ import annotations

from functools import cache
from typing import Any

import expert_families
import pytest
import torch
from broad_cases import one_of_each
from families import Float64, relative_error, worst_gradient
from processes import run_processes
from torch._dynamo.utils import counters

import autoparallel
from autoparallel.graph.row_program import ROUTED
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan

TOLERANCE = 1e-10
SENT, SUMMED, INNER = "experts_exchanged", "experts_summed", "experts_inner"


def planned(name: str, kinds: tuple[str, ...], mesh: Mesh) -> Plan:
    """The plan whose experts are split in these ways, see `expert_families.only`."""
    with Float64(), expert_families.only(*kinds):
        model, inputs = expert_families.build(name), expert_families.inputs_for()
        return autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs)


@cache
def unsplit(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the user's own module, with experts one by one."""
    with Float64():
        model = expert_families.build(name, "eager")
        loss = model(**expert_families.inputs_for())["loss"]
        loss.backward()
    return loss.detach(), {path: p.grad for path, p in model.named_parameters()}


def kernels_of(plan: Plan) -> list[tuple[str, ...]]:
    return [op.kernels for op in plan.ops if op.target == ROUTED]


CASES = [
    ("mixtral", (SENT,), Mesh(ep=2)),
    ("deepseek-v3", ("", SENT), Mesh(ep=3)),
    ("top-one", ("", "", SENT), Mesh(ep=4)),
    ("mixtral-batched", ("", "", "", "", "", "", SENT), Mesh(ep=8)),
    ("qwen3-moe", (SENT,), Mesh(outer=2, inner=2)),
    ("gpt-oss", (SENT, INNER), Mesh(ep=2, tp=3)),
    ("top-one", ("f",), Mesh(tp=2)),
    ("listed", ("", SENT), Mesh(ep=3)),
    ("listed-put", (INNER,), Mesh(tp=2)),
]
# Experts exchanged on one axis and on two, and each split by itself.
KEPT = [CASES[0], CASES[4], CASES[6]]
MORE = [
    ("qwen3-moe", (SENT,), Mesh(ep=2)),
    ("gpt-oss", (SENT,), Mesh(ep=2)),
    ("mixtral", ("b", SENT), Mesh(dp=2, ep=3)),
    ("mixtral", (SENT, SUMMED), Mesh(ep=2, tp=3)),
    ("deepseek-v3", (SUMMED,), Mesh(ep=2)),
]


def compare(name: str, kinds: tuple[str, ...], mesh: Mesh) -> None:
    plan = planned(name, kinds, mesh)
    sizes = [size for _, size in mesh.axes]
    wanted = (kinds[size - 2] for size in sizes)
    expected = tuple(kind if kind.startswith("experts") else "" for kind in wanted)
    assert [row or ("",) * len(sizes) for row in kernels_of(plan)] == [expected]
    with Float64():
        model, inputs = expert_families.build(name), expert_families.inputs_for()
    made = autoparallel.simulate(model, plan=plan, example_inputs=inputs)
    loss, gradients = unsplit(name)
    assert relative_error(made.output["loss"].detach(), loss) < TOLERANCE
    error, where = worst_gradient(dict(made.gradients), gradients)
    assert error < TOLERANCE, where


@pytest.mark.parametrize(("name", "kinds", "mesh"), one_of_each(CASES, KEPT.__contains__), ids=str)
def test_split_experts_equal_the_users(name: str, kinds: tuple[str, ...], mesh: Mesh) -> None:
    """Every family, sent by 2, 3, 4 and 8 ranks; on two axes, and beside other splits."""
    compare(name, kinds, mesh)


@pytest.mark.broad
@pytest.mark.parametrize(("name", "kinds", "mesh"), MORE, ids=str)
def test_split_experts_equal_the_users_everywhere(
    name: str, kinds: tuple[str, ...], mesh: Mesh
) -> None:
    compare(name, kinds, mesh)


def run_on_gloo(rank: int, name: str) -> list[Any]:
    """The errors of a process' step, eager and compiled, and the compiled step's graph breaks."""
    plan = planned(name, (SENT,), Mesh(ep=2))
    loss, gradients = unsplit(name)
    inputs = expert_families.inputs_for()
    rows: list[Any] = [kernels_of(plan)]
    with Float64():
        module = autoparallel.apply_plan(expert_families.build(name), plan)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for call in (module, compiled):
        counters.clear()
        module.zero_grad()
        result = call(**inputs)["loss"]
        result.backward()
        whole = {path: p.grad.full_tensor() for path, p in module.named_parameters()}
        rows.append(relative_error(result.detach(), loss))
        rows.append(worst_gradient(whole, gradients)[0])
    return [*rows, len(counters["graph_break"])]


def test_tokens_are_sent_between_processes() -> None:
    """By gloo; and when compiled, where sizes must not depend on the choices."""
    for kernels, *errors, breaks in run_processes(run_on_gloo, 2, "top-one"):
        assert kernels == [(SENT,)]
        assert max(errors) < TOLERANCE
        assert breaks == 0
