"""The bytes that an optimizer holds for each element of a parameter."""

from __future__ import annotations

__all__ = ["state_bytes_per_element"]

_FLOAT32_BYTES = 4
# How many numbers each optimizer holds per element, besides a master copy.
_NUMBERS = {"sgd": 0, "momentum": 1, "adam": 2, "mixed_adam": 2}


def state_bytes_per_element(optimizer: str, itemsize: int) -> tuple[int, bool]:
    """Return the bytes of optimizer state per element of a parameter, and whether a master copy is
    in them.

    itemsize: bytes of one element of the parameter. "sgd" keeps nothing, "momentum" one number of
    the parameter's type, "adam" two. "mixed_adam" keeps a master copy and two moments in float32
    (12 bytes: arXiv:1910.02054, section 3.1); for a parameter that is float32 itself, the moments
    alone.

    >>> state_bytes_per_element("adam", 4)
    (8, False)
    >>> state_bytes_per_element("mixed_adam", 2)
    (12, True)
    """
    has_master = optimizer == "mixed_adam" and itemsize < _FLOAT32_BYTES
    if has_master:
        return (1 + _NUMBERS[optimizer]) * _FLOAT32_BYTES, True
    return _NUMBERS[optimizer] * itemsize, False
