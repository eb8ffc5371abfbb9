"""Copies of a parallel module train by themselves; its files are the unsplit model's."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import broken_models
import pytest
import torch
from broad_cases import broad
from families import build, inputs_for
from processes import run_processes
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.state_dicts import full_state_dict

pytestmark = pytest.mark.usefixtures("one_trace")


def step(model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> float:
    """One training step; return the loss."""
    output = model(**batch)
    loss = output["loss"] if isinstance(output, dict) else output.loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def require_same(parallel: Any, plain: Any) -> None:
    whole = full_state_dict(parallel)
    assert list(whole) == list(plain.state_dict())
    for path, value in plain.state_dict().items():
        torch.testing.assert_close(whole[path], value, rtol=0, atol=1e-11, msg=path)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def copies_of(rank: int, name: str) -> None:
    """A copy beside the first, of both the split model and the unsplit one."""
    torch.set_num_threads(1)
    if name == "gpt":
        # Five heads do not divide by two: what computes is gathered from what is updated.
        model: Any = build("gpt", layers=1, hidden=40, heads=5)
        batch = inputs_for("gpt")
    else:
        model, batch = broken_models.build(name), broken_models.inputs()
    kept = ["*attention.query_key_value.weight on tp is split"] if name == "gpt" else []
    parallel: Any = autoparallel.autoparallelize(model, 2, example_inputs=batch, constraints=kept)
    assert name != "gpt" or state_of(parallel).tree.copies
    pairs = [(parallel, model, sgd(parallel), sgd(model))]
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for m in (parallel, model)]
    others = [{key: value.roll(n, 0) for key, value in batch.items()} for n in range(3)]
    for number in range(3):
        for one, plain, optimizer, plain_optimizer in pairs:
            losses = (
                step(one, others[number], optimizer),
                step(plain, others[number], plain_optimizer),
            )
            assert losses[0] == pytest.approx(losses[1], rel=1e-11)
        for average, m in zip(averages, (parallel, model), strict=True):
            average.update_parameters(m)
        if number == 0:
            # The model twice in one tree stays one.
            twins = [copy.deepcopy(nn.ModuleList([m, m])) for m in (parallel, model)]
            assert twins[0][0] is twins[0][1]
            first, second = twins[0][0], twins[1][0]
            assert type(first) is type(parallel)
            assert first.plan is parallel.plan
            assert state_of(first).tree.root is first
            first.eval()
            second.eval()
            pairs.append((first, second, sgd(first), sgd(second)))
        elif number == 1:
            for one, plain, *_ in pairs[1:]:
                one.train()
                plain.train()
    for one, plain, *_ in pairs:
        require_same(one, plain)
    require_same(averages[0].module, averages[1].module)
    assert not torch.equal(next(iter(pairs[0][0].parameters())), next(iter(first.parameters())))
    # Parts of a model that runs as Python are copied with the model.
    for path, inner in parallel.named_modules():
        if path and "_autoparallel" in inner.__dict__:
            part = copy.deepcopy(inner)
            assert state_of(part).tree.root is not parallel
            assert state_of(part).tree.root.get_submodule(path) is part
            break
    for save in (pickle.dumps, lambda m: torch.save(m, "/dev/null")):
        with pytest.raises(AutoParallelError, match="cannot be pickled") as error:
            save(parallel)
        assert "save_checkpoint" in error.value.fix


@pytest.mark.parametrize("name", [*broad("gpt"), "Branches"])
def test_a_copy_trains_by_itself(name: str) -> None:
    run_processes(copies_of, 2, name)


class Saved(nn.Module):
    """A class that writes itself to files under the name that Hugging Face's have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()

    def save_pretrained(self, folder: Path) -> str:
        if folder.name == "full":
            raise OSError("no space left")
        torch.save({"kind": type(self).__name__, "weights": self.state_dict()}, folder / "own")
        return "saved"


def save_all(rank: int, folder: Path) -> list[str]:
    torch.set_num_threads(1)
    parallel: Any = autoparallel.autoparallelize(
        build("hf-gpt2", layers=1), 2, example_inputs=inputs_for("hf-gpt2")
    )
    parallel.save_pretrained(folder / "gpt2")
    torch.manual_seed(0)
    own: Any = autoparallel.autoparallelize(Saved(), 2, example_inputs=torch.ones(4, 8))
    found = [str(own.save_pretrained(folder))]
    try:
        own.save_pretrained(folder / "full")
    except (OSError, AutoParallelError) as error:
        found.append(str(error).splitlines()[0])
    assert float(own(torch.ones(4, 8))) > 0
    assert type(own).__name__ == "ParallelSaved"
    return found


def test_files_are_those_of_the_unsplit_model(tmp_path: Path) -> None:
    """Rank 0 writes them, under the user's class name; if that fails, all ranks say so."""
    found = run_processes(save_all, 2, tmp_path)
    assert found[0] == ["saved", "no space left"]
    assert found[1] == ["None", "Saved.save_pretrained failed on rank 0"]
    torch.manual_seed(0)
    expected = Saved()
    written = torch.load(tmp_path / "own", weights_only=True)
    assert written["kind"] == "Saved"
    assert all(torch.equal(written["weights"][n], v) for n, v in expected.state_dict().items())
    model = build("hf-gpt2", layers=1)
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    loaded: Any = type(model).from_pretrained(tmp_path / "gpt2")  # type: ignore[attr-defined]
    for path, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[path], value), path


class Listed(nn.Module):
    """A model with a list that refers to a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.bias.requires_grad_(False)
        self.scales = [self.linear.bias]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scales[0]


def test_what_a_copy_traces_refers_to_its_own_parameters() -> None:
    """A frozen one, too, which might as well be taken for a constant."""
    model, x = Listed(), torch.randn(3, 4)
    module: Any = autoparallel.autoparallelize(copy.deepcopy(model), 1, example_inputs=(x,))
    twin = copy.deepcopy(module)
    for each in (model, twin):
        with torch.no_grad():
            each.linear.bias.mul_(3)
        each.eval()  # which is traced anew
    torch.testing.assert_close(twin(x), model(x))
