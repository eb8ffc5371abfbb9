"""Files that the user names and this package writes."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from autoparallel.errors import AutoParallelError, PlanError

__all__ = ["check_folder", "write_file"]


def check_folder(path: str | PathLike[str]) -> None:
    """Check that a file of this name can be written, before the work that fills it begins.

    Raises PlanError where its folder is missing or may not be written to.

    >>> check_folder("plan.json")
    """
    file = Path(path).absolute()
    if not file.parent.is_dir():
        raise PlanError(f"there is no folder {file.parent}", fix="make it, or name another file")
    if file.is_dir():
        raise PlanError(f"{path} is a folder", fix="name a file in it")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PlanError(f"{path} may not be written", fix="name a file in a folder of your own")


def write_file(path: str | PathLike[str], content: bytes) -> None:
    """Write a file. Raises AutoParallelError where there can be none of this name."""
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise AutoParallelError(
            "the file cannot be written",
            where=str(path),
            why=error.strerror or type(error).__name__,
            fix="name a file in a folder that is there and may be written to",
        ) from error
