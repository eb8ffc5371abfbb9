"""Habits with autograd Functions of one's own, and with activation checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .case import Case
from .models import Blocks, Scores, blocks, built, inputs
from .registry import in_group

habit = in_group("Functions of one's own and checkpointing")


def step(model: Any) -> torch.Tensor:
    """Return the loss of one batch, after its backward pass, with gradients of the inputs."""
    x = inputs(grad=True)
    loss = model(x)
    loss.backward()
    return loss, x.grad


class Between(Scores):
    """Calls a function between its two products."""

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.between(self.up(x)))).square().mean()


class Straight(torch.autograd.Function):
    """Rounds forward, and passes the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Reversed(torch.autograd.Function):
    """Turns the gradient around."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.scale * grad, None


class Clipped(torch.autograd.Function):
    """Clips the gradient where the input was large: it saves a tensor for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad.clamp(-0.01, 0.01) * (x.abs() <= 1)


class Product(torch.autograd.Function):
    """A linear layer with a backward pass of its own, which reads the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight, 3 * grad.t() @ x


class Calling(torch.autograd.Function):
    """Is given a module, and runs it again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            out = ctx.module(again)
            torch.autograd.backward(out, grad)
        return again.grad, None, *(None for _ in ctx.module.parameters())


class Scheduled(torch.autograd.Function):
    """Keeps a dict of the model's, which its backward pass reads."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, settings: dict[str, float]) -> torch.Tensor:
        ctx.settings = settings
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.settings["factor"], None


class Rounding(Between):
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return Straight.apply(hidden)


class Reversing(Between):
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return Reversed.apply(torch.tanh(hidden), 0.5)


class Clipping(Between):
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return Clipped.apply(hidden)


class Multiplying(Between):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(Product.apply(x, self.up.weight))).square().mean()


class Handing(Between):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = Calling.apply(x, self.up, *self.up.parameters())
        return self.down(torch.tanh(hidden)).square().mean()


class Scheduling(Between):
    def __init__(self) -> None:
        super().__init__()
        self.settings = {"factor": 1.0}

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return Scheduled.apply(hidden, self.settings)


class Detaching(Between):
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + (hidden.sign() - hidden).detach()


@habit("autograd.Function: straight-through rounding")
def straight_through(case: Case) -> None:
    case.compare(step, lambda: built(Rounding), inputs(grad=True))


@habit("autograd.Function: gradient reversal, with a number as argument")
def reversal(case: Case) -> None:
    case.compare(step, lambda: built(Reversing), inputs(grad=True))


@habit("autograd.Function: saved tensors and clipped gradients")
def clipping(case: Case) -> None:
    case.compare(step, lambda: built(Clipping), inputs(grad=True))


@habit("autograd.Function that is given a parameter and has a backward pass of its own")
def own_product(case: Case) -> None:
    case.compare(step, lambda: built(Multiplying), inputs(grad=True))


@habit("autograd.Function that is given a module and runs it again in backward")
def given_module(case: Case) -> None:
    case.compare(step, lambda: built(Handing), inputs(grad=True))


@habit("autograd.Function that keeps a dict, which is changed before its backward pass")
def scheduled(case: Case) -> None:
    def script(model: Any) -> Any:
        losses = []
        for factor in (2.0, -0.5):
            losses.append(model(inputs()))
            model.settings["factor"] = factor
            losses[-1].backward()
        return losses

    case.compare(script, lambda: built(Scheduling), inputs())


@habit("straight-through written with detach()")
def detached(case: Case) -> None:
    case.compare(step, lambda: built(Detaching), inputs(grad=True))


class Later(Blocks):
    """A block is called in the way that is set on the class."""

    reentrant = False

    def call(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=self.reentrant)


class Reentrant(Later):
    reentrant = True


class Partly(Blocks):
    """Checkpoints a closure that reads parameters of two blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def run(y: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](torch.tanh(self.blocks[0](y)))

        return self.head(checkpoint(run, x, use_reentrant=False)).square().mean()


class InOrder(nn.Module):
    """A Sequential, of which torch checkpoints the parts."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False).square().mean()


class Around(nn.Module):
    """A model that checkpoints a part which is another model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@habit("torch.utils.checkpoint(use_reentrant=False) of blocks in a ModuleList")
def not_reentrant(case: Case) -> None:
    case.compare(step, lambda: built(Later), inputs(grad=True))


@habit("torch.utils.checkpoint(use_reentrant=True) of blocks in a ModuleList")
def reentrant(case: Case) -> None:
    case.compare(step, lambda: built(Reentrant), inputs(grad=True))


@habit("torch.utils.checkpoint of a closure over several submodules")
def closure(case: Case) -> None:
    case.compare(step, lambda: built(Partly), inputs(grad=True))


@habit("checkpoint_sequential")
def in_order(case: Case) -> None:
    case.compare(step, lambda: built(InOrder), inputs(grad=True))


@habit("torch.utils.checkpoint around the split module")
def around(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs(grad=True)
        loss = Around(model)(x)
        loss.backward()
        return loss, x.grad

    case.compare(script, blocks, inputs(grad=True))


class Dropping(Later):
    """Its gradient shows the mask that the backward pass has used, its output that of forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


class DroppingReentrant(Dropping):
    reentrant = True


def same_mask(case: Case, kind: Any) -> None:
    """Require that the backward pass draws again the mask that the forward pass has drawn.

    With every weight of the blocks at 0 and every last bias at 1, a block adds 2 where it keeps an
    element and 0 where it drops it. So the output tells the masks, and the gradient of the last
    block's bias is the sum of what was kept.
    """
    source = built(kind, 0.5)
    with torch.no_grad():
        for block in source.blocks:
            block.down.weight.zero_()
            block.down.bias.fill_(1.0)
        source.blocks[0].down.bias.fill_(10.0)
    # Nothing inside of a reentrant checkpoint gets a gradient unless something that enters it does.
    trained = kind is DroppingReentrant
    model = case.split(source, inputs(grad=trained))
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for seed in range(2):
        x = inputs(seed=seed, grad=trained)
        y = model(x)
        added = (y - x).detach().round()
        kept = (added % 20) / 2  # the second block's mask: 1 where it keeps
        assert 0 < kept.sum() < kept.numel()
        (y * weight).sum().backward()
        gradient = case.whole(model, "blocks.1.down.bias", model.blocks[1].down.bias.grad)
        case.same(gradient, (2 * kept * weight).sum(0), "the gradient of the last bias")
        first = case.whole(model, "blocks.0.down.bias", model.blocks[0].down.bias.grad)
        mask = (added >= 20).double()
        case.same(first, (2 * mask * weight).sum(0), "the gradient of the first bias")
        model.zero_grad()


@habit("torch.utils.checkpoint(use_reentrant=False) with dropout: one mask in both passes")
def dropout_not_reentrant(case: Case) -> None:
    same_mask(case, Dropping)


@habit("torch.utils.checkpoint(use_reentrant=True) with dropout: one mask in both passes")
def dropout_reentrant(case: Case) -> None:
    same_mask(case, DroppingReentrant)


class Frozen(Between):
    """Reads a part of itself without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.up(x).relu()
        return F.mse_loss(self.down(self.norm(torch.tanh(self.up(x)))), target[:, :5])


@habit("torch.no_grad() around a part of the forward")
def no_grad_inside(case: Case) -> None:
    case.compare(step, lambda: built(Frozen), inputs(grad=True))
