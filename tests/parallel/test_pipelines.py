"""Pipelines on processes: torch's schedules train the model that one process trains."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_models import VOCABULARY, Language, batch_of
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.plan import Plan

pytestmark = pytest.mark.usefixtures("one_trace")

TOLERANCE = 1e-11
STEPS = 4
Losses = list[tuple[float, float]]


def plain() -> nn.Module:
    torch.manual_seed(8)
    model: nn.Module = Language().double()
    return model


def batch(step: int) -> dict[str, torch.Tensor]:
    return batch_of("Language", step)


@cache
def planned(name: str) -> Plan:
    """Plans are made once, in a process of which the ranks are forks."""
    options: dict[str, Any] = {
        "two of two": {"mesh": Mesh(pp=2, tp=2), "microbatches": 3, "data_parallel": False},
        "no stages": {"mesh": Mesh(tp=4)},
        "four on two": {"mesh": Mesh(pp=2, dp=2), "microbatches": 4, "stages_per_rank": 2},
    }[name]
    return autoparallel.make_plan(plain(), example_inputs=batch(0), **options)


def plan_four() -> None:
    for name in ("two of two", "no stages", "four on two"):
        planned(name)


def trainable(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    autoparallel.manual_seed(model, 5)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    step: bool = False,
    rows: slice = slice(None),
) -> Losses:
    """Losses and norms of gradients. step: by the method of that name. rows: this rank's own."""
    found = []
    for number in steps:
        own = {name: value[rows] for name, value in batch(number).items()}
        if step:
            loss = model.step(**own)
        else:
            loss = model(**own)["loss"]
            loss.backward()
        norm = autoparallel.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(loss.detach()), float(norm)))
    return found


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {path: whole(each.grad) for path, each in named if each.grad is not None}


def own_loss(model: nn.Module) -> float:
    """A loss that the caller computes of the logits, added to half of the model's own."""
    output = model(**batch(20))
    rows = whole_logits(output["logits"])
    loss = functional.cross_entropy(rows.flatten(0, 1) * 0.5, batch(21)["labels"].flatten())
    loss = loss + output["loss"] / 2
    loss.backward()
    return float(loss.detach())


def whole_logits(logits: Any) -> torch.Tensor:
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def message(function: Any) -> str:
    try:
        function()
    except AutoParallelError as error:
        return str(error)
    return "nothing was refused"


def on_two_stages(rank: int, folder: str) -> dict[str, Any]:
    """All that a user does with a model, on a mesh of two stages and nothing else."""
    options: dict[str, Any] = {"mesh": Mesh(pp=2), "microbatches": 4, "schedule": "gpipe"}
    model, optimizer = trainable(
        autoparallel.autoparallelize(plain(), example_inputs=batch(0), **options)
    )
    found: dict[str, Any] = {"first": train(model, optimizer, range(2))}
    found["state"] = {k: v.clone() for k, v in autoparallel.full_state_dict(model).items()}
    autoparallel.save_checkpoint(folder, model, optimizer)
    twin = copy.deepcopy(model)
    found["steps"] = train(model, optimizer, range(2, STEPS), step=True)
    autoparallel.load_checkpoint(folder, model, optimizer)
    found["again"] = train(model, optimizer, range(2, STEPS))
    model.load_state_dict(found["state"])
    autoparallel.set_rng_state(model, {"seed": 5, "step": 2})
    found["own"] = own_loss(model)
    found["gradients"] = gradients(model)
    found["twin"] = float(twin(**batch(2))["loss"].detach())
    model.eval()
    with torch.no_grad():
        found["evaluated"] = float(model(**batch(2))["loss"])
        short = {name: value[:3, :7] for name, value in batch(2).items()}
        found["short"] = whole_logits(model(**short)["logits"])
    model.zero_grad()
    model(**batch(2))["loss"].backward()
    once = gradients(model)
    model.zero_grad()
    loss = model(**batch(2))["loss"]
    loss.backward(retain_graph=True)
    (loss * 2).backward()
    found["thrice"] = (gradients(model), {path: 3 * each for path, each in once.items()})
    model.train()
    found["held"] = [path for path, each in model.named_parameters() if not each.is_meta]
    late = whole_logits(model(**batch(2))["logits"]).sum()
    with torch.no_grad():
        model.blocks[0].out.bias.zero_()  # of one stage alone
        model.blocks[2].out.bias.zero_()
    found["refused"] = [
        message(late.backward),
        message(lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)),
        message(lambda: model.blocks[0](torch.zeros(2, 3, 16, dtype=torch.float64))),
        message(lambda: autoparallel.to_fx(model)),
        message(lambda: autoparallel.autoparallelize(plain(), **options)),
    ]
    model.blocks[1].register_forward_hook(lambda *_: None)
    found["refused"].append(message(lambda: model(**batch(0))))
    return found


def test_two_stages(tmp_path: Path) -> None:
    """Steps, clipping, checkpoints, copies, evaluation and losses of the caller's, in GPipe's order
    with micro-batches of unlike size; and what only whole models can do is refused.
    """
    one, optimizer = trainable(autoparallel.autoparallelize(plain(), 1, example_inputs=batch(0)))
    first = train(one, optimizer, range(2))
    state = {path: value.clone() for path, value in one.state_dict().items()}
    rest = train(one, optimizer, range(2, STEPS))
    one.load_state_dict(state)
    autoparallel.set_rng_state(one, {"seed": 5, "step": 2})
    own = own_loss(one)
    one.eval()
    with torch.no_grad():
        evaluated = float(one(**batch(2))["loss"])
        short = {name: value[:3, :7] for name, value in batch(2).items()}
        logits = one(**short)["logits"]
    results = run_processes(on_two_stages, 2, str(tmp_path / "saved"))
    for found in results:
        torch.testing.assert_close(found["first"], first, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(found["steps"], rest, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(found["again"], found["steps"], rtol=0, atol=0)
        torch.testing.assert_close(found["state"], state, rtol=TOLERANCE, atol=TOLERANCE)
        assert found["twin"] == pytest.approx(rest[0][0], abs=TOLERANCE)
        assert found["own"] == pytest.approx(own, abs=TOLERANCE)
        assert found["evaluated"] == pytest.approx(evaluated, abs=TOLERANCE)
        torch.testing.assert_close(found["short"], logits, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(*found["thrice"], rtol=TOLERANCE, atol=TOLERANCE)
        expected = {path: each.grad for path, each in one.named_parameters()}
        assert set(found["gradients"]) == set(found["held"])
        for path, gradient in found["gradients"].items():
            torch.testing.assert_close(gradient, expected[path], rtol=TOLERANCE, atol=TOLERANCE)
        for text, words in zip(
            found["refused"],
            (
                "written to between",
                "clip_grad_norm_",
                "called by itself",
                "not told of a plan",
                "example inputs",
                "hooks were registered",
            ),
            strict=True,
        ):
            assert words in text
    held = [set(found["held"]) for found in results]
    assert held[0] | held[1] == {path for path, _ in one.named_parameters()}
    # The head is the embedding: both stages have it, and nothing else.
    assert held[0] & held[1] == {"embedding.weight"}
    # Both parts of one optimizer's state were saved.
    other, resumed = trainable(autoparallel.autoparallelize(plain(), 1, example_inputs=batch(0)))
    autoparallel.load_checkpoint(tmp_path / "saved", other, resumed)
    torch.testing.assert_close(
        train(other, resumed, range(2, STEPS)), rest, rtol=TOLERANCE, atol=TOLERANCE
    )


class Counting(nn.Module):
    """A model that reads the number of its calls, and then raises it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.ones(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = (self.first(rows) + self.calls).tanh()
        out = (self.last(hidden) + self.calls).tanh() * self.scale
        self.calls = self.calls + 1
        spectrum = torch.fft.fft(out)
        return {"spectrum": spectrum, "loss": out.square().sum(), "out": out, "hidden": hidden}


def counted(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Gradients of two backward passes of one call, of one that begins at another output, and of a
    call with one row.
    """
    rows = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    found, loss = [], model(rows)["loss"]
    for start in (loss, loss, None):
        if start is None:
            start = whole_logits(model(rows)["out"]).sum()
        start.backward(retain_graph=True)
        found.append(gradients(model))
        model.zero_grad()
    model(rows[:1])["loss"].backward()
    found.append(gradients(model))
    model.zero_grad()
    return found


class Aside(nn.Module):
    """A model that returns something besides its loss, for which alone two stages read a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.side, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 8)
        self.tied = nn.Parameter(torch.rand(8))

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        aside = self.side(rows) * self.tied
        hidden = self.first(rows)
        for _ in range(8):
            hidden = self.last(hidden.tanh())
        return {"loss": hidden.square().sum(), "aside": aside.tanh() * self.tied}


def aside(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Gradients of the loss, and of what is returned besides."""
    rows, found = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6), []
    for name in ("loss", "aside"):
        whole_logits(model(rows)[name]).sum().backward()
        found.append(gradients(model))
        model.zero_grad()
    return found


def counting() -> nn.Module:
    torch.manual_seed(2)
    return Counting().double()


def on_two_that_count(rank: int) -> Any:
    inputs = torch.zeros(4, 6, dtype=torch.float64)
    options: dict[str, Any] = {"mesh": Mesh(pp=2), "microbatches": 2, "example_inputs": inputs}
    model = autoparallel.autoparallelize(counting(), **options)
    found = counted(model)
    late = model(inputs)["loss"]
    late.backward(retain_graph=True)
    model.scale.zero_()  # which no step writes
    # What the first stage makes of one row, after another call.
    rows = [torch.full((1, 6), float(number), dtype=torch.float64) for number in range(2)]
    for number, row in enumerate(rows):
        hidden = model(row)["hidden"]
        if not number:
            kept, copied = hidden, whole_logits(hidden).clone()
    apart = autoparallel.autoparallelize(Aside().double(), **options)
    held = {path for path, parameter in apart.named_parameters() if not parameter.is_meta}
    return found, message(late.backward), (whole_logits(kept), copied), aside(apart), held


def test_a_step_that_runs_again_reads_the_buffers_of_its_call() -> None:
    """And what no gradient comes to has none, on any of the ranks that share it."""
    reference, besides = counted(counting()), aside(Aside().double())
    for found, refused, (kept, copied), apart, held in run_processes(on_two_that_count, 2):
        assert "tied" in held
        for own, other in zip(apart, besides, strict=True):
            expected = {path: other[path] for path in other if path in held}
            torch.testing.assert_close(own, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert torch.equal(kept, copied)
        for own, other in zip(found, reference, strict=True):
            for path, gradient in own.items():
                torch.testing.assert_close(gradient, other[path], rtol=TOLERANCE, atol=TOLERANCE)
        assert "a buffer or an input was written to between" in refused


def on_four_processes(rank: int, folder: str) -> list[Losses]:
    """Stages of two ranks each; a checkpoint goes from them to a mesh without stages, and to four
    stages that two ranks share out, whose schedule `step` runs.
    """
    split, optimizer = trainable(autoparallel.apply_plan(plain(), planned("two of two")))
    found = [train(split, optimizer, range(2))]
    autoparallel.save_checkpoint(folder, split, optimizer)
    devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    # Ranks of one stage bring batches of unlike length.
    own = slice(0, 4) if devices.get_local_rank("dp") == 0 else slice(4, None)
    shares = {"mesh": devices, "local_inputs": "dp"}
    for name, options, rows in [("no stages", {}, slice(None)), ("four on two", shares, own)]:
        model, resumed = trainable(autoparallel.apply_plan(plain(), planned(name), **options))
        autoparallel.load_checkpoint(folder, model, resumed)
        found.append(train(model, resumed, range(2, STEPS), name == "four on two", rows))
    return found


def test_stages_of_several_ranks(tmp_path: Path) -> None:
    """Splits inside of stages, and stages interleaved on ranks."""
    one, optimizer = trainable(autoparallel.autoparallelize(plain(), 1, example_inputs=batch(0)))
    first, rest = train(one, optimizer, range(2)), train(one, optimizer, range(2, STEPS))
    results = run_processes(on_four_processes, 4, str(tmp_path / "saved"), before=plan_four)
    for found in results:
        torch.testing.assert_close(found, [first, rest, rest], rtol=TOLERANCE, atol=TOLERANCE)
    # One process takes up what four have left.
    autoparallel.load_checkpoint(tmp_path / "saved", one, optimizer)
    again = train(one, optimizer, range(2, STEPS))
    torch.testing.assert_close(again, rest, rtol=TOLERANCE, atol=TOLERANCE)


def test_language_has_what_is_tested() -> None:
    """The tests above mean something only with these."""
    model = plain()
    assert model.head.weight is model.embedding.weight
    labels = batch(0)["labels"]
    assert 0 < int((labels == -100).sum()) < labels.numel()
    assert VOCABULARY % 2 == 1
