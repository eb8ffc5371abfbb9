"""Plans and parallel modules for torch.fx and networkx: what is handed over, what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from broken_models import build as build_broken
from broken_models import inputs as broken_inputs
from families import build, inputs_for, loss_and_logits
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.parallel.state_dicts import full_state_dict
from autoparallel.plan import Plan
from autoparallel.support.pytree import flatten


def flat(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    return flatten(dict(bind_inputs(model, (), inputs).arguments))[0]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autoparallel.make_plan(build("gpt"), mesh=Mesh(dp=2, tp=2), example_inputs=INPUTS)


INPUTS = inputs_for("gpt")


def test_a_graph_without_weights_is_on_the_meta_device(plan: Plan) -> None:
    """Of a plan, of its graph, and of a rank; shapes are those of the model, or of its parts."""
    model = build("gpt")
    for module in (autoparallel.to_fx(plan), autoparallel.to_fx(plan.captured.graph)):
        for path, parameter in module.named_parameters():
            assert parameter.is_meta
            assert parameter.shape == model.get_parameter(path).shape
    part = autoparallel.to_fx(plan, rank=3)
    numels = [sum(p.numel() for p in m.parameters()) for m in (part, model)]
    assert numels[0] < numels[1]
    outputs = autoparallel.to_fx(plan)(*(t.to("meta") for t in flat(model, INPUTS)))
    assert [output.dim() for output in outputs] == [0, 3]


def test_a_rank_alone_does_not_wait_for_the_others(plan: Plan) -> None:
    """It says that no other rank runs."""
    module = autoparallel.to_fx(plan, build("gpt"), rank=0)
    with pytest.raises(PlanError, match="no other rank runs"):
        module(*flat(build("gpt"), INPUTS))


@cache
def with_adam() -> Plan:
    """ZeRO-1 beside tensor parallelism: parameters are gathered again after every step."""
    return autoparallel.make_plan(
        build("gpt", dropout=0.2), mesh=Mesh(dp=2, tp=2), example_inputs=INPUTS, optimizer="adam",
        constraints=["blocks.*.weight on dp is whole"],
    )  # fmt: skip


def train(rank: int) -> list[Any]:
    """Two steps by the parallel module and by its program in torch.fx; the weights afterwards."""
    torch.set_num_threads(1)
    found: list[Any] = []
    model, plan = build("gpt", dropout=0.2), with_adam()
    for by_fx in (False, True):
        parallel = autoparallel.apply_plan(model, plan)
        autoparallel.manual_seed(parallel, 5)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01)
        module = autoparallel.to_fx(parallel) if by_fx else None
        losses = []
        for _ in range(3):
            loss = (
                loss_and_logits(parallel(**INPUTS))[0]
                if module is None
                else module(*flat(model, INPUTS))[0]
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append((losses, full_state_dict(parallel)))
    return found


def test_a_parallel_module_trains_by_its_program_as_by_itself() -> None:
    """On four processes: losses, dropout masks and weights after three steps, bit for bit."""
    results = run_processes(train, 4, before=with_adam)
    for (losses, weights), (own_losses, own_weights) in results:
        assert own_losses == losses
        assert len(set(losses)) == 3
        for path, weight in weights.items():
            assert torch.equal(own_weights[path], weight), path


def test_the_program_of_the_mode_is_given() -> None:
    """In eval mode after the first call in it; before that, the error says to call."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    x = torch.ones(4, 8)
    parallel = autoparallel.autoparallelize(model, 1, example_inputs=x)
    names = [node.name for node in autoparallel.to_fx(parallel).graph.nodes]
    assert "dropout" in names
    parallel.eval()
    with pytest.raises(PlanError, match="has 0 programs in eval mode"):
        autoparallel.to_fx(parallel)
    expected = parallel(x)
    module = autoparallel.to_fx(parallel)
    assert "dropout" not in [node.name for node in module.graph.nodes]
    assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("export", [autoparallel.to_fx, autoparallel.to_networkx])
def test_plans_without_one_graph_are_refused(plan: Plan, export: Any) -> None:
    """Those read from JSON, and those in parts, whose parts can be exported one by one."""
    with pytest.raises(PlanError, match="has no graph") as caught:
        export(Plan.from_json(plan.to_json()))
    assert "make_plan" in caught.value.fix
    broken = autoparallel.make_plan(build_broken("Branches"), 2, example_inputs=broken_inputs())
    with pytest.raises(PlanError, match="parts, each with its own graph") as caught:
        export(broken)
    assert "part.plan for part in plan.parts" in caught.value.fix
    assert all(export(part.plan) is not None for part in broken.parts)


def test_what_says_nothing_is_refused(plan: Plan) -> None:
    """A rank of a graph or of a module, a rank that the mesh lacks."""
    with pytest.raises(PlanError, match="a rank beside a graph"):
        autoparallel.to_fx(plan.captured.graph, rank=0)
    with pytest.raises(PlanError, match="beside a module"):
        autoparallel.to_fx(nn.Linear(2, 2), rank=0)
    with pytest.raises(PlanError, match="rank 4 of"):
        autoparallel.to_fx(plan, rank=4)


def test_the_dataflow_of_a_plan_adds_up_to_the_plan(plan: Plan) -> None:
    """Seconds of nodes and edges, placements of all that is made, conversions of all readers."""
    flow = autoparallel.to_networkx(plan)
    nodes = dict(flow.nodes(data=True))
    for op in plan.ops:
        assert nodes[op.name]["placements"] == tuple(
            " | ".join(map(str, layout)) for layout in op.results
        )
        total = nodes[op.name]["forward_seconds"] + nodes[op.name]["backward_seconds"]
        assert total == pytest.approx(op.seconds, rel=1e-12)
    seconds = sum(attributes["seconds"] for _, _, attributes in flow.edges(data=True))
    assert seconds == pytest.approx(sum(c.seconds for c in plan.conversions), rel=1e-12)
    assert seconds > 0
    told = sum(len(attributes["conversions"]) for _, _, attributes in flow.edges(data=True))
    assert told == sum(len(conversion.readers) for conversion in plan.conversions)
    for parameter in plan.parameters:
        assert nodes[parameter.name]["path"] == parameter.path
        assert nodes[parameter.name]["nbytes"] == parameter.nbytes
