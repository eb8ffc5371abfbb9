"""Amounts of memory and times as people write them: "40GiB" to bytes, and numbers to text."""

from __future__ import annotations

import re

from autoparallel.errors import PlanError

__all__ = ["bytes_text", "parse_bytes", "rate_text", "seconds_text"]

# Binary prefixes (IEC 80000-13) have an i: 1 KiB is 1024 bytes, 1 kB is 1000.
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}ib": 2 ** (10 * (power + 1)) for power, prefix in enumerate("kmgtp")},
    **{f"{prefix}b": 1000 ** (power + 1) for power, prefix in enumerate("kmgtp")},
}


def parse_bytes(size: int | str) -> int:
    """Return the number of bytes in "40GiB" (2**30 each), "80 GB" (10**9 each), or a plain number.

    Raises PlanError for anything else, and for what is not more than nothing.

    >>> parse_bytes("40GiB"), parse_bytes("1.5 kB")
    (42949672960, 1500)
    """
    refusal = PlanError(
        f"{size!r} is no amount of memory",
        why="it is a positive number of bytes, or a number with a unit",
        fix='write "40GiB" or "80GB"',
    )
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", size.lower())
        if match is None or match[2] not in _UNITS:
            raise refusal
        size = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise refusal
    return size


def bytes_text(nbytes: float) -> str:
    """Return a number of bytes in the largest binary unit that keeps it at 1 or more,
    with one digit.

    >>> bytes_text(512), bytes_text(2 * 1024**2)
    ('512 B', '2.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def rate_text(per_second: float) -> str:
    """Return a number of things in a second to four digits, those of large ones in groups of three.

    >>> rate_text(143217.3), rate_text(8.29145)
    ('143,200', '8.291')
    """
    rounded = float(f"{per_second:.4g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:.4g}"


def seconds_text(seconds: float) -> str:
    """Return a time in the largest unit that keeps it at 1 or more, with three digits.

    >>> seconds_text(0.00148)
    '1.48 ms'
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds * 1e9:.3g} ns"
