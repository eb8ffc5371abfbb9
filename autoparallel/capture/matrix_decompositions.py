"""Decompositions of statistics of matrices, which torch checks by their numbers on the way.

A tracer has no numbers. What is left out here is a check that cannot fail, or the call is traced as
it is where it could.
"""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.capture.decomposition_registry import decomposition

__all__: list[str] = []


@decomposition("aten.cov.default")
def covariance(x: Any, *, correction: int = 1, fweights: Any = None, aweights: Any = None) -> Any:
    """(x - mean) (x - mean)^T over the number of observations less the correction; rows are
    variables.

    Torch sets a negative count to zero, and refuses weights that are negative: the first cannot be
    for a correction of 0 or 1, and calls with weights are traced as they are.
    """
    weighted = fweights is not None or aweights is not None
    floating = x.dtype.is_floating_point or x.dtype.is_complex
    if weighted or not floating or correction not in (0, 1) or x.dim() > 2:
        return NotImplemented
    rows = x.reshape(1, -1) if x.dim() < 2 else x
    count = rows.shape[1]
    centred = rows - rows.sum(1, keepdim=True) / count
    result = centred @ (centred.t().conj() if x.dtype.is_complex else centred.t())
    result = result / (count - correction)
    # One variable has a variance, and no matrix of one.
    return result.reshape(()) if rows.shape[0] == 1 else result


@decomposition("aten.corrcoef.default")
def correlation(x: Any) -> Any:
    """The covariance over the deviations of both variables, between -1 and 1."""
    if x.dtype.is_complex or not x.dtype.is_floating_point or x.dim() > 2:
        return NotImplemented
    matrix = covariance(x)
    if matrix.dim() == 0:
        return matrix / matrix
    deviation = torch.diagonal(matrix).sqrt()
    matrix = matrix / deviation.unsqueeze(1) / deviation.unsqueeze(0)
    return matrix.clamp(-1, 1)
