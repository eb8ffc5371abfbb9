"""Attention whose sequence is split: keys are gathered, or passed round; and which of these is
planned.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attends import case
from broad_cases import broad
from families import relative_error, worst_gradient
from forced_kernels import only_by
from processes import run_processes
from releases import attention_in_float64_without_data
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional

import autoparallel
from autoparallel.analysis.timeline import timeline
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan

TOLERANCE = 1e-10
RING, QUERIES = "attention_ring", "attention_queries"
ATTENTION = "aten.scaled_dot_product_attention.default"


def planned(kind: str, mesh: Mesh, kernel: str) -> Plan:
    model, inputs = case(kind)
    with only_by(kernel, ranks=dict(mesh.axes)["cp"]):
        plan = autoparallel.make_plan(model, mesh=mesh, example_inputs=inputs, data_parallel=True)
    assert [kernel in op.kernels for op in plan.ops if op.target == ATTENTION] == [True]
    return plan


def unsplit(kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model, inputs = case(kind)
    loss = model(**inputs)
    loss.backward()
    gradients = {path: p.grad for path, p in model.named_parameters()}
    return loss.detach(), gradients


CASES = [
    ("causal", RING, Mesh(cp=2)),
    ("causal", RING, Mesh(cp=3)),
    ("causal", QUERIES, Mesh(cp=4)),
    ("plain", RING, Mesh(cp=4)),
    ("padding", RING, Mesh(cp=3)),
    ("bias", RING, Mesh(cp=2)),
    ("causal", RING, Mesh(cp=3, tp=2)),
]


@pytest.mark.parametrize(("kind", "kernel", "mesh"), CASES, ids=str)
def test_split_attention_is_the_users(kind: str, kernel: str, mesh: Mesh) -> None:
    """A sequence of 11 divides by no number of ranks."""
    plan = planned(kind, mesh, kernel)
    model, inputs = case(kind)
    made = autoparallel.simulate(model, plan=plan, example_inputs=inputs)
    loss, gradients = unsplit(kind)
    assert relative_error(made.output.detach(), loss) < TOLERANCE
    error, where = worst_gradient(dict(made.gradients), gradients)
    assert error < TOLERANCE, where


def run_on_gloo(rank: int, is_compiled: bool) -> list[Any]:
    """Errors of a process' step, and graph breaks of a compiled one."""
    plan = planned("causal", Mesh(cp=2), RING)
    loss, gradients = unsplit("causal")
    model, inputs = case("causal")
    module = autoparallel.apply_plan(model, plan)
    call: Any = module
    if is_compiled:
        call = torch.compile(module, backend="aot_eager", fullgraph=True)
    counters.clear()
    result = call(**inputs)
    result.backward()
    whole = {path: p.grad.full_tensor() for path, p in module.named_parameters()}
    errors = [relative_error(result.detach(), loss), worst_gradient(whole, gradients)[0]]
    return [*errors, len(counters["graph_break"])]


@pytest.mark.parametrize(
    "is_compiled", [*broad(False), pytest.param(True, marks=attention_in_float64_without_data)]
)
def test_keys_are_passed_between_processes(is_compiled: bool) -> None:
    """By gloo; and when compiled."""
    for *errors, breaks in run_processes(run_on_gloo, 2, is_compiled):
        assert max(errors) < TOLERANCE
        assert breaks == 0


class Long(nn.Module):
    """Attention of Llama-3's 8B: 32 heads, 8 of keys, behind and before its products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4096, 6144, bias=False), nn.Linear(4096, 4096, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.up(x).split((4096, 1024, 1024), -1)
        q, k, v = (t.unflatten(-1, (-1, 128)).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.down(y.transpose(1, 2).flatten(2)).float().square().mean()


@pytest.mark.parametrize(("length", "kernel"), [(131072, RING), (2048, QUERIES)])
def test_the_cheaper_way_is_planned(length: int, kernel: str) -> None:
    """On 16 nodes, keys that are passed round hide behind long attention; short ones are gathered.

    Heads are on another axis already, so that they cannot be split once more.
    """
    with torch.device("meta"):
        model = Long().to(torch.bfloat16)
        x = torch.zeros(1, length, 4096, dtype=torch.bfloat16)
    plan = autoparallel.make_plan(
        model,
        mesh=Mesh(cp=16, tp=8),
        example_inputs=x,
        hardware="dgx-h100",
        layout="sequence:cp, heads:tp",
    )
    (op,) = [op for op in plan.ops if op.target == ATTENTION]
    assert op.kernels == (kernel, "")
    (event,) = [e for e in timeline(plan).events if e.name == op.name and e.phase == "forward"]
    assert event.seconds == pytest.approx(op.forward_seconds)
