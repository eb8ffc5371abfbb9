"""Nothing in a checkpoint runs as it is read, and one of another kind is told from one of ours."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn, optim

from autoparallel import load_checkpoint, save_checkpoint
from autoparallel.errors import AutoParallelError, CheckpointError
from autoparallel.parallel.checkpoint_metadata import METADATA
from autoparallel.parallel.plain_values import packed, unpacked

VALUES: dict[str, Any] = {
    "step": 3,
    "wide": 2**64 - 1,
    "loss": [0.1, math.inf, -math.inf, 1e-320],
    "done": (True, None, ("a", [])),
    "names": {"é": {1: "one", (2, "b"): {}}, "t": ""},
    "tensors": [torch.arange(6).reshape(2, 3), torch.tensor(2.5, dtype=torch.bfloat16)],
    "masks": {"m": torch.tensor([True, False]), "none": torch.zeros(0, 3)},
    "complex": torch.tensor([1 + 2j]).conj(),
}


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_values_go_there_and_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", model_of(), extra=VALUES)
    assert same(load_checkpoint(tmp_path / "a", model_of(1)), VALUES)
    assert math.isnan(unpacked(packed(math.nan, "x")))


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, len, Path("x"), b"bytes", nn.Linear(1, 1), {"deep": [lambda: 0]}],
    ids=["object", "set", "function", "path", "bytes", "module", "deep"],
)
def test_what_only_a_pickle_holds_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(AutoParallelError, match=r"which a checkpoint does not hold") as caught:
        save_checkpoint(tmp_path / "a", model_of(), extra={"mine": value})
    assert "extra['mine']" in str(caught.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 30, b"\0\0\0\0\0\0\0\x02{]", b"\0" * 7 + b"\x04true"]
)
def test_other_bytes_are_no_values(content: bytes) -> None:
    bytes_of = torch.tensor(list(content), dtype=torch.uint8)
    if content.endswith(b"true"):
        assert unpacked(bytes_of) is True
        return
    with pytest.raises(ValueError):  # noqa: PT011 - of Python's own readers, too
        unpacked(bytes_of)


class Runs:
    """Runs code as it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


def resealed(folder: Path) -> None:
    """Write digests that fit the files, as who changes a file on purpose does."""
    names = [path for path in folder.iterdir() if path.name != "digests.json"]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}
    (folder / "digests.json").write_text(json.dumps(digests))


def runs(folder: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Runs()))


def runs_inside(folder: Path) -> None:
    table = pickle.loads((folder / METADATA).read_bytes())
    table.planner_data = Runs()
    (folder / METADATA).write_bytes(pickle.dumps(table))


def leads_out(folder: Path) -> None:
    table = pickle.loads((folder / METADATA).read_bytes())
    for place in table.storage_data.values():
        place.relative_path = "../" + place.relative_path
    (folder / METADATA).write_bytes(pickle.dumps(table))


def is_huge(folder: Path) -> None:
    table = pickle.loads((folder / METADATA).read_bytes())
    table.state_dict_metadata["plain.extra"].size = torch.Size([2**50])
    (folder / METADATA).write_bytes(pickle.dumps(table))


def remembers(folder: Path) -> None:
    """Ask Python for room for four thousand million things."""
    (folder / METADATA).write_bytes(b"\x80\x04}r\xff\xff\xff\xff.")


def is_empty(folder: Path) -> None:
    (folder / METADATA).write_bytes(b"")


def is_cut(folder: Path) -> None:
    path = folder / METADATA
    path.write_bytes(path.read_bytes()[:-20])


def is_another_pickle(folder: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": {}}))


@pytest.mark.parametrize(
    "change",
    [runs, runs_inside, remembers, leads_out, is_huge, is_empty, is_cut, is_another_pickle],
)
def test_a_table_of_contents_runs_nothing(
    change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digests find what has changed by chance; these changes were made on purpose."""
    save_checkpoint(tmp_path / "a", model_of(), extra={"step": 1})
    change(tmp_path / "a")
    resealed(tmp_path / "a")
    other = model_of(1)
    before = other.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        load_checkpoint(tmp_path / "a", other)
    assert torch.equal(other.weight, before)
    assert "it ran" not in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_release_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of()
    stored = {f"model.{name}": value for name, value in model.state_dict().items()}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save({**stored, "extra": Runs()}, checkpoint_id=tmp_path / "a", planner=planner)
    resealed(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"written by an earlier release") as caught:
        load_checkpoint(tmp_path / "a", model_of(1))
    assert "save it with this one" in caught.value.fix
    assert "it ran" not in capsys.readouterr().out


def test_checkpoints_of_others_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save(model_of().state_dict(), checkpoint_id=tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"none of save_checkpoint"):
        load_checkpoint(tmp_path / "a", model_of(1))
    resealed(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"none of save_checkpoint") as caught:
        load_checkpoint(tmp_path / "a", model_of(1))
    assert "weight" in caught.value.why
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint in"):
        load_checkpoint(tmp_path / "empty", model_of(1))


def test_a_learning_rate_that_is_a_tensor_goes_on(tmp_path: Path) -> None:
    model = model_of()
    optimizer = optim.Adam(model.parameters(), lr=torch.tensor(0.25), betas=(0.5, 0.75))
    save_checkpoint(tmp_path / "a", model, optimizer)
    other = model_of(1)
    its_optimizer = optim.Adam(other.parameters(), lr=torch.tensor(1.0))
    load_checkpoint(tmp_path / "a", other, its_optimizer)
    (group,) = its_optimizer.param_groups
    assert (group["lr"], group["betas"]) == (torch.tensor(0.25), (0.5, 0.75))


@pytest.mark.parametrize(
    ("saved", "given", "told"),
    [
        (torch.float32, torch.float16, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.float16, torch.bfloat16, True),
        (torch.float16, torch.float32, False),
    ],
    ids=str,
)
def test_a_narrower_model_is_told(
    saved: torch.dtype, given: torch.dtype, told: bool, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "a", model_of().to(saved))
    if not told:
        load_checkpoint(tmp_path / "a", model_of(1).to(given))
        return
    with pytest.warns(UserWarning, match=f"{given}, there {saved}"):
        load_checkpoint(tmp_path / "a", model_of(1).to(given))
