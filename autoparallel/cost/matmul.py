"""Seconds of matrix products by shape: narrow parts run slower than wide ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autoparallel.cost.hardware import Hardware

__all__ = ["product_seconds"]

Sizes = npt.NDArray[np.float64]


def product_seconds(
    batch: Sizes, rows: Sizes, columns: Sizes, depth: Sizes, itemsize: int, hardware: Hardware
) -> Sizes:
    """Return the predicted arithmetic seconds of `batch` products (rows, depth) x (depth, columns).

    All sizes are arrays of one shape, or broadcast. itemsize: bytes of an element. hardware: whose
    `matmul` says how shape matters.
    The result is cut into tiles, each the work of one processor; the last wave of tiles takes as
    long as a full one. Starting and finishing a tile costs as much as `fill` more of the sum. Small
    tiles load more operands per multiplication: a tile of (r, c) runs at 1 / (1 + reload (1/r +
    1/c)) of the rate without loads. The library takes the fastest tile size.
    Source: Nvidia, "Matrix multiplication background user's guide" (tile and wave quantization).
    """
    matmul = hardware.matmul
    flops_per_processor = hardware.peak(itemsize) * matmul.efficiency / matmul.processors
    largest = min(1 / height + 1 / width for height, width in matmul.tiles)
    best: Sizes | None = None
    for height, width in matmul.tiles:
        tiles = batch * np.ceil(rows / height) * np.ceil(columns / width)
        # A last wave that is not full takes as long: narrow parts leave processors idle.
        waves = np.ceil(tiles / matmul.processors)
        # Relative to the largest tile, at which the efficiency was measured.
        slower = (1 + matmul.reload * (1 / height + 1 / width)) / (1 + matmul.reload * largest)
        seconds = (
            waves * (2.0 * height * width * slower / flops_per_processor) * (depth + matmul.fill)
        )
        best = seconds if best is None else np.minimum(best, seconds)
    assert best is not None
    return best
