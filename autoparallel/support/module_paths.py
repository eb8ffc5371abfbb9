"""Paths of modules, and of what is in them: names with dots between them."""

from __future__ import annotations

__all__ = ["join_path"]


def join_path(path: str, name: str) -> str:
    """Return the path of what has the path `name` inside of the module at `path`.

    The empty path is the module itself, on either side.

    >>> join_path("layers.0", "linear"), join_path("", "linear"), join_path("layers.0", "")
    ('layers.0.linear', 'linear', 'layers.0')
    """
    return f"{path}.{name}" if path and name else path or name
