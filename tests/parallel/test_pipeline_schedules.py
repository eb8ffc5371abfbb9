"""Every schedule that torch offers trains the model that one process trains."""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broad_cases import broad
from pipeline_models import MODELS, batch_of
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor
from traces import trace_ahead

import autoparallel
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.parallel.pipeline_run import PipelineRun
from autoparallel.parallel.stage_module import StageModule
from autoparallel.plan import Plan

TOLERANCE = 1e-11
STEPS = 2
MORE_STEPS = {"zero bubble": 8}
# By name: the model, the axes of the mesh, micro-batches, and the other options.
CASES: dict[str, tuple[str, dict[str, int], int, dict[str, Any]]] = {
    "gpipe, two on each": ("Language", {"pp": 2}, 3, {"schedule": "gpipe", "stages_per_rank": 2}),
    "1f1b, two on each": ("Language", {"pp": 2}, 4, {"schedule": "1f1b", "stages_per_rank": 2}),
    "zero bubble": ("Language", {"pp": 2}, 4, {"schedule": "zero_bubble"}),
    "zero bubble, two on each": (
        "Masked",
        {"pp": 2},
        4,
        {"schedule": "zero_bubble", "stages_per_rank": 2},
    ),
    "zero bubble, frozen stages": ("Frozen", {"pp": 2}, 4, {"schedule": "zero_bubble"}),
    "zero bubble, recomputed": (
        "Language",
        {"pp": 2},
        2,
        {"schedule": "zero_bubble", "recompute": "full"},
    ),
    "zero bubble, weights apart": ("Apart", {"pp": 2}, 2, {"schedule": "zero_bubble"}),
    "zero bubble, a layer twice": ("Twice", {"pp": 2}, 2, {"schedule": "zero_bubble"}),
    "zbv": ("Language", {"pp": 2}, 5, {"schedule": "zbv", "stages_per_rank": 2}),
    "dualpipev": ("Language", {"pp": 2}, 5, {"schedule": "dualpipev", "stages_per_rank": 2}),
}


class Apart(nn.Module):
    """A model with weights that the last stage uses for nothing that came in, two of which have one
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 8))
        self.one, self.other = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.last = nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.first(tokens).tanh()
        return nn.functional.cross_entropy(self.last(hidden * (self.one + self.other)), labels)


class Twice(Apart):
    """A model that calls a layer three times, one time after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.first(tokens).tanh()
        for _ in range(3):
            hidden = self.again(hidden).tanh()
        return nn.functional.cross_entropy(self.last(hidden * self.one), labels)


OWN: dict[str, type[nn.Module]] = {"Apart": Apart, "Twice": Twice}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(6)
    model: nn.Module = (OWN.get(kind) or MODELS[kind])().double()
    return model


def batch(kind: str, step: int = 0) -> dict[str, Any]:
    return batch_of("Normalized" if kind in OWN else kind, step)


@cache
def planned(name: str) -> Plan:
    kind, axes, count, options = CASES[name]
    return autoparallel.make_plan(
        model_of(kind),
        mesh=Mesh(**axes),
        microbatches=count,
        example_inputs=batch(kind),
        **options,
    )


@cache
def reference(kind: str, steps: int) -> dict[str, Any]:
    """What one process trains."""
    one = autoparallel.autoparallelize(model_of(kind), 1, example_inputs=batch(kind))
    return trained(one, kind, steps)


def prepare(names: tuple[str, ...]) -> None:
    """Plan some cases, and train what one process trains: ranks evaluate by the same traces."""
    for name in names:
        kind, *_ = CASES[name]
        planned(name)
        reference(kind, MORE_STEPS.get(name, STEPS))


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model: nn.Module, kind: str, steps: int, staged: bool = False) -> dict[str, Any]:
    """Losses of AdamW's steps, the gradients of the first and the last, and an evaluation.

    staged: the model has stages, and every second step is one call of its `step`.
    """
    autoparallel.manual_seed(model, 3)
    trainable = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses, gradients = [], {}
    for step in range(steps):
        if staged and step % 2:
            loss = model.step(**batch(kind, step))
        else:
            output = model(**batch(kind, step))
            loss = output["loss"] if isinstance(output, dict) else output
            loss.backward()
        losses.append(loss.detach())
        if step in (0, steps - 1):
            named = model.named_parameters()
            gradients[step] = {p: whole(x.grad).clone() for p, x in named if x.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        output = model(**batch(kind, steps))
        losses.append(output["loss"] if isinstance(output, dict) else output)
        # Of another size: generation asks for one row at a time.
        few = {name: value[:1] for name, value in batch(kind, steps + 1).items()}
        output = model(**few)
        losses.append(output["loss"] if isinstance(output, dict) else output)
    return {"losses": losses, "gradients": gradients}


def on_two(rank: int, names: tuple[str, ...]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What this rank trains, and what one process does, by the names of cases."""
    found = {}
    for name in names:
        kind, *_ = CASES[name]
        model, steps = (
            autoparallel.apply_plan(model_of(kind), planned(name)),
            MORE_STEPS.get(name, STEPS),
        )
        found[name] = trained(model, kind, steps, staged=True), reference(kind, steps)
    return found


SPLIT: dict[str, tuple[str, dict[str, int], int, dict[str, Any]]] = {
    "zero bubble, tp": (
        "Language",
        {"pp": 2, "tp": 2},
        2,
        {"schedule": "zero_bubble", "data_parallel": False},
    ),
    "zbv, dp": ("Language", {"pp": 2, "dp": 2}, 3, {"schedule": "zbv", "stages_per_rank": 2}),
}


def prepare_split(names: tuple[str, ...]) -> None:
    CASES.update(SPLIT)
    for name in names:
        planned(name)
    reference("Language", 1)


def on_four(rank: int, names: tuple[str, ...]) -> dict[str, Any]:
    found = {"one process": reference("Language", 1)}
    for name in names:
        kind, *_ = SPLIT[name]
        found[name] = trained(autoparallel.apply_plan(model_of(kind), planned(name)), kind, 1)
    return found


@pytest.mark.parametrize("names", [tuple(SPLIT)[:1], *broad((tuple(SPLIT),))], ids=["tp", "both"])
def test_halves_of_split_stages(names: tuple[str, ...]) -> None:
    """Stages of two ranks each, whose backward passes communicate in either half."""
    before = partial(trace_ahead, prepare_split, names)
    for found in run_processes(on_four, 4, names, before=before):
        one = found["one process"]
        for name in names:
            torch.testing.assert_close(
                found[name]["losses"], one["losses"], rtol=TOLERANCE, atol=TOLERANCE
            )
            for path, gradient in found[name]["gradients"][0].items():
                expected = one["gradients"][0][path]
                torch.testing.assert_close(gradient, expected, rtol=TOLERANCE, atol=TOLERANCE)


# Those whose last stage uses weights for nothing that came in, or some several times.
OTHERS = tuple(name for name, (kind, *_) in CASES.items() if kind in OWN)
# And those that differ from another one in the stages of each rank, or in what runs again.
MORE = ("gpipe, two on each", "zero bubble, two on each", "zero bubble, recomputed")
EVERY = tuple(name for name in CASES if name not in (*OTHERS, *MORE))


@pytest.mark.parametrize(
    "names", [EVERY, *broad((OTHERS,), (MORE,))], ids=["every", "others", "more"]
)
def test_schedules(names: tuple[str, ...]) -> None:
    """Losses and every gradient of some steps, by call and by `step`, and evaluation, with every
    schedule.
    """
    results = run_processes(on_two, 2, names, before=partial(trace_ahead, prepare, names))
    for name in names:
        one = results[0][name][1]
        for found in results:
            torch.testing.assert_close(
                found[name][0]["losses"], one["losses"], rtol=TOLERANCE, atol=TOLERANCE, msg=name
            )
        for step, expected in one["gradients"].items():
            held = [found[name][0]["gradients"][step] for found in results]
            assert {path for some in held for path in some} == set(expected), name
            for path, gradient in expected.items():
                for some in held:
                    if path in some:
                        torch.testing.assert_close(
                            some[path], gradient, rtol=TOLERANCE, atol=TOLERANCE
                        )


def test_gradients_of_weights_are_in_memory_of_their_own() -> None:
    """Behind views, autograd leaves them in that of what was received."""
    stage: Any = SimpleNamespace(enters=(), leaves=())
    module = StageModule(stage, (), last=False)
    module.take([nn.Parameter(torch.zeros(1, 8)), nn.Parameter(torch.zeros(8, 1))])
    module.begin(None, (), None)
    one, other = module.weights
    received = torch.ones(8)
    for _ in range(3):
        torch.autograd.backward([one.squeeze(0) + other.squeeze(1)], [received])
        module.separate([received])
    assert torch.equal(received, torch.ones(8))
    for gradient in module.gradients():
        assert gradient is not None
        assert torch.equal(gradient.flatten(), torch.full((8,), 3.0))


def test_gradients_are_multiplied_by_an_exact_number() -> None:
    """The gradient of a loss in float32 is not rounded to the type of a parameter's gradient."""
    run: Any = SimpleNamespace(narrow=False)
    gradient = torch.linspace(1, 2, 200).bfloat16()
    exact = (gradient.double() * 1.003).bfloat16()
    (scaled,) = PipelineRun.scaled(run, run, [gradient], torch.tensor(1.003))
    assert scaled is gradient
    assert torch.equal(gradient, exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "zbv", "stages_per_rank": 1}, "gives every rank two stages"),
        ({"schedule": "dualpipev", "stages_per_rank": 2, "microbatches": 3}, "no fewer micro-ba"),
        ({"schedule": "zero_bubble", "microbatches": 5}, "rounds of equal size"),
        ({"schedule": "zero bubble"}, "choose one of gpipe, 1f1b, zero_bubble, zbv, dualpipev"),
    ],
    ids=str,
)
def test_what_a_schedule_does_not_take_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        autoparallel.make_plan(
            model_of("Apart"), mesh=Mesh(pp=2), example_inputs=batch("Apart"), **options
        )
