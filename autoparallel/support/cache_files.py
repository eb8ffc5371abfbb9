"""Files that several processes share: where what was found out is kept, and writing it whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["default_cache_folder", "write_whole"]


def default_cache_folder() -> Path:
    """AUTOPARALLEL_CACHE, else XDG_CACHE_HOME/autoparallel, else ~/.cache/autoparallel."""
    moved = os.environ.get("AUTOPARALLEL_CACHE")
    if moved:
        return Path(moved)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "autoparallel"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, and its folder where there is none: a reader sees all of it or nothing.

    Raises OSError where it cannot be written, and leaves nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
