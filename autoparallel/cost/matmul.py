"""Seconds of matrix products by shape: narrow parts run slower than wide ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from autoparallel.cost.hardware import Hardware

__all__ = ["chained_seconds", "product_seconds"]

Sizes = npt.NDArray[np.float64]
# The most rows that fused kernels keep: the result has to stay in registers.
_KEPT_ROWS = 128


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


def chained_seconds(
    batch: Sizes,
    rows: Sizes,
    columns: Sizes,
    depth: Sizes,
    itemsize: int,
    left: float,
    hardware: Hardware,
) -> Sizes:
    """Return the predicted arithmetic seconds of products that are inside of one fused kernel.

    Sizes are those of one product, as for `product_seconds`. A processor keeps a tile of rows and
    goes through all columns with it, product after product: no tile is started anew, and what is
    loaded serves all of its rows. left: the share of the products whose results do not stay there;
    they are finished after a tile's sum. The kernel's instructions reach `fused` of the rate.
    Source: arXiv:2307.08691, section 3.
    """
    matmul = hardware.matmul
    height = max(tall for tall, _ in matmul.tiles if tall <= _KEPT_ROWS)
    flops_per_processor = hardware.peak(itemsize) * matmul.efficiency / matmul.processors
    waves = np.ceil(batch * np.ceil(rows / height) / matmul.processors)
    slower = 1 + left * matmul.fill / height
    return waves * 2.0 * height * columns * depth * slower / (flops_per_processor * matmul.fused)
