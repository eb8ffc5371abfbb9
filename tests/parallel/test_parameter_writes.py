"""What a forward writes to parameters reaches their parts: losses and parameters, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from planned_models import WAYS, WIDTH, Base, Momentum
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import state_of
from autoparallel.placement import whole_layout
from autoparallel.plan import Plan
from autoparallel.planning.replan import Replanner
from autoparallel.runtime.joint_moves import gathered
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks

TOLERANCE = 1e-12
Result = tuple[list[float], dict[str, torch.Tensor]]


def build(how: str) -> Momentum:
    torch.manual_seed(0)
    return Momentum(how).double()


def batches(rows: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, WIDTH, generator=generator).double() for _ in range(4)]


def train(model: nn.Module) -> list[float]:
    """The losses of four steps of Adam."""
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for x in batches():
        loss = model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def unsplit(how: str) -> Result:
    model = build(how)
    return train(model), {path: own.detach() for path, own in model.named_parameters()}


def whole_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter put together. A collective call."""
    state, wholes = state_of(module), {}
    for path, parameter in module.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        layouts = state.parameters[path]
        whole = whole_layout(len(layouts.state))
        (wholes[path],) = gathered(
            [local.detach()], [layouts.state], [whole], [layouts.shape], state.ranks
        )
    return wholes


def on_ranks(model: nn.Module, plan: Plan) -> list[Result]:
    """What each simulated rank has after training."""

    def work(ranks: Ranks) -> Result:
        planner = Replanner(plan.model, plan.mesh, plan.options)
        module = parallel_module(model, plan, ranks, None, planner, 0)
        return train(module), whole_parameters(module)

    return run_ranks(thread_ranks(plan.mesh, in_turn=True), work)


def require_equal(results: list[Result], expected: Result) -> None:
    losses, parameters = expected
    for own_losses, own_parameters in results:
        assert own_losses == pytest.approx(losses, rel=TOLERANCE)
        for path, value in parameters.items():
            assert torch.allclose(own_parameters[path], value, rtol=0, atol=TOLERANCE), path


@pytest.mark.parametrize("world_size", [*broad(1, 2), 3])
@pytest.mark.parametrize("how", share_of(WAYS, 2))
def test_writes_reach_the_split_parameters(how: str, world_size: int) -> None:
    """Of split, unevenly split and whole ones; the optimizer goes on with what was written."""
    options: dict[str, Any] = {"example_inputs": batches()[0]}
    if how == "clamped" and world_size > 1:  # the only one planned whole: it is split evenly
        options["constraints"] = ("teacher.0.weight is split", "teacher.2.bias is whole")
    plan = autoparallel.make_plan(build(how), world_size, **options)
    assert bool(plan.breaks) != (how == "clamped")  # which comes before the program
    if world_size > 1:
        kept = {plan.storage[path] for path in ("teacher.0.weight", "teacher.2.bias")}
        assert len(kept) == 2  # one is split, one is whole
    require_equal(on_ranks(build(how), plan), unsplit(how))


@pytest.mark.parametrize(
    "how", ["in place", "data", "assigned data", "clamped", "normalized", "numpy"]
)
def test_writes_reach_parts_of_copies(how: str) -> None:
    """On two axes, where ranks keep less of a parameter than computes (ZeRO)."""
    mesh = Mesh(dp=2, tp=2)
    plan = autoparallel.make_plan(build(how), mesh=mesh, example_inputs=batches()[0])
    require_equal(on_ranks(build(how), plan), unsplit(how))


def in_processes(rank: int) -> list[float]:
    """Every way to write on real processes, where parameters are DTensors."""
    every = []
    for how in WAYS:
        module = autoparallel.autoparallelize(build(how), 2, example_inputs=batches()[0])
        assert all(isinstance(own, DTensor) for own in module.parameters())
        result = train(module), whole_parameters(module)
        require_equal([result], unsplit(how))
        every += result[0]
    return every


@pytest.mark.broad
def test_writes_on_two_processes() -> None:
    first, second = run_processes(in_processes, 2, timeout_seconds=900)
    assert first == second


class Refused(Base):
    """Does to a parameter what a split one cannot follow."""

    def __init__(self, do: Any) -> None:
        super().__init__()
        self.do = do

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.detach().sum()) != 0.123:
            self.do(self)
        return self.loss(x)


def _other(model: Any) -> None:
    model.first.weight = nn.Parameter(torch.zeros_like(model.first.weight))


def _smaller(model: Any) -> None:
    model.first.bias.data = torch.zeros(1).double()


def _aliased(model: Any) -> None:
    model.first.bias.data = model.shared


def _frozen(model: Any) -> None:
    model.first.weight.requires_grad_(False)


def _moved(model: Any) -> None:
    with torch.no_grad():
        model.first.weight.set_(torch.zeros(12, WIDTH).double())


@pytest.mark.parametrize("do", [_other, _smaller, _aliased, _frozen, _moved])
def test_what_split_parameters_cannot_follow_is_refused(do: Any) -> None:
    """By the parameter's name."""
    torch.manual_seed(1)
    model = Refused(do).double()
    model.register_buffer("shared", torch.ones(12).double())
    with pytest.raises(AutoParallelError, match=r"first\.(weight|bias)"):
        autoparallel.simulate(model, 2, example_inputs=batches()[0])


def test_the_unsplit_model_learns() -> None:
    """And its teacher follows: there is something to compare."""
    model = build("in place")
    before = {path: own.detach().clone() for path, own in model.named_parameters()}
    train(model)
    after = dict(model.named_parameters())
    still = [path for path, value in before.items() if torch.equal(after[path], value)]
    assert all(path.startswith(("first", "second")) for path in still)
