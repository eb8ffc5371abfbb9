"""Ops of a user's own, which are registered with torch.library and have no rule."""

from __future__ import annotations

import torch
from torch.nn import functional


def define(name: str, schema: str, function, fake=None, backward=None, setup=None):
    """Define an op that runs `function`, with the function's own derivative or the given one."""
    op = torch.library.custom_op(f"probed::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(fake or function)

    def saved(ctx, inputs, output):
        ctx.inputs = inputs

    def derived(ctx, *grads):
        with torch.enable_grad():
            inputs = [
                item.detach().requires_grad_(item.is_floating_point())
                if isinstance(item, torch.Tensor)
                else item
                for item in ctx.inputs
            ]
            made = function(*inputs)
            outputs = (made,) if isinstance(made, torch.Tensor) else tuple(made)
            grads = tuple(grads[0]) if isinstance(grads[0], (list, tuple)) else grads
            wanted = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return tuple(
            next(found) if isinstance(i, torch.Tensor) and i.requires_grad else None for i in inputs
        )

    op.register_autograd(backward or derived, setup_context=setup or saved)
    return op


def gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def fused_heads(x: torch.Tensor, heads: int) -> list[torch.Tensor]:
    b, s, width = x.shape
    parts = x.reshape(b, s, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return [part.clone() for part in parts]


def head_norm(x: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows = x.unflatten(-1, (heads, x.shape[-1] // heads))
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)
    return rows.flatten(-2) * weight


def scan(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    state = torch.zeros_like(x[:, 0])
    rows = []
    for t in range(x.shape[1]):
        state = state * decay + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


def magnitude(x: torch.Tensor) -> torch.Tensor:
    return x.abs()


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(mask, 0).sum(-1)


def biased_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def softmax_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1) @ y


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2).clone()


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


def picky(x: torch.Tensor, mode: str) -> torch.Tensor:
    raise ValueError(f"mode {mode!r} is not known")


def entropy(x: torch.Tensor) -> torch.Tensor:
    if bool(((x.sum(-1) - 1).abs() > 1e-6).any()):
        raise ValueError("rows must sum to 1")
    return -(x * x.log())


def clipped(x: torch.Tensor) -> torch.Tensor:
    return x * 2


GATED = define("gated", "(Tensor x) -> Tensor", gated)
FUSED_HEADS = define("fused_heads", "(Tensor x, int heads) -> Tensor[]", fused_heads)
HEAD_NORM = define("head_norm", "(Tensor x, Tensor weight, int heads) -> Tensor", head_norm)
SCAN = define("scan", "(Tensor x, Tensor decay) -> Tensor", scan, lambda x, d: torch.empty_like(x))
MAGNITUDE = define("magnitude", "(Tensor x) -> Tensor", lambda x: magnitude(x))
MASKED_SUM = define("masked_sum", "(Tensor x, Tensor mask) -> Tensor", masked_sum)
BIASED = define(
    "biased_product", "(Tensor x, Tensor weight, Tensor bias) -> Tensor", biased_product
)
SOFTMAX_PRODUCT = define("softmax_product", "(Tensor x, Tensor y) -> Tensor", softmax_product)
MERGE_HEADS = define("merge_heads", "(Tensor x) -> Tensor", merge_heads)
ENTROPY = define("entropy", "(Tensor x) -> Tensor", entropy, torch.empty_like)
NOISY = define("noisy", "(Tensor x) -> Tensor", noisy, torch.empty_like)
PICKY = define(
    "picky", "(Tensor x, str mode) -> Tensor", picky, lambda x, mode: torch.empty_like(x)
)
CLIPPED = define(
    "clipped",
    "(Tensor x) -> Tensor",
    clipped,
    backward=lambda ctx, grad: (grad * 2).clamp(-1, 1),
)


def counted_mean(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1) / (x != 0).sum(-1)


def lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table[:, index.clamp(0, None)] if bool((index >= 0).all()) else _refuse(index)


def _refuse(index: torch.Tensor) -> torch.Tensor:
    raise IndexError(f"{index.min()} is below zero")


def looped_lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table[:, index]


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, target, reduction="none", ignore_index=-1)


COUNTED = define("counted_mean", "(Tensor x) -> Tensor", counted_mean)
LOOKUP = define(
    "lookup",
    "(Tensor table, Tensor index) -> Tensor",
    lookup,
    lambda table, index: table.new_empty(table.shape[0], *index.shape),
)
LOOPED = define("looped_lookup", "(Tensor table, Tensor index) -> Tensor", looped_lookup)
TOKEN_LOSS = define("token_loss", "(Tensor logits, Tensor target) -> Tensor", token_loss)
CLIPPED_BY_ALL = define(
    "clipped_by_all",
    "(Tensor x) -> Tensor",
    lambda x: x / torch.clamp(x.abs().max(), min=1.0),
)
POWER_SUM = define("power_sum", "(Tensor x) -> Tensor", lambda x: x.square().sum(-1).sqrt())
AVERAGE = define("average", "(Tensor x, Tensor y) -> Tensor", lambda x, y: (x - y).square().mean())


def single_only(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise TypeError(f"no kernel for {x.dtype}")
    return x.exp()


SINGLE = define("single_only", "(Tensor x) -> Tensor", single_only, torch.empty_like)
FORWARD = torch.library.custom_op(
    "probed::forward_only", lambda x: x.sin(), mutates_args=(), schema="(Tensor x) -> Tensor"
)
FORWARD.register_fake(torch.empty_like)


def _broken(ctx, grad):
    raise KeyError("saved")


BROKEN = define(
    "broken_backward", "(Tensor x) -> Tensor", lambda x: x.cos(), torch.empty_like, _broken
)


def _forgetful(ctx, grad):
    return grad * 2 if grad.numel() else torch.zeros_like(grad)


FORGETFUL = define(
    "forgetful", "(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like, _forgetful
)


def strict(function):
    """Return a function that refuses an operand without elements, as many kernels do."""

    def run(x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            raise ValueError("no rows")
        return function(x, *more)

    return run


STRICT_RATIO = define(
    "strict_ratio",
    "(Tensor x, Tensor scale) -> Tensor",
    strict(lambda x, scale: scale / x.square().sum(1, keepdim=True).sqrt()),
    lambda x, scale: x.new_empty(x.shape[0], 1, x.shape[2]),
)
STRICT_SUM = define(
    "strict_sum",
    "(Tensor x, Tensor scale) -> Tensor",
    strict(lambda x, scale: (x.square() * scale).exp().sum(0)),
    lambda x, scale: x.new_empty(x.shape[1], x.shape[2]),
)
STRICT_MEAN = define(
    "strict_mean",
    "(Tensor x, Tensor scale) -> Tensor",
    strict(lambda x, scale: (scale / x.abs().sqrt()).mean(0)),
    lambda x, scale: x.new_empty(x.shape[1], x.shape[2]),
)
STRICT_HIGHEST = define(
    "strict_highest",
    "(Tensor x) -> Tensor",
    strict(lambda x: x.amax(0)),
    lambda x: x.new_empty(x.shape[1], x.shape[2]),
)
RATIO_LOOKUP = define(
    "ratio_lookup",
    "(Tensor table, Tensor index, Tensor scale) -> Tensor",
    strict(lambda table, index, scale: scale / table[index].sqrt()),
    lambda table, index, scale: table.new_empty(*index.shape, table.shape[1]),
)
