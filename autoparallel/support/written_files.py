"""Files that the user names and this package writes."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from autoparallel.errors import AutoParallelError

__all__ = ["write_file"]


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
