"""Training goes on from a checkpoint as if it had not stopped, at any number of ranks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
from autoparallel.parallel.pieces import in_pieces
from autoparallel.placement import Layout, Shard
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import thread_ranks
from autoparallel.runtime.tensor_parts import join_layout, take_layout_part
from autoparallel.train.config import Checkpoints, TrainConfig
from autoparallel.train.loop import train
from autoparallel.train.models import GPT, GPTConfig

SIZES = GPTConfig(layers=1, hidden=40, heads=10, vocabulary=31, positions=16, dropout=0.2)
CONFIG = TrainConfig(
    steps=6, learning_rate=1e-2, warmup_steps=2, evaluate_every=2, evaluation_batches=1
)


@pytest.mark.parametrize(
    "shard", [Shard(0), Shard(1), Shard(1, 3), Shard(0, 2, 4), Shard(1, 1, 6)], ids=str
)
def test_pieces_lie_where_they_belong(shard: Shard, tmp_path: Path) -> None:
    """At 5 ranks: unequal parts and empty ones; every element once, in memory that is shared."""
    whole = torch.arange(24 * 36).view(24, 36)
    model = nn.Module()
    model.register_buffer("x", whole)
    save_checkpoint(tmp_path / "whole", model)
    seen = torch.zeros_like(whole)
    for ranks in thread_ranks(Mesh(tp=5)):
        part = take_layout_part(whole, (shard,), (5,), (ranks.rank,)).clone()
        made = in_pieces(part, whole.size(), (shard,), ranks.sizes, ranks.coordinates)
        assert made.size() == whole.size()
        assert len(made.pieces) == (shard.blocks if part.numel() else 0)
        for at, piece in made.pieces.items():
            place = tuple(slice(a, a + n) for a, n in zip(at, piece.size(), strict=True))
            assert torch.equal(whole[place], piece)
            seen[place] += 1
            piece.fill_(-1)
        assert (part == -1).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load({"model.x": made}, checkpoint_id=tmp_path / "whole")
        assert torch.equal(part, take_layout_part(whole, (shard,), (5,), (ranks.rank,)))
    assert (seen == 1).all()


class StoppedError(Exception):
    """The run ends, as if the machine had gone."""


@dataclass(frozen=True)
class Tokens:
    """Batches of 4 x 13 tokens that depend on the step alone. stop: at which there are no more."""

    stop: int = -1

    def train(self, step: int) -> dict[str, torch.Tensor]:
        if step == self.stop:
            raise StoppedError
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(31, (4, 13), generator=generator)
        return {"input_ids": tokens, "labels": tokens.roll(-1, 1)}

    def held_out(self, index: int) -> dict[str, torch.Tensor]:
        return self.train(1000 + index)


Parts = dict[tuple[int, int], tuple[Layout, torch.Tensor]]


def run(
    rank: int, folder: Path | None, stop: int = -1, seed: int = 8
) -> tuple[list[float], list[tuple[int, float]], Parts, bool]:
    """Losses, held-out losses, this rank's masks by (step, op); whether a parameter has blocks.

    seed: of the weights and of the masks; a run that goes on gets both from its checkpoint.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    plain = GPT(SIZES).double()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    model = autoparallel.autoparallelize(plain, world_size, example_inputs=Tokens().train(0))
    masks: Parts = {}
    original = rng._dropout_mask

    def recorded(x: Any, p: Any, key: Any, shape: Any, layout: Any, *rest: Any) -> torch.Tensor:
        made: torch.Tensor = original(x, p, key, shape, layout, *rest)
        masks[rest[1].drawing, key] = (layout, made)
        return made

    rng._dropout_mask = recorded
    checkpoints = Checkpoints(folder, every=3) if folder is not None else None
    blocks = any(isinstance(p, Shard) and p.blocks > 1 for (p,) in model.plan.storage.values())
    try:
        record = train(model, Tokens(stop), CONFIG, checkpoints=checkpoints)  # type: ignore[arg-type]
        return list(record.losses), list(record.held_out), masks, blocks
    except StoppedError:
        return [], [], masks, blocks
    finally:
        rng._dropout_mask = original


def joined(results: list[Any]) -> dict[tuple[int, int], torch.Tensor]:
    """Masks of the whole, from those of all ranks."""
    made = {}
    for key, (layout, _) in results[0][2].items():
        parts = [masks[key][1] for _, _, masks, _ in results]
        made[key] = join_layout(parts, layout, (len(parts),))
    return made


@pytest.mark.parametrize(
    ("ranks", "ranks_after"), [(2, 1), pytest.param(2, 4, marks=pytest.mark.broad)]
)
def test_training_goes_on_at_another_number_of_ranks(
    ranks: int, ranks_after: int, tmp_path: Path
) -> None:
    """Six steps with dropout at one rank; or three at some ranks and three at others."""
    losses, held_out, _, _ = whole = run(0, None)
    expected = joined([whole])
    assert {step for step, _ in expected} == set(range(6))
    stopped = run_processes(run, ranks, tmp_path, 3)
    assert all(blocks for *_, blocks in stopped)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    other = 1  # seed, to see that it is not used
    if ranks_after == 1:
        results = [run(0, tmp_path, -1, other)]
    else:
        results = run_processes(run, ranks_after, tmp_path, -1, other)
    for own_losses, own_held_out, _, _ in results:
        assert own_losses == pytest.approx(losses, rel=1e-11)
        assert own_held_out == [(n, pytest.approx(loss, rel=1e-11)) for n, loss in held_out]
    masks = joined(stopped) | joined(results)
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[key], mask) for key, mask in expected.items())
    assert len(list(tmp_path.iterdir())) == 2


def small(seed: int, width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A plain model that made one step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_an_interrupted_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any moment, what is found under the name is whole: the old one or the new."""
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.after(7)
    (old, old_optimizer), (new, new_optimizer) = small(0), small(1)
    with pytest.raises(AutoParallelError, match="no checkpoint in"):
        load_checkpoint(folder, old)
    save_checkpoint(folder, old, old_optimizer, {"number": 1})
    assert checkpoints.newest() == folder

    def save_half(stored: Any, checkpoint_id: Path, **_: Any) -> None:
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise StoppedError

    original = Path.rename
    for stop in ("writing", folder.name, folder.name + ".partial"):

        def rename(path: Path, target: Path, stop: str = stop) -> Path:
            if path.name == stop:
                raise StoppedError
            return original(path, target)

        with monkeypatch.context() as patch:
            if stop == "writing":
                patch.setattr(dcp, "save", save_half)
            patch.setattr(Path, "rename", rename)
            with pytest.raises(StoppedError):
                save_checkpoint(folder, new, new_optimizer, {"number": 2})
        assert checkpoints.newest() == folder
        found, optimizer = small(5)
        assert load_checkpoint(folder, found, optimizer) == {"number": 1}
        assert same(found, old)
    save_checkpoint(folder, new, new_optimizer, {"number": 2})
    found, optimizer = small(5)
    assert load_checkpoint(folder, found, optimizer) == {"number": 2}
    assert same(found, new)
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Another model, by the names of its tensors; a module without a plan."""
    model, optimizer = small(0)
    save_checkpoint(tmp_path / "a", model, optimizer)
    other, _ = small(0, width=4)
    with pytest.raises(AutoParallelError, match=r"model.0.weight is \(4, 2\), there \(3, 2\)"):
        load_checkpoint(tmp_path / "a", other)
    with pytest.raises(AutoParallelError, match=r"model.2.weight is not in it"):
        load_checkpoint(tmp_path / "a", nn.Sequential(*model, nn.Linear(2, 2)))
    waiting = autoparallel.autoparallelize(model, 1)
    with pytest.raises(AutoParallelError, match="has no plan yet"):
        save_checkpoint(tmp_path / "b", waiting)
    assert not (tmp_path / "b").exists()


def test_plain_models_go_on_too(tmp_path: Path) -> None:
    """With torch's own random numbers; a model that was never trained has no optimizer state."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / "a", model, optimizer)
    expected = model(torch.ones(8, 4))
    torch.manual_seed(99)
    load_checkpoint(tmp_path / "a", model, optimizer)
    assert torch.equal(model(torch.ones(8, 4)), expected)
    assert not optimizer.state


def test_an_optimizer_of_other_groups_is_refused(tmp_path: Path) -> None:
    """Learning rates of one group are not those of another."""
    model = nn.Linear(3, 2)
    save_checkpoint(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1))
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    with pytest.raises(AutoParallelError, match=r"has 2 groups of parameters, and had 1") as error:
        load_checkpoint(tmp_path / "run", model, torch.optim.SGD(groups, lr=0.2))
    assert error.value.fix
