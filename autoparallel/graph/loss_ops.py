"""Torch's losses, by the place of `reduction` among their arguments."""

from __future__ import annotations

__all__ = ["MEAN", "OF_ELEMENTS", "OF_LABELS", "SUM"]

# Torch's numbers for `reduction`, of which the mean is the usual one.
MEAN, SUM = 1, 2
# A mean of the first divides by the number of elements, one of the second by the number of labels
# that are not ignored.
OF_ELEMENTS = {
    "aten.mse_loss.default": 2,
    "aten.l1_loss.default": 2,
    "aten.smooth_l1_loss.default": 2,
    "aten.huber_loss.default": 2,
    "aten.soft_margin_loss.default": 2,
    "aten.kl_div.default": 2,
    "aten.binary_cross_entropy.default": 3,
    "aten.binary_cross_entropy_with_logits.default": 4,
}
OF_LABELS = {
    "aten.cross_entropy_loss.default": 3,
    "aten.nll_loss.default": 3,
    "aten.nll_loss_nd.default": 3,
}
