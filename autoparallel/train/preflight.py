"""Looked at before a run begins: processes, the folder, and that all ranks mean the same run."""

from __future__ import annotations

import hashlib
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autoparallel.mesh import Mesh
from autoparallel.parallel.meeting import start_process_group
from autoparallel.support.units import bytes_text
from autoparallel.train.config import TrainingError
from autoparallel.train.config_text import config_to_toml
from autoparallel.train.run_config import RunConfig

__all__ = [
    "gathered",
    "join_processes",
    "mesh_of_run",
    "rank_and_world",
    "require_room",
    "require_same_data",
    "require_same_run",
]


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, as torchrun or the group says.

    >>> rank_and_world()
    (0, 1)
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(timeout_seconds: float) -> torch.device:
    """Start the process group of a launched job, and return this process's device.

    NCCL is taken where there are GPUs, and gloo otherwise. A single process has no group.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        start_process_group("nccl" if cuda else "gloo", timedelta(seconds=timeout_seconds))
    return device or torch.device("cpu")


def mesh_of_run(text: str, world_size: int) -> Mesh | None:
    """Return the mesh of `parallel.mesh` for so many ranks, None where it is to be chosen.

    Raises TrainingError where the axes are not those of so many ranks.

    >>> print(mesh_of_run("dp=2,tp", 8))
    Mesh(dp=2, tp=4)
    """
    if text == "auto":
        return None
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        axes[name] = int(size) if size else 0
    sized = 1
    for number in axes.values():
        sized *= number or 1
    free = [name for name, number in axes.items() if not number]
    if free and sized and world_size % sized == 0:
        axes[free[0]] = world_size // sized
        sized = world_size
    if sized != world_size:
        raise TrainingError(
            f"parallel.mesh = {text!r} on {world_size} ranks",
            why=f"its axes are of {sized} ranks, or of a multiple of it where one has no size",
            fix=f"start so many, or write other sizes; {text.partition('=')[0]!r} alone takes all",
        )
    return Mesh(**axes)


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order. A collective call."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def require_same_run(config: RunConfig) -> None:
    """Raise TrainingError, on every rank, where ranks do not mean the same run.

    A collective call, and the first one of a run: by its configuration the others are made.
    """
    _require_same({
        "the configuration": config_to_toml(config),
        "the release of torch": torch.__version__,
        "the code of autoparallel": _digest_of_code(),
    })  # fmt: skip


def require_same_data(digest: str) -> None:
    """Raise TrainingError, on every rank, where ranks have other rows. A collective call.

    digest: of the token files, or a name of what makes the rows.
    """
    _require_same({"the data": digest})


def _require_same(values: dict[str, str]) -> None:
    """Raise TrainingError, on every rank, where a value is not rank 0's. A collective call."""
    rows = gathered(values)
    for what, value in rows[0].items():
        others = [rank for rank, row in enumerate(rows) if row[what] != value]
        if others:
            raise TrainingError(
                f"the ranks do not mean the same run: {what} of rank {others[0]} is not rank 0's",
                why=_difference(value, rows[others[0]][what]),
                fix="start all ranks with the same command, files and installation",
            )


def _difference(one: str, other: str) -> str:
    """Return the first line in which two texts differ."""
    for first, second in zip(one.splitlines(), other.splitlines(), strict=False):
        if first != second:
            return f"rank 0 has {first[:100]!r}, the other {second[:100]!r}"
    return "one of them is longer"


def _digest_of_code() -> str:
    """Return a digest of the package's sources."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def require_room(folder: Path, nbytes: int) -> None:
    """Raise TrainingError unless a folder can be written to, and has room for so many bytes.

    It is made where there is none, and a file is written and removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise TrainingError(
            f"the run cannot write to {folder}",
            why=error.strerror or str(error),
            fix="give another folder: --folder=PATH",
        ) from error
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise TrainingError(
            f"too little room in {folder}",
            why=f"one checkpoint takes {bytes_text(nbytes)}, and {bytes_text(free)} are free",
            fix="make room, give another folder, or checkpoint.every = 0",
        )
