"""A checkpoint is refused where it is damaged or of something else, and none is lost in saving."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError, CheckpointError
from autoparallel.parallel import background_checkpoint, checkpoint_files
from autoparallel.parallel.background_checkpoint import BackgroundCheckpoints
from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
from autoparallel.train.config import Checkpoints, TrainConfig
from autoparallel.train.loop import train

Make = Callable[[Any], list[torch.optim.Optimizer]]


class Model(nn.Module):
    """Two matrices and a vector; returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(torch.tanh(self.first(x))) - x).square().mean()


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Model().double()


def steps(model: Any, optimizers: list[torch.optim.Optimizer], count: int, begin: int = 0) -> None:
    for number in range(begin, begin + count):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number)).double()
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).backward()
        for optimizer in optimizers:
            optimizer.step()


def matrices(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def vectors(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.ndim < 2]


optim = torch.optim
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda m: [optim.SGD(m.parameters(), lr=0.1, momentum=0.9)],
    "fused sgd": lambda m: [optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True)],
    "fused adamw": lambda m: [optim.AdamW(m.parameters(), lr=0.1, fused=True)],
    "adafactor": lambda m: [optim.Adafactor(m.parameters(), lr=0.1)],
    "rprop": lambda m: [optim.Rprop(m.parameters(), lr=0.01)],
    "asgd": lambda m: [optim.ASGD(m.parameters(), lr=0.1)],
    "several": lambda m: [optim.Muon(matrices(m), lr=0.1), optim.AdamW(vectors(m), lr=0.1)],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_with_every_optimizer(name: str, tmp_path: Path) -> None:
    model, other = model_of(), model_of(1)
    optimizers = OPTIMIZERS[name](model)
    steps(model, optimizers, 3)
    save_checkpoint(tmp_path / "a", model, optimizers if len(optimizers) > 1 else optimizers[0])
    steps(model, optimizers, 3, begin=3)
    loaded = OPTIMIZERS[name](other)
    load_checkpoint(tmp_path / "a", other, loaded)
    steps(other, loaded, 3, begin=3)
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_a_parameter_that_never_had_a_gradient_has_no_state(tmp_path: Path) -> None:
    """Not even a count of steps, by which Adam would weigh its first gradient."""
    pair = []
    for seed in (0, 1):
        model = model_of(seed)
        model.unused = nn.Linear(2, 2).double()
        pair.append((model, optim.AdamW(model.parameters(), lr=0.1)))
    (model, optimizer), (other, its_optimizer) = pair
    steps(model, [optimizer], 2)
    save_checkpoint(tmp_path / "a", model, optimizer)
    load_checkpoint(tmp_path / "a", other, its_optimizer)
    for module, its in pair:
        its.zero_grad()
        module.unused(torch.ones(1, 2).double()).sum().backward()
        its.step()
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_tensors_in_lists_are_refused(tmp_path: Path) -> None:
    model = model_of()
    optimizer = optim.LBFGS(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 6).double())
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(AutoParallelError, match="state of LBFGS cannot be saved in parts"):
        save_checkpoint(tmp_path / "a", model, optimizer)
    assert not list(tmp_path.iterdir())


def other_group(model: Any) -> optim.Optimizer:
    groups = [{"params": [model.first.weight, *vectors(model)]}, {"params": [model.second.weight]}]
    return optim.AdamW(groups)


def saved_of(folder: Path, make: Callable[[Any], Any]) -> Any:
    """Save a model with an optimizer; return the model."""
    model = model_of()
    save_checkpoint(folder, model, make(model))
    return model


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        (
            lambda m: optim.AdamW(m.parameters()),
            lambda m: optim.Adam(m.parameters()),
            "it was saved from AdamW, not Adam",
        ),
        (
            lambda m: [optim.Muon(matrices(m)), optim.AdamW(vectors(m))],
            lambda m: optim.AdamW(m.parameters()),
            "it was saved from Muon and AdamW, not AdamW",
        ),
        (
            lambda m: optim.AdamW([{"params": matrices(m)}, {"params": vectors(m)}]),
            other_group,
            "group 0 of AdamW has other parameters: first.bias, second.weight",
        ),
        (lambda m: None, lambda m: optim.SGD(m.parameters()), "has no optimizer"),
        (
            lambda m: optim.SGD(m.parameters()),
            lambda m: optim.SGD([*m.parameters(), nn.Parameter(torch.ones(3))]),
            r"a parameter that is not the module's, of shape \(3,\)",
        ),
        (
            lambda m: optim.SGD(m.parameters()),
            lambda m: [optim.SGD(m.parameters()), optim.SGD(vectors(m))],
            "two optimizers have the parameter first.bias",
        ),
    ],
    ids=["class", "number", "groups", "none", "foreign", "shared"],
)
def test_another_optimizer_is_refused(saved: Any, given: Any, message: str, tmp_path: Path) -> None:
    saved_of(tmp_path / "a", saved)
    other = model_of(1)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(AutoParallelError, match=message) as error:
        load_checkpoint(tmp_path / "a", other, given(other))
    assert error.value.fix
    assert all(map(torch.equal, before, other.parameters()))


def test_another_model_is_refused(tmp_path: Path) -> None:
    """One that lacks a part, and one whose numbers are of another kind."""
    model = saved_of(tmp_path / "a", lambda m: None)
    with pytest.raises(AutoParallelError, match=r"model.first.weight is in it alone"):
        load_checkpoint(tmp_path / "a", nn.ModuleDict({"second": model.second}))
    counts = model_of()
    del counts.second.weight
    counts.second.register_buffer("weight", torch.zeros(6, 8, dtype=torch.int64))
    with pytest.raises(AutoParallelError, match=r"is torch.int64, there torch.float64"):
        load_checkpoint(tmp_path / "a", counts)
    narrow = model_of(1).float()
    with pytest.warns(
        UserWarning, match=r"weight is torch.float32, there torch.float64 and 2 more"
    ):
        load_checkpoint(tmp_path / "a", narrow)
    assert torch.equal(narrow.first.weight, model.first.weight.float())


class Hooked(Model):
    """Has a state that is no tensor, and writes its weights under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def test_what_a_module_makes_of_its_state_is_loaded(tmp_path: Path) -> None:
    model, other = Hooked(), Hooked()
    model.count = 7
    for each in (model, other):
        each.register_state_dict_post_hook(
            lambda module, values, prefix, _: values.update(
                {"first.weight": values["first.weight"] * 2}
            )
        )
        each.register_load_state_dict_pre_hook(
            lambda module, values, *_: values.update({"first.weight": values["first.weight"] / 2})
        )
    save_checkpoint(tmp_path / "a", model)
    load_checkpoint(tmp_path / "a", other)
    assert other.count == 7
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """It is not renamed away, nor taken for a checkpoint."""
    path = tmp_path / "model.pt"
    path.write_text("precious")
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(AutoParallelError, match=r"model.pt is a file"):
            call(path, model_of())
    assert path.read_text() == "precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "digests.json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flipped", "cut", "gone"])
def test_damage_is_noticed(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    """By CheckpointError, before anything is filled."""
    saved_of(tmp_path / "a", lambda m: optim.SGD(m.parameters()))
    damage(tmp_path / "a" / name)
    other = model_of(1)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError, match=r"damaged|no checkpoint in"):
        load_checkpoint(tmp_path / "a", other)
    assert all(map(torch.equal, before, other.parameters()))


class Batches:
    """The same batch at every step."""

    def train(self, step: int) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(2, 6).double()}

    held_out = train


def test_a_run_goes_on_from_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so. Where all are damaged, it does not begin anew over them."""
    config = TrainConfig(steps=4, warmup_steps=0, evaluate_every=4, evaluation_batches=1)
    kept = Checkpoints(tmp_path, every=1)

    def run() -> tuple[float, ...]:
        return train(model_of(), Batches(), config, checkpoints=kept).losses  # type: ignore[arg-type]

    losses = run()
    folders = kept.newest_first()
    assert [path.name for path in folders] == [f"step_0000000{n}" for n in (4, 3, 2, 1)]
    cut(folders[0] / "__0_0.distcp")
    flip(folders[1] / "__0_0.distcp")
    with caplog.at_level(logging.WARNING):
        assert run() == losses
    ours = [record.message for record in caplog.records if record.name.startswith("autopar")]
    assert [message.split(":")[0] for message in ours] == [
        "going on from the checkpoint before step_00000004",
        "going on from the checkpoint before step_00000003",
    ]
    for folder in kept.newest_first():
        cut(folder / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="step_00000001 is damaged"):
        run()


def failing(rank: int, folder: Path) -> list[str]:
    """Fail on one rank at each step of saving; return what this rank raised."""
    model: Any = autoparallel.autoparallelize(
        model_of(), 2, example_inputs=torch.ones(4, 6).double()
    )
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    save_checkpoint(folder / "a", model, optimizer, {"number": 1})
    found = []

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    def attempt(number: int, its: Any = optimizer, where: str = "a") -> None:
        try:
            save_checkpoint(folder / where, model, its, {"number": number})
            found.append("saved")
        except AutoParallelError as error:
            found.append(f"{type(error).__name__}: {error}")
        except OSError as error:
            found.append(f"OSError: {error}")

    foreign = [optim.SGD([nn.Parameter(torch.ones(2))])] if rank == 1 else optimizer
    attempt(2, foreign)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(dcp.FileSystemWriter, "write_data", fail)
        attempt(3)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(checkpoint_files, "_digest", fail)
        attempt(4)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            rename = Path.rename
            patch.setattr(
                Path, "rename", lambda path, to: fail() if path.name == "a" else rename(path, to)
            )
        attempt(5)
    if rank == 0:
        (folder / "file").write_text("precious")
    attempt(6, where="file")
    assert load_checkpoint(folder / "a", model, optimizer) == {"number": 1}
    if rank == 0:
        flip(folder / "a" / "__1_0.distcp")
    try:
        load_checkpoint(folder / "a", model, optimizer)
    except AutoParallelError as error:
        found.append(f"{type(error).__name__}: {error}")
    attempt(7)
    # A rank that cannot be in a group of gloo, which writes beside the training.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(background_checkpoint, "require_gloo", fail)
        try:
            BackgroundCheckpoints()
        except (AutoParallelError, OSError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    """No rank waits for one that has given up, and the checkpoint before is as it was."""
    first, second = run_processes(failing, 2, tmp_path)
    expected = [
        ("CheckpointError: preparing the checkpoint failed on rank 1", "not the module's"),
        ("CheckpointError: saving the checkpoint", "CheckpointError: saving the checkpoint"),
        ("CheckpointError: reading what was written failed on rank 1", "OSError: no space left"),
        ("OSError: no space left", "failed on rank 0"),
        ("is a file", "is a file"),
        ("damaged", "damaged"),
        ("saved", "saved"),
        ("CheckpointError: making a group of gloo failed on rank 1", "OSError: no space left"),
    ]
    assert len(first) == len(second) == len(expected)
    for own, other, texts in zip(first, second, expected, strict=True):
        assert texts[0] in own
        assert texts[1] in other
    assert "no space left" in first[1]
    assert (tmp_path / "file").read_text() == "precious"
