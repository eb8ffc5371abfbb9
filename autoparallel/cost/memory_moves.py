"""Predicted time of moving bytes through a device's memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autoparallel.cost.hardware import Hardware

__all__ = ["moved_seconds"]

Sizes = npt.NDArray[np.float64]


def moved_seconds(nbytes: Sizes, hardware: Hardware) -> Sizes:
    """Predicted time of one kernel that reads and writes so many bytes in all, in seconds.

    Short arrays were just written and are still in a cache. Between the sizes that the hardware
    has figures for, the time per byte changes with the size's logarithm.
    """
    if not hardware.memory_by_size:
        return nbytes / hardware.sustained_bytes_per_second
    sizes, rates = np.array(hardware.memory_by_size, dtype=float).T
    return nbytes * np.interp(np.log(np.maximum(nbytes, 1.0)), np.log(sizes), 1 / rates)
