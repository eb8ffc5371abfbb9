"""The files of a checkpoint: written whole or not at all, and recognized when they have changed.

Every step that can fail on one rank ends in an exchange, so that no rank waits for one that has
given up: all of them raise, and name the rank and the cause.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from autoparallel.errors import AutoParallelError, CheckpointError
from autoparallel.parallel.checkpoint_metadata import METADATA
from autoparallel.support.json_text import read_json

__all__ = ["find_checkpoint", "is_first_rank", "require_intact", "together", "write_checkpoint"]

Result = TypeVar("Result")

# Ends of the folders in which the checkpoint before, and the one that is being written, lie.
_REPLACED = ".replaced"
_PARTIAL = ".partial"
# The file with the digests of all others.
_DIGESTS = "digests.json"


def is_first_rank() -> bool:
    """Return whether this process is rank 0, as it is without a process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def together(what: str, work: Callable[[], Result], group: Any = None) -> Result:
    """Do one rank's work and return its result; raise on all ranks if it fails on one.

    A collective call. what: says what fails, for the message. group: torch's process group, by
    default of all ranks. A rank raises its own error; others raise CheckpointError, which names the
    first rank that failed.
    """
    failure: BaseException | None = None
    result: Any = None
    try:
        result = work()
    # CheckpointException is no Exception, but a BaseException.
    except (Exception, CheckpointException) as error:
        failure = error
    text = "" if failure is None else f"{type(failure).__name__}: {failure}"
    texts = [text]
    if dist.is_initialized():
        texts = [""] * dist.get_world_size()
        dist.all_gather_object(texts, text, group)
    if isinstance(failure, CheckpointException):
        raise CheckpointError(
            f"{what} failed", why=str(failure), fix="see the cause, and the space on the device"
        ) from failure
    if failure is not None:
        raise failure
    failed = [(rank, text) for rank, text in enumerate(texts) if text]
    if failed:
        raise CheckpointError(
            f"{what} failed on rank {failed[0][0]}",
            why=failed[0][1],
            fix="see the cause on that rank; what was saved before is as it was",
        )
    return result


def write_checkpoint(folder: Path, write: Callable[[Path], None], group: Any = None) -> None:
    """Have `write` fill a folder, and give it its name when it is complete. A collective call.

    folder: of the checkpoint, on a file system that all ranks see. write: a function that every
    rank calls with the folder to write to. group: as of `together`. Raises
    AutoParallelError where a file lies in the way, which stays as it is, and CheckpointError if it
    fails on any rank; what was there before is then as it was.
    """
    partial, replaced = (folder.with_name(folder.name + end) for end in (_PARTIAL, _REPLACED))

    def prepare() -> None:
        _refuse_file(folder)
        if is_first_rank():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    # No rank writes into a folder that rank 0 has still to empty, renames what another still
    # writes, or goes on before the checkpoint can be read.
    together(f"preparing the checkpoint in {folder}", prepare, group)
    together(f"saving the checkpoint in {folder}", lambda: write(partial), group)
    digests = together("reading what was written", lambda: _digests_of_share(partial), group)
    shares: list[dict[str, str]] = [digests]
    if dist.is_initialized():
        shares = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, digests, group)

    def publish() -> None:
        if not is_first_rank():
            return
        merged = {name: digest for share in shares for name, digest in share.items()}
        (partial / _DIGESTS).write_text(json.dumps(merged, indent=1, sort_keys=True))
        # Between the two renames there is no `folder`: find_checkpoint then takes the one before.
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)

    together(f"naming the checkpoint in {folder}", publish, group)


def find_checkpoint(folder: Path) -> Path:
    """Return the folder of the complete checkpoint of that name, be it the one before.

    Where a job was stopped while it replaced a checkpoint, the older one is still complete. Raises
    AutoParallelError if there is none.
    """
    _refuse_file(folder)
    for path in (folder, folder.with_name(folder.name + _REPLACED)):
        # Rank 0 writes this file after all others but the digests, and names the folder then.
        if (path / METADATA).exists():
            return path
    raise CheckpointError(
        f"no checkpoint in {folder}",
        why="there is no such folder, or save_checkpoint() never came to its end",
        fix="pass the folder that was given to save_checkpoint()",
    )


def require_intact(folder: Path) -> None:
    """Raise CheckpointError, on all ranks, unless all files are as they were written.

    A collective call: each rank reads its share of the files.
    """
    together(f"reading the checkpoint in {folder}", lambda: _require_share(folder))


def _require_share(folder: Path) -> None:
    """Raise CheckpointError that names the files of this rank's share that have changed."""
    path = folder / _DIGESTS
    if not path.exists():
        raise CheckpointError(
            f"the checkpoint in {folder} is none of save_checkpoint(), or damaged",
            why=f"there is no {_DIGESTS}, by which its files are known again",
            fix="give a folder that save_checkpoint() wrote, with all of its files",
        )
    try:
        expected = read_json(path.read_text())
        if not isinstance(expected, dict) or METADATA not in expected:
            raise ValueError("it is no table of the files")
        names = _share(sorted(expected))
    except (ValueError, TypeError) as error:
        raise _damaged(folder, [f"{_DIGESTS} cannot be read ({error})"]) from error
    here = {entry.name for entry in folder.iterdir() if entry.is_file()} - {_DIGESTS}
    wrong = [f"{name} was not written with it" for name in sorted(here - set(expected))]
    for name in names:
        # A name with a folder in it would lead out of this one.
        if name not in here:
            wrong.append(f"{name} is missing")
        elif _digest(folder / name) != expected[name]:
            wrong.append(f"{name} is not as it was written")
    if wrong:
        raise _damaged(folder, wrong)


def _damaged(folder: Path, wrong: list[str]) -> CheckpointError:
    """Return the error for a checkpoint whose files have changed since they were written."""
    return CheckpointError(
        f"the checkpoint in {folder} is damaged",
        why="; ".join(wrong),
        fix="load the checkpoint before it, or bring back the files from where they were copied",
    )


def _digests_of_share(folder: Path) -> dict[str, str]:
    """Return the digests of this rank's share of the files in a folder."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return {name: _digest(folder / name) for name in _share(names)}


def _share(names: list[str]) -> list[str]:
    """Return the names that this rank takes of those that all ranks share out."""
    if not dist.is_initialized():
        return names
    return names[dist.get_rank() :: dist.get_world_size()]


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_file(folder: Path) -> None:
    """Raise AutoParallelError where something else than a folder has the checkpoint's name."""
    if folder.exists() and not folder.is_dir():
        raise AutoParallelError(
            f"{folder} is a file, and a checkpoint is a folder",
            why="it would have to be replaced",
            fix="give the name of a folder, or one that does not exist yet",
        )
