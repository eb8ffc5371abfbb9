"""Seconds of moving bytes through a device's memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autoparallel.cost.hardware import Hardware

__all__ = ["moved_seconds"]

Sizes = npt.NDArray[np.float64]


def moved_seconds(nbytes: Sizes, hardware: Hardware) -> Sizes:
    """Return the predicted seconds of one kernel that reads and writes so many bytes in all.

    nbytes: an array of any shape. Short arrays were just written and are still in a cache. Between
    the sizes that the hardware has figures for, the time per byte changes with the size's
    logarithm; without figures the sustained rate counts at every size.

    >>> from autoparallel.cost.hardware import find_hardware
    >>> hardware = find_hardware("dgx-a100")
    >>> second = hardware.sustained_bytes_per_second
    >>> moved_seconds(np.array([second]), hardware)
    array([1.])
    """
    if not hardware.memory_by_size:
        return nbytes / hardware.sustained_bytes_per_second
    sizes, rates = np.array(hardware.memory_by_size, dtype=float).T
    # Caches follow each other by factors, so a linear axis would favour the largest sizes.
    return nbytes * np.interp(np.log(np.maximum(nbytes, 1.0)), np.log(sizes), 1 / rates)
