"""The parallel module behaves as the user's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import MLP, build, inputs_for, relative_error
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor

import autoparallel
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.mesh import Mesh
from autoparallel.parallel.materialize import materialize
from autoparallel.placement import Shard
from autoparallel.runtime.groups import SingleGroup
from autoparallel.runtime.ranks import one_axis
from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig


class Elaborate(nn.Module):
    """Nested inputs, keyword-only arguments, nested outputs, a buffer that counts, no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(16, 8)})
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.double()

    def forward(
        self, pair: tuple[torch.Tensor, dict[str, torch.Tensor]], *, scale: float = 1.0
    ) -> dict[str, Any]:
        first, others = pair
        self.calls.add_(1)
        self.seen += first.detach().mean(0)
        hidden = torch.tanh(self.layers["a"](first)) * scale
        y = self.layers["b"](hidden) + others["shift"]
        return {"y": y, "inside": [hidden, ("constant", 3)], "none": None}


def test_one_rank_changes_nothing() -> None:
    """Plain parameters, same numbers, bit for bit."""
    model, inputs = build("gpt"), inputs_for("gpt")
    parallel = autoparallel.autoparallelize(model, 1, example_inputs=inputs)
    assert isinstance(parallel, GPT)
    assert not any(isinstance(p, DTensor) for p in parallel.parameters())
    assert torch.equal(parallel(**inputs).loss, model(**inputs).loss)


def test_structures_go_in_and_come_out() -> None:
    """Dicts, tuples, constants and keyword arguments; other constants are traced anew."""
    torch.manual_seed(0)
    model = Elaborate()
    pair = (torch.randn(4, 8).double(), {"shift": torch.randn(8).double()})
    parallel = autoparallel.autoparallelize(model, 1, example_inputs=(pair,))
    for scale in (1.0, 0.5):
        own, expected = parallel(pair, scale=scale), model(pair, scale=scale)
        assert list(own) == list(expected)
        assert torch.equal(own["y"], expected["y"])
        assert torch.equal(own["inside"][0], expected["inside"][0])
        assert own["inside"][1] == ("constant", 3)
        assert own["none"] is None
        assert torch.equal(parallel.calls, model.calls)
        assert relative_error(parallel.seen, model.seen) < 1e-14


def test_plans_are_deterministic_and_round_trip() -> None:
    """The same bytes twice; JSON gives back an equal plan."""
    model, inputs = build("hf-llama", layers=1), inputs_for("hf-llama")
    one = autoparallel.make_plan(model, 4, example_inputs=inputs)
    two = autoparallel.make_plan(copy.deepcopy(model), 4, example_inputs=inputs)
    assert one.to_json() == two.to_json()
    assert autoparallel.Plan.from_json(one.to_json()) == one
    assert one.lower_bound == pytest.approx(one.cost)


def test_planning_leaves_the_model_alone() -> None:
    """No attribute, mode or gradient of the user's model changes."""
    model, inputs = build("bert").eval(), inputs_for("bert")
    before = {path: value.clone() for path, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    autoparallel.make_plan(model, 4, example_inputs=inputs)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[path], value) for path, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Frozen(nn.Module):
    """A norm that may be put into eval mode while the rest trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(x)).square().mean()
        return out


@pytest.mark.parametrize("waits", [False, True])
def test_every_module_is_run_in_its_own_mode(waits: bool) -> None:
    """Those inside too, whenever they are put into it: before planning, and after."""
    torch.manual_seed(2)
    model, x = Frozen().double(), torch.randn(8, 4, dtype=torch.float64)
    model.norm.eval()
    inputs = None if waits else (x,)
    parallel = autoparallel.autoparallelize(copy.deepcopy(model), 1, example_inputs=inputs)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    for mode in (False, True, False):
        model.norm.train(mode)
        parallel.norm.train(mode)
        assert relative_error(parallel(x).detach(), model(x).detach()) < 1e-14
        assert torch.equal(parallel.norm.running_mean, model.norm.running_mean)
    with pytest.raises(PlanError, match="another mode"):
        autoparallel.simulate(model.eval(), plan=plan, example_inputs=(x,))


def test_inputs_have_gradients_where_they_need_them() -> None:
    """None is planned, nor paid, for an input that needs none; one that does is planned anew."""
    torch.manual_seed(3)
    model, x = Frozen().double(), torch.randn(8, 4, dtype=torch.float64)
    trained = x.clone().requires_grad_()
    plans = [
        autoparallel.make_plan(model, mesh=Mesh(dp=2), example_inputs=(given,), hardware="cpu")
        for given in (x, trained)
    ]
    assert plans[0].cost < plans[1].cost
    for plan, needs in zip(plans, (False, True), strict=True):
        assert plan.captured is not None
        given = next(node for node in plan.captured.graph.nodes if node.kind == "input")
        read = [made.requires_grad for made in plan.conversions if made.value == given.name]
        assert read == [needs] * len(read)
    with pytest.raises(PlanError, match="need gradients"):
        autoparallel.simulate(model, plan=plans[0], example_inputs=(trained,))
    own = trained.detach().clone().requires_grad_()
    model(trained).backward()
    autoparallel.autoparallelize(model, 1, example_inputs=(x,))(own).backward()
    assert own.grad is not None
    assert relative_error(own.grad, trained.grad) < 1e-14


def test_meta_models_get_weights_as_one_device_draws_them() -> None:
    """Constants are the same, and random numbers are as far apart."""
    for kind, config in (
        (GPT, GPTConfig(layers=2, hidden=16, heads=2, vocabulary=31, positions=8)),
        (Bert, BertConfig(layers=1, hidden=16, heads=2, vocabulary=31, positions=8)),
    ):
        torch.manual_seed(5)
        expected = kind(config).state_dict()
        with torch.device("meta"):
            model = kind(config)
        parallel = autoparallel.autoparallelize(model, 1)
        for path, value in parallel.state_dict().items():
            whole = expected[path]
            assert value.shape == whole.shape
            if whole.numel() > 1 and float(whole.std()):
                assert torch.allclose(value.std(), whole.std(), rtol=0.4), path
            else:
                assert torch.equal(value, whole), path


def behave(rank: int) -> None:
    """All that a training script does to a module, against the unsplit one."""
    torch.set_num_threads(1)
    model, inputs = build("gpt", layers=1), inputs_for("gpt")
    parallel = autoparallel.autoparallelize(model, 2, example_inputs=inputs)
    assert [name for name, _ in parallel.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]
    assert [name for name, _ in parallel.named_modules()] == [
        name for name, _ in model.named_modules()
    ]
    assert all(isinstance(parameter, DTensor) for parameter in parallel.parameters())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, parallel)]
    for step in range(3):
        for accumulate in range(2):
            for each in (model, parallel):
                batch = {key: value.roll(step + accumulate, 0) for key, value in inputs.items()}
                each(**batch).loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, parallel)]
        assert relative_error(norms[1].full_tensor(), norms[0]) < 1e-10
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = autoparallel.full_state_dict(parallel)
    for path, value in model.state_dict().items():
        assert relative_error(state[path], value) < 1e-10, path
        assert relative_error(parallel.state_dict()[path].full_tensor(), value) < 1e-10, path
    # Another mode, batch and length: another program, the same parameters.
    tokens = {"input_ids": inputs["input_ids"][:2, :7]}
    with torch.no_grad():
        own, expected = parallel.eval()(**tokens).logits, model.eval()(**tokens).logits
    own = own.full_tensor() if isinstance(own, DTensor) else own
    assert relative_error(own, expected) < 1e-10
    # Whole weights are taken, and so are the module's own.
    fresh = build("gpt", layers=1)
    parallel.load_state_dict(fresh.state_dict())
    parallel.load_state_dict(parallel.state_dict())
    parallel.train()
    fresh.train()
    for size, length in ((1, 5), (4, 12)):
        batch = {key: value[:1, :1].expand(size, length) for key, value in inputs.items()}
        batch = {key: (value + torch.arange(length)) % 31 for key, value in batch.items()}
        assert relative_error(parallel(**batch).loss, fresh(**batch).loss) < 1e-10
    # A plan from a file.
    text = parallel.plan.to_json()
    again = autoparallel.apply_plan(fresh, autoparallel.Plan.from_json(text), example_inputs=inputs)
    assert relative_error(again(**inputs).loss, fresh(**inputs).loss) < 1e-10


def wait_for_inputs(rank: int) -> None:
    """Without example inputs, the first call plans; an optimizer made before it still works."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model, inputs = MLP().double(), inputs_for("mlp")
    parallel = autoparallel.autoparallelize(model, 2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, parallel)]
    for _ in range(2):
        losses = []
        for each, optimizer in zip((model, parallel), optimizers, strict=True):
            loss = each(**inputs)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert relative_error(losses[1], losses[0]) < 1e-12
    assert any(isinstance(p.storage[0], Shard) for p in parallel.plan.parameters)


def tied_on_meta(rank: int) -> None:
    """Each rank fills its own parts of a Hugging Face model; tied weights are one parameter."""
    torch.set_num_threads(1)
    model, inputs = build("hf-gpt2", layers=1), inputs_for("hf-gpt2")
    parallel = autoparallel.autoparallelize(model, 2, example_inputs=inputs)
    assert parallel.transformer.wte.weight is parallel.lm_head.weight
    assert len(list(parallel.parameters())) == len(list(model.parameters()))
    assert type(parallel).__bases__[-1] is type(model)
    with torch.device("meta"):
        empty = type(model)(model.config)
    torch.manual_seed(9)
    filled = autoparallel.autoparallelize(empty, 2, example_inputs=inputs)
    torch.manual_seed(9)
    whole = autoparallel.full_state_dict(filled)
    drawn = materialize(empty, {}, one_axis(SingleGroup()), torch.device("cpu"))
    assert set(whole) == set(empty.state_dict())
    for path, value in whole.items():
        assert torch.equal(value, drawn[path]), path


def behaviours(rank: int) -> None:
    """One launch for all."""
    behave(rank)
    wait_for_inputs(rank)
    tied_on_meta(rank)


def test_a_training_script_sees_no_difference() -> None:
    """On two gloo processes."""
    run_processes(behaviours, 2, timeout_seconds=300)


def test_the_guards_of_a_program_are_asked_once_for_calls_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was found out of a kind of inputs is the running module's to remember."""
    torch.manual_seed(4)
    model = Frozen().double()
    x = torch.randn(8, 4, dtype=torch.float64)
    parallel = autoparallel.autoparallelize(model, 1, example_inputs=(x,))
    asked: list[tuple[int, ...]] = []
    fits = Captured.fits

    def count(self: Captured, inputs: list[torch.Tensor]) -> bool:
        asked.append(tuple(inputs[0].shape))
        return fits(self, inputs)

    monkeypatch.setattr(Captured, "fits", count)
    for rows in (8, 8, 6, 8, 6):
        parallel(x[:rows])
    assert asked == [(8, 4), (6, 4)]
