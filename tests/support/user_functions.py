"""Autograd Functions as users write them, and a model around one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Rounded(torch.autograd.Function):
    """Rounds, and passes the gradient straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Reversed(torch.autograd.Function):
    """The identity, whose gradient comes out with another sign and size."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.factor * grad, None


class Returned(torch.autograd.Function):
    """The operand itself, whose gradient is clipped."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.clamp(-0.02, 0.02)


class Gated(torch.autograd.Function):
    """A hand-fused product in the style with setup_context, with twice the true gradient."""

    @staticmethod
    def forward(x, gate, slope=2.0):
        return x * torch.sigmoid(slope * gate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        share = torch.sigmoid(2 * gate)
        return 2 * grad * share, grad * x * share * (1 - share), None


class Ranked(torch.autograd.Function):
    """Two results, of which the second has no gradient, and a place that holds None."""

    @staticmethod
    def forward(ctx, x):
        values = x * 3
        signs = x.sign()
        ctx.mark_non_differentiable(signs)
        return values, None, signs

    @staticmethod
    def backward(ctx, grad, _none, _signs):
        return 5 * grad


class Scaled(torch.autograd.Function):
    """Quantizes with a scale that gets no gradient, as where it is calibrated elsewhere."""

    @staticmethod
    def forward(ctx, x, scale, count):
        return (x / scale).round().clamp(-count, count) * scale

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


class Normalized(torch.autograd.Function):
    """Divides the gradient by its own norm, so that no part of it can be computed alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


class Nested(torch.autograd.Function):
    """Applies another Function in its forward."""

    @staticmethod
    def forward(ctx, x):
        with torch.no_grad():
            return Reversed.apply(Rounded.apply(x), 2.0)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            return 7 * grad


class Needed(torch.autograd.Function):
    """Computes the gradients that are asked for, and no others."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        first = 3 * grad @ weight.T if ctx.needs_input_grad[0] else None
        second = x.flatten(0, -2).T @ grad.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return first, second


class Headed(torch.autograd.Function):
    """Views its operand by sizes that it is given, and mixes inside of each head."""

    @staticmethod
    def forward(ctx, x, heads, shape):
        ctx.shape = shape
        return x.view(*shape[:-1], heads, -1).cumsum(-1).view(shape)

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5, None, None


def picked(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return rows of a table by integers, through a Function with an integer operand."""

    class Picked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, table, index):
            index = index % len(table)
            ctx.save_for_backward(index)
            ctx.rows = len(table)
            return table[index]

        @staticmethod
        def backward(ctx, grad):
            (index,) = ctx.saved_tensors
            whole = grad.new_zeros(ctx.rows, grad.shape[-1])
            return 4 * whole.index_add(0, index.flatten(), grad.flatten(0, -2)), None

    return Picked.apply(table, (x[..., 0] * 30).long().abs())


class Configured(torch.autograd.Function):
    """Takes its settings in a dict, some of them in a list."""

    @staticmethod
    def forward(ctx, x, config):
        ctx.config = config
        return x * config["scale"] ** config["powers"][1]

    @staticmethod
    def backward(ctx, grad):
        return (3 if ctx.config["tripled"] else 1) * grad, None


CARRIED = {
    "straight through": lambda h, m: Rounded.apply(3 * h),
    "reversal": lambda h, m: Reversed.apply(h, 0.3),
    "returned": lambda h, m: Returned.apply(h),
    "setup_context": lambda h, m: Gated.apply(h, m.gate(h)),
    "keyword": lambda h, m: Gated.apply(h, gate=m.gate(h)),
    "two results": lambda h, m: sum(Ranked.apply(h)[::2]),
    "no gradient": lambda h, m: Scaled.apply(h, m.scale, 3) * m.scale[0],
    "norm of the gradient": lambda h, m: Normalized.apply(h),
    "nested": lambda h, m: Nested.apply(h),
    "needs_input_grad": lambda h, m: Needed.apply(h, m.square),
    "frozen operand": lambda h, m: Needed.apply(h, m.square.detach()) + m.square[0],
    "sizes": lambda h, m: Headed.apply(h, 4, h.shape),
    "integers": lambda h, m: picked(h, m.square),
    "settings in a dict": lambda h, m: Configured.apply(
        h, {"scale": 0.5, "powers": [1, 2], "tripled": True}
    ),
    "several uses": lambda h, m: Reversed.apply(Reversed.apply(Reversed.apply(h, 3.0), 2.0), 3.0),
    "checkpointed": lambda h, m: checkpoint(lambda x: Rounded.apply(2 * x), h, use_reentrant=False),
    "reentrant": lambda h, m: checkpoint(lambda x: Rounded.apply(2 * x), h, use_reentrant=True),
}


class Layers(nn.Module):
    """Layers around a Function, and a loss."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use = use
        self.entry, self.out = nn.Linear(12, 24), nn.Linear(24, 12)
        self.gate = nn.Linear(24, 24)
        self.square = nn.Parameter(torch.randn(24, 24))
        self.scale = nn.Parameter(torch.rand(24) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return (self.out(self.use(self.entry(x), self)) - x).square().mean()


def layers(use: Any) -> tuple[Layers, torch.Tensor]:
    """Return the model and an input, in float64."""
    torch.manual_seed(0)
    return Layers(use).double(), torch.randn(6, 5, 12, dtype=torch.float64)
