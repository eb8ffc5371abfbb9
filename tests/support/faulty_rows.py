"""Rows and a model for runs in which something goes wrong on the way."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

# The batch on which something happens.
BAD = 4
_HUNTED_STEP_SECONDS = 0.1


class Regression(nn.Module):
    """Two products, whose loss is the mean square of what they miss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.last(torch.tanh(self.first(x))) - y).square().mean()


def regression() -> nn.Module:
    return Regression()


def good(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """Rows that follow from their numbers."""
    places = torch.arange(first, first + count, dtype=torch.float64)[:, None]
    x = torch.sin(places + 10 * number + torch.arange(4) + 100 * (part == "train"))
    return {"x": x, "y": x[:, :2] * 2}


def with_nan(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """The same, but for one batch."""
    batch = good(part, number, first, count)
    if part == "train" and number == BAD:
        batch["x"][0, 0] = float("nan")
    return batch


def without(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """The same, without that batch."""
    return good(part, number + (part == "train" and number >= BAD), first, count)


def none(part: str, number: int, first: int, count: int) -> None:
    """No rows."""


def with_signal(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """The same; the last rank is asked to end while it reads that batch."""
    from autoparallel.train.preflight import rank_and_world

    rank, world_size = rank_and_world()
    if part == "train" and number == BAD and first + count and rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return good(part, number, first, count)


def faulty(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """The same; something happens once, as the variables of the environment say.

    FAULT: what. FAULT_RANK: to which rank. FAULT_MARK: a file that is written just before.
    """
    from autoparallel.train.preflight import rank_and_world

    mark, fault = Path(os.environ["FAULT_MARK"]), os.environ["FAULT"]
    here = rank_and_world()[0] == int(os.environ["FAULT_RANK"])
    if part == "train" and here and count and not mark.exists():
        if fault == "kill in a save":
            _kill_in_the_next_save(mark)
        elif number == BAD:
            mark.write_text(str(time.time()))
            _happen(fault)
    return good(part, number, first, count)


def _happen(fault: str) -> None:
    """Let something happen to this process."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault in ("SIGTERM", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, fault))
    if fault == "exit":
        os._exit(3)
    if fault == "hang":
        time.sleep(3600)
    if fault == "raise":
        raise RuntimeError("a fault in the user's code")


def _kill_in_the_next_save(mark: Path) -> None:
    """Have this process end when it has written its files, before the checkpoint is complete."""
    from autoparallel.parallel import checkpoint_files

    def end(folder: Path) -> dict[str, str]:
        mark.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    checkpoint_files._digests_of_share = end


def hunted(part: str, number: int, first: int, count: int) -> dict[str, Tensor]:
    """The same; every few steps a process is killed at a random moment of a step or a save.

    HUNTED: a folder with a file for each kill. HUNTED_KILLS: how many there are to be; a batch is
    hunted once there were as many as a third of its number. A step takes about as long as a save.
    """
    from autoparallel.train.preflight import rank_and_world

    folder = Path(os.environ["HUNTED"])
    done = len(list(folder.iterdir()))
    rank, world_size = rank_and_world()
    chosen = random.Random(str(done))
    due = 3 * done + 3 + chosen.randrange(3)
    hunted_here = part == "train" and done < int(os.environ["HUNTED_KILLS"]) and number >= due
    if hunted_here and rank == chosen.randrange(world_size):

        def kill() -> None:
            (folder / f"{done}").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Timer(chosen.random() * 2 * _HUNTED_STEP_SECONDS, kill).start()
    time.sleep(_HUNTED_STEP_SECONDS)
    return good(part, number, first, count)
