"""Sizes as people write them."""

from __future__ import annotations

import re

from autoparallel.errors import PlanError

__all__ = ["bytes_text", "parse_bytes"]

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}ib": 2 ** (10 * (power + 1)) for power, prefix in enumerate("kmgtp")},
    **{f"{prefix}b": 1000 ** (power + 1) for power, prefix in enumerate("kmgtp")},
}


def parse_bytes(size: int | str) -> int:
    """Bytes of "40GiB" (2**30 each), "80 GB" (10**9 each) or a number.

    Raises PlanError for anything else, and for what is not more than nothing.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", size.lower())
        if match is None or match[2] not in _UNITS:
            raise PlanError(f"{size!r} is no amount of memory", fix='write "40GiB" or "80GB"')
        size = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise PlanError(f"{size!r} is no amount of memory", fix='write "40GiB" or "80GB"')
    return size


def bytes_text(nbytes: float) -> str:
    """ "2.0 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
