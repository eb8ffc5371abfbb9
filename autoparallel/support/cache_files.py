"""The folder of cached files, and writing files that processes share whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["default_cache_folder", "write_whole"]


def default_cache_folder() -> Path:
    """Return the folder for what is worth keeping between runs. It need not exist.

    The first of: the environment's AUTOPARALLEL_CACHE, XDG_CACHE_HOME/autoparallel (the XDG Base
    Directory rule), ~/.cache/autoparallel. Raises FileNotFoundError where none is known.
    """
    chosen_by_user = os.environ.get("AUTOPARALLEL_CACHE")
    if chosen_by_user:
        return Path(chosen_by_user)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "autoparallel"
    except RuntimeError:  # of a user without a home, as containers run programs
        raise FileNotFoundError("there is no home folder: set AUTOPARALLEL_CACHE") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing; make its folder where there is none.

    path: of the file. content: its bytes. Raises OSError where it cannot be written, and leaves
    nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because os.replace is atomic only within one file system.
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
