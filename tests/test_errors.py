"""Bad input: the error says what, where in the user's model, why, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs_for
from processes import run_processes
from releases import float_indices_are_refused
from torch import nn

import autoparallel
from autoparallel import Mesh
from autoparallel.errors import (
    AutoParallelError,
    CaptureError,
    InputMismatchError,
    InputsNeededError,
    PlanError,
    UnsupportedOpError,
    WorldSizeError,
    WrappedModelError,
)


class Branching(nn.Module):
    """Chooses a path by the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if float(x.sum()) > 0:
            x = self.second(x)
        return x


@torch.library.custom_op("autoparallel_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """An op that nobody wrote a rule for."""
    return x * 2


@torch.library.custom_op("autoparallel_tests::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    """Another one."""
    return x * 3


for _op, _factor in ((twice, 2), (thrice, 3)):
    _op.register_fake(torch.empty_like)
    _op.register_autograd(lambda ctx, grad, factor=_factor: grad * factor)


class Unknown(nn.Module):
    """Calls ops without rules in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return thrice(twice(self.inner(twice(x))))


def says(error: AutoParallelError, *words: str) -> None:
    """The message has its parts, and these words."""
    text = str(error)
    assert "fix:" in text
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


def test_no_example_inputs() -> None:
    """Nothing to follow through the model, and nobody to ask."""
    with pytest.raises(InputsNeededError) as caught:
        autoparallel.make_plan(nn.Linear(8, 8), 2)
    says(caught.value, "Linear", "example_inputs=")


def test_inputs_that_do_not_fit_forward() -> None:
    """A misspelt keyword is not silently dropped."""
    with pytest.raises(CaptureError) as caught:
        autoparallel.make_plan(nn.Linear(8, 8), 2, example_inputs={"y": torch.zeros(2, 8)})
    says(caught.value, "Linear.forward", "'input'")


class Classifier(nn.Module):
    """Token numbers, scaled by features, to a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(10, 8), nn.Linear(4, 8)

    def forward(self, tokens: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> Any:
        """tokens: (b, s). features: (b, 4). labels: (b,)."""
        summed = self.table(tokens).sum(1) * self.scale(features)
        return nn.functional.cross_entropy(summed, labels)


GOOD: dict[str, Any] = {
    "tokens": torch.zeros(6, 5, dtype=torch.long),
    "features": torch.ones(6, 4),
    "labels": torch.zeros(6, dtype=torch.long),
}
REFUSED = {
    "numpy": ({"features": GOOD["features"].numpy()}, ["features of", "numpy array", "from_numpy"]),
    "list": ({"tokens": [1, 2, 3]}, ["embedding()", "must be Tensor, not list", "table  ("]),
    "float ids": ({"tokens": torch.ones(6, 5)}, ["Long, Int", "FloatTensor", "tokens: float32"]),
    "wide features": (
        {"features": GOOD["features"].double()},
        ["linear:", "same dtype", "scale  (", "features: float64 (6, 4)"],
    ),
    "whole features": (
        {"features": GOOD["features"].long()},
        ["linear:", "same dtype", "scale  (", "features: int64 (6, 4)"],
    ),
    "feature size": ({"features": torch.ones(6, 3)}, ["6x3 and 4x8", "scale  (", "(6, 3)"]),
    "batch": ({"labels": GOOD["labels"][:4]}, ["batch_size (6)", "(4)", "labels: int64 (4,)"]),
    "other batch": ({"tokens": GOOD["tokens"][:4]}, ["tensor a (4)", "tensor b (6)"]),
    "device": ({"features": GOOD["features"].to("meta")}, ["meta", "cpu", "features"]),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=float_indices_are_refused if case == "float ids" else ())
        for case in REFUSED
    ],
)
def test_inputs_that_the_model_refuses(case: str) -> None:
    """Told in the words of the op that refuses them: for example inputs, and in a call."""
    change, words = REFUSED[case]
    inputs = {**GOOD, **change}
    with pytest.raises(InputMismatchError) as caught:
        autoparallel.make_plan(Classifier(), 2, example_inputs=inputs)
    says(caught.value, "Classifier", *words)
    assert "fake" not in str(caught.value).lower()
    assert "torch.export" not in str(caught.value)
    model = autoparallel.autoparallelize(Classifier(), 1, example_inputs=GOOD)
    with pytest.raises(InputMismatchError) as caught:
        model(**inputs)
    says(caught.value, "Classifier", *words)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({**GOOD, "lables": GOOD["labels"]}, "unexpected keyword argument 'lables'"),
        ({"tokens": GOOD["tokens"]}, "missing a required argument: 'features'"),
        ([1, 2, 3, 4], "too many positional arguments"),
    ],
    ids=["keyword", "missing", "numbers"],
)
def test_arguments_that_forward_does_not_have(inputs: Any, words: str) -> None:
    """The error shows those that it has."""
    with pytest.raises(CaptureError) as caught:
        autoparallel.make_plan(Classifier(), 2, example_inputs=inputs)
    says(caught.value, "Classifier.forward", words, "(tokens, features, labels)")


def test_data_dependent_control_flow() -> None:
    """The user's own line is named."""
    x = torch.zeros(4, 8)
    with pytest.raises(CaptureError) as caught:
        autoparallel.make_plan(Branching(), 2, example_inputs=x, strict_capture=True)
    says(
        caught.value,
        "branches on the values",
        "test_errors.py",
        "if float(x.sum()) > 0",
        "torch.where",
    )


def test_ops_without_a_rule_are_listed_at_once() -> None:
    """Both ops, how often each is called, and where."""
    x = torch.zeros(4, 8, requires_grad=True)
    with pytest.raises(UnsupportedOpError) as caught:
        autoparallel.make_plan(Unknown(), 2, example_inputs=x, unknown_ops="error")
    says(
        caught.value,
        "autoparallel_tests.twice.default, 2 calls",
        "autoparallel_tests.thrice.default, 1 calls",
        "test_errors.py",
        'unknown_ops="replicate"'.replace('"', "'"),
    )


def test_ops_without_a_rule_can_be_kept_whole() -> None:
    """The same numbers, with the op's tensors whole."""
    torch.manual_seed(0)
    model, x = Unknown().double(), torch.randn(4, 8, dtype=torch.float64)
    result = autoparallel.simulate(
        model, 2, example_inputs=x, unknown_ops="replicate", backward=lambda y: y.square().sum()
    )
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(result.output, y.detach())
    torch.testing.assert_close(result.gradients["inner.0.weight"], model.inner[0].weight.grad)


@pytest.mark.parametrize(
    "option", [{"unknown_ops": "guess"}, {"hardware": "abacus"}, {"hardware": None}], ids=str
)
def test_misspelt_options(option: dict[str, Any]) -> None:
    """The known values are named."""
    with pytest.raises(PlanError) as caught:
        autoparallel.make_plan(
            nn.Linear(8, 8),
            2,
            example_inputs=torch.zeros(4, 8),
            **option,
        )
    says(caught.value, "choose one of")


class Draws(nn.Module):
    """Draws numbers of its own, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + torch.poisson(x)


def test_random_ops_without_a_common_generator_are_refused() -> None:
    """Every rank would draw other numbers; one rank may."""
    x = torch.zeros(4, 8)
    with pytest.raises(UnsupportedOpError) as caught:
        autoparallel.make_plan(Draws(), 2, example_inputs=x)
    says(caught.value, "aten.poisson.default", "random numbers")
    with pytest.raises(UnsupportedOpError):
        autoparallel.make_plan(Draws(), 2, example_inputs=x, unknown_ops="replicate")
    autoparallel.make_plan(Draws(), 1, example_inputs=x)


class WritesToItsInput(nn.Module):
    """Changes half of what the caller gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, :4].mul_(2)
        return self.inner(x).relu()


def test_writing_to_an_input_is_refused() -> None:
    """A graph does not do it; left to Python, each rank writes to the tensor it was given."""
    model = WritesToItsInput()
    x = torch.arange(32.0).reshape(4, 8)
    with pytest.raises(CaptureError) as caught:
        autoparallel.make_plan(model, 2, example_inputs=x, strict_capture=True)
    says(caught.value, "aten.mul_", "input 0", "without the underscore")
    result = autoparallel.simulate(model, 2, example_inputs=x, backward=False)
    assert torch.allclose(result.output, model(x.clone()))


def test_a_world_size_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single process is told what to type."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WorldSizeError) as caught:
        autoparallel.autoparallelize(nn.Linear(8, 8), 4, example_inputs=torch.zeros(4, 8))
    says(caught.value, "torchrun", "--nproc-per-node 4", "simulate")


def test_a_world_size_that_is_not_the_launched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any process group is started."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(WorldSizeError) as caught:
        autoparallel.autoparallelize(nn.Linear(8, 8), 4, example_inputs=torch.zeros(4, 8))
    says(caught.value, "4 ranks were asked for, 2 are running")


def test_a_mesh_without_ranks() -> None:
    """Zero ranks cannot hold a model, nor can no axis."""
    with pytest.raises(PlanError):
        autoparallel.make_plan(nn.Linear(8, 8), 0, example_inputs=torch.zeros(4, 8))
    with pytest.raises(PlanError, match="without axes"):
        Mesh()


@pytest.mark.parametrize("name", ["", "a b", "data-parallel", "1"])
def test_axes_without_a_name(name: str) -> None:
    """Programs and constraints call them by their names; any name of Python's is one."""
    with pytest.raises(PlanError) as caught:
        Mesh(**{name: 2})
    says(caught.value, repr(name), "dp")
    assert Mesh(self=2).world_size == 2


MISUSES: dict[str, Callable[[autoparallel.Plan, nn.Module, str], Any]] = {
    "picture in no folder": lambda plan, _, file: autoparallel.write_svg(plan, file),
    "trace in no folder": lambda plan, _, file: autoparallel.write_trace(
        autoparallel.timeline(plan), file
    ),
    "trace of a plan": lambda plan, _, file: autoparallel.write_trace(plan, file),  # type: ignore[arg-type]
    "layers": lambda plan, _, file: autoparallel.write_svg(plan, file, layers="some"),  # type: ignore[arg-type]
    "picture of a model": lambda _, model, file: autoparallel.write_svg(model, file),  # type: ignore[arg-type]
    "report of a model": lambda _, model, file: autoparallel.print_plan(model),  # type: ignore[arg-type]
    "timeline of a model": lambda _, model, file: autoparallel.timeline(model),  # type: ignore[arg-type]
    "forms of a model": lambda _, model, file: autoparallel.closed_forms(model),  # type: ignore[arg-type]
    "names for sizes": lambda plan, _, file: autoparallel.closed_forms(plan, names={"h": 8}),  # type: ignore[dict-item]
    "no stages": lambda plan, _, file: autoparallel.pipeline(autoparallel.timeline(plan), 0, 1),
    "a file as a plan": lambda _, model, file: autoparallel.apply_plan(nn.Linear(8, 8), file),  # type: ignore[arg-type]
    "simulated file": lambda _, model, file: autoparallel.simulate(nn.Linear(8, 8), plan=file),  # type: ignore[arg-type]
    "seed": lambda _, model, file: autoparallel.manual_seed(model, file),  # type: ignore[arg-type]
    "random state": lambda _, model, file: autoparallel.set_rng_state(model, {"seed": 1}),
    "plain module": lambda _, model, file: autoparallel.full_state_dict(nn.Linear(8, 8)),
    "constraints": lambda _, model, file: autoparallel.make_plan(nn.Linear(8, 8), 2, constraints=3),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuses_are_told_as_such(case: str, tmp_path: Path) -> None:
    """With what to do, by an error of the project's kind."""
    x = torch.zeros(4, 8)
    plan = autoparallel.make_plan(nn.Linear(8, 8), 2, example_inputs=x)
    model = autoparallel.autoparallelize(nn.Linear(8, 8), 1, example_inputs=x)
    with pytest.raises(AutoParallelError) as caught:
        MISUSES[case](plan, model, str(tmp_path / "missing" / "file"))
    says(caught.value)


@pytest.mark.parametrize("size", [0, -2, 2.0, "2", True])
def test_axes_without_a_size(size: Any) -> None:
    """Only positive whole numbers are sizes."""
    with pytest.raises(PlanError, match="positive whole number"):
        Mesh(dp=size)


@pytest.mark.parametrize("model", [nn.Linear, torch.relu, None], ids=["class", "function", "none"])
def test_what_is_no_module(model: Any) -> None:
    """A class, a function and nothing are refused before they are looked into."""
    with pytest.raises(AutoParallelError) as caught:
        autoparallel.make_plan(model, 2, example_inputs=torch.zeros(4, 8))
    says(caught.value, "no nn.Module")


def test_simulating_without_weights() -> None:
    """A model on the meta device can be planned, not run."""
    with pytest.raises(PlanError) as caught:
        autoparallel.simulate(nn.Linear(8, 8, device="meta"), 2, example_inputs=torch.zeros(4, 8))
    says(caught.value, "meta", "make_plan")


@pytest.mark.parametrize(
    "options", [{"memory_limit": "1KiB"}, {"world_size": 4}, {"sequence_parallel": True}], ids=str
)
def test_a_plan_is_simulated_as_it_is(options: dict[str, Any]) -> None:
    """What would make another plan is not silently left out."""
    model, x = nn.Linear(8, 8), torch.zeros(4, 8)
    plan = autoparallel.make_plan(model, 2, example_inputs=x)
    with pytest.raises(PlanError) as caught:
        autoparallel.simulate(model, example_inputs=x, plan=plan, **options)
    says(caught.value, next(iter(options)), "2 ranks")


def test_a_plan_for_other_parameters() -> None:
    """A plan made in this process has its program, which another model's weights do not fit."""
    x = torch.zeros(4, 8)
    plan = autoparallel.make_plan(nn.Linear(8, 8), 1, example_inputs=x)
    for run in (autoparallel.apply_plan, autoparallel.simulate):
        with pytest.raises(PlanError) as caught:
            run(nn.Linear(8, 6), plan=plan, example_inputs=x)
        says(caught.value, "weight: (8, 8) in the plan, (6, 8) in the model", "bias")


def test_a_plan_for_another_model() -> None:
    """The fingerprint of the traced program tells them apart."""
    x = torch.zeros(4, 8)
    plan = autoparallel.make_plan(nn.Linear(8, 8), 1, example_inputs=x)
    other = autoparallel.Plan.from_json(plan.to_json())
    with pytest.raises(PlanError) as caught:
        autoparallel.apply_plan(nn.Linear(8, 6), other, example_inputs=x)
    says(caught.value, "another")
    with pytest.raises(PlanError):
        autoparallel.Plan.from_json("{}")
    with pytest.raises(PlanError):
        autoparallel.Plan.from_json(plan.to_json().replace('"version": 2', '"version": 99'))


def test_a_pin_that_cannot_be() -> None:
    """What can be is listed."""
    model, inputs = build("mlp"), inputs_for("mlp")
    with pytest.raises(PlanError) as caught:
        autoparallel.make_plan(
            model, 2, example_inputs=inputs, pins={"first.weight": autoparallel.Shard(0, blocks=8)}
        )
    assert "first_weight" in str(caught.value)
    with pytest.raises(PlanError):
        autoparallel.make_plan(
            model, 2, example_inputs=inputs, pins={"frist.weight": autoparallel.Shard(0)}
        )


def check_in_processes(rank: int) -> dict[str, str]:
    """What needs a real process group."""
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    x = torch.ones(4, 8)

    def expect(name: str, kind: type[Exception], function: object) -> None:
        try:
            function()  # type: ignore[operator]
        except kind as error:
            found[name] = str(error)

    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    expect(
        "wrapped",
        WrappedModelError,
        lambda: autoparallel.autoparallelize(wrapped, 2, example_inputs=x),
    )
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(nn.Linear(8, 8))
    expect(
        "sharded",
        WrappedModelError,
        lambda: autoparallel.autoparallelize(sharded, 2, example_inputs=x),
    )
    expect(
        "size",
        WorldSizeError,
        lambda: autoparallel.autoparallelize(nn.Linear(8, 8), 3, example_inputs=x),
    )
    torch.manual_seed(0)
    model = autoparallel.autoparallelize(nn.Linear(8, 8), 2, example_inputs=x)
    expect("twice", WrappedModelError, lambda: autoparallel.autoparallelize(model, 2))
    expect("inputs", InputMismatchError, lambda: model(x + rank))
    unchecked = autoparallel.autoparallelize(nn.Linear(8, 8), 2, example_inputs=x, check_inputs=0)
    unchecked(x + rank)
    return found


def test_errors_among_processes() -> None:
    """Wrapped models, another number of ranks, inputs that differ between ranks."""
    for found in run_processes(check_in_processes, 2):
        assert "already wrapped in DistributedDataParallel" in found["wrapped"]
        assert "already" in found["sharded"]
        assert "3 ranks were asked for, 2 are running" in found["size"]
        assert "already distributed" in found["twice"]
        assert "different inputs: input" in found["inputs"]
        assert "check_inputs=0" in found["inputs"]
