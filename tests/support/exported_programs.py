"""Exported programs of functions, for tests of what torch writes in them."""

from __future__ import annotations

import torch
from torch import nn


def exported(forward, *inputs):
    """Return the exported program of a function of tensors whose sizes are all symbolic."""

    class Module(nn.Module):
        def forward(self, *inputs):
            return forward(*inputs)

    free = torch.export.Dim.AUTO
    shapes = (tuple(dict.fromkeys(range(x.dim()), free) for x in inputs),)
    return torch.export.export(Module(), inputs, strict=False, dynamic_shapes=shapes)
