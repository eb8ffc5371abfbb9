"""Habits with training switched on and off: for parameters, for calls, for modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .case import Case
from .models import Scores, built, inputs, rows, scores
from .registry import in_group

habit = in_group("Freezing, modes and gradients switched off")


def loss_of(model: Any, seed: int = 0) -> torch.Tensor:
    """Return a loss on the scores of one batch, after its backward pass."""
    loss = model(inputs(seed=seed)).square().mean()
    loss.backward()
    return loss


def freeze(model: Any) -> None:
    """Have only the head trained."""
    model.requires_grad_(False)
    model.down.requires_grad_(True)


@habit("everything frozen but the head, before splitting")
def frozen_before(case: Case) -> None:
    case.compare(loss_of, scores, inputs(), before=freeze)


@habit("everything frozen but the head, after splitting")
def frozen_after(case: Case) -> None:
    def script(model: Any) -> Any:
        loss_of(model)
        model.zero_grad()
        freeze(model)
        return loss_of(model, 1)

    case.compare(script, scores, inputs())


@habit("frozen before splitting, and trained later: requires_grad_(True)")
def thawed(case: Case) -> None:
    def script(model: Any) -> Any:
        loss_of(model)
        model.requires_grad_(True)
        return loss_of(model, 1)

    case.compare(script, scores, inputs(), before=freeze)


@habit("one parameter frozen by parameter.requires_grad = False, and thawed again")
def one_frozen(case: Case) -> None:
    def script(model: Any) -> Any:
        model.up.weight.requires_grad = False
        loss_of(model)
        frozen = model.up.weight.grad is None
        model.up.weight.requires_grad = True
        return loss_of(model, 1), frozen

    case.compare(script, scores, inputs())


@habit("frozen layers of equal blocks: the first of them only")
def frozen_block(case: Case) -> None:
    def build() -> Any:
        return built(lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))))

    def script(model: Any) -> Any:
        loss_of(model)
        model[0].requires_grad_(True)
        return loss_of(model, 1)

    case.compare(script, build, inputs(), before=lambda model: model[0].requires_grad_(False))


@habit("evaluation under torch.no_grad(), and training after it")
def no_grad(case: Case) -> None:
    def script(model: Any) -> Any:
        with torch.no_grad():
            y = model(inputs())
        return y, y.requires_grad, loss_of(model)

    case.compare(script, scores, inputs())


@habit("the first call under torch.inference_mode(), and training after it")
def inference_first(case: Case) -> None:
    def script(model: Any) -> Any:
        with torch.inference_mode():
            y = model(inputs())
        return y.clone(), y.is_inference(), loss_of(model)

    case.compare(script, scores, inputs())


@habit("torch.set_grad_enabled(False) and (True) around calls")
def set_grad_enabled(case: Case) -> None:
    def script(model: Any) -> Any:
        with torch.set_grad_enabled(False):
            off = model(inputs())
        with torch.set_grad_enabled(True):
            return off, loss_of(model)

    case.compare(script, scores, inputs())


@habit("a validation function decorated with @torch.no_grad(), with model.eval() and train()")
def validation(case: Case) -> None:
    @torch.no_grad()
    def validate(model: Any) -> Any:
        model.eval()
        value = model(inputs(seed=5)).square().mean()
        model.train()
        return value

    def script(model: Any) -> Any:
        values = [validate(model)]
        loss_of(model)
        return [*values, validate(model)]

    case.compare(script, scores, inputs())


class Modes(nn.Module):
    """Computes otherwise in eval mode, by self.training and by batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.tanh(self.norm(self.up(x))))
        return y if self.training else y.softmax(-1)


@habit("model.eval() and model.train(), by turns")
def modes(case: Case) -> None:
    def script(model: Any) -> Any:
        values = []
        for training in (True, False, True, False):
            model.train(training)
            values.append(loss_of(model))
        return values

    case.compare(script, lambda: built(Modes), inputs())


@habit("one layer in eval mode while the model trains: model.norm.eval()")
def one_layer(case: Case) -> None:
    def script(model: Any) -> Any:
        first = loss_of(model)
        model.norm.eval()
        return first, loss_of(model, 1)

    case.compare(script, lambda: built(Modes), inputs())


@habit("a parameter that forward does not use: it has no gradient")
def unused(case: Case) -> None:
    case.compare(loss_of, lambda: built(Spare), inputs())


class Spare(Scores):
    """Has a layer that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


@habit("inputs that require grad: their gradients")
def inputs_grad(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs(grad=True)
        model(x).square().mean().backward()
        return x.grad

    case.compare(script, scores, inputs(grad=True))


@habit("inputs that require grad although the example inputs did not")
def inputs_grad_later(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs(grad=True)
        model(x).square().mean().backward()
        return x.grad

    case.compare(script, scores, inputs())


@habit("detach() of the output, and item() of the loss")
def detached(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(*rows(6, 0))
        return loss.detach(), loss.item()

    case.compare(script)
