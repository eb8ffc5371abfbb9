"""Habits with optimizers, schedulers, and what stands between backward and step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn, optim
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
    parameters_to_vector,
    vector_to_parameters,
)
from torch.optim import lr_scheduler

from .case import Case
from .models import Classifier, plain, rows
from .registry import habit as register
from .registry import in_group

habit = in_group("Optimizers and steps")


def train(make: Callable[[Any], Any], model: Any) -> Any:
    """Return the losses of three steps. make: the optimizer of some parameters."""
    optimizer = make(model.parameters())
    losses = []
    for seed in range(3):

        def closure(seed: int = seed) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(*rows(6, seed))
            loss.backward()
            return loss

        # Those that need no closure take the loss of it all the same.
        losses.append(float(optimizer.step(closure)))
    optimizer.zero_grad()
    return losses


# Each with the settings that make it do what it does.
_MAKERS: dict[str, Callable[[Any], Any]] = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD(weight_decay=0.1)": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD(nesterov=True)": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD(foreach=True)": partial(optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "SGD(fused=True)": partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "Adam": partial(optim.Adam, lr=0.1),
    "Adam(amsgrad=True, foreach=False)": partial(optim.Adam, lr=0.1, amsgrad=True, foreach=False),
    "AdamW": partial(optim.AdamW, lr=0.1),
    "AdamW(fused=True)": partial(optim.AdamW, lr=0.1, fused=True),
    "Adamax": partial(optim.Adamax, lr=0.1),
    "Adagrad": partial(optim.Adagrad, lr=0.1),
    "Adagrad(fused=True)": partial(optim.Adagrad, lr=0.1, fused=True),
    "RMSprop(centered=True)": partial(optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
    "Rprop": partial(optim.Rprop, lr=0.1),
    "Adadelta": partial(optim.Adadelta, lr=0.1),
    "NAdam": partial(optim.NAdam, lr=0.1),
    "RAdam": partial(optim.RAdam, lr=0.1),
    "ASGD": partial(optim.ASGD, lr=0.1),
    "Adafactor": partial(optim.Adafactor, lr=0.1),
    "LBFGS": partial(optim.LBFGS, lr=0.1, max_iter=4),
    "LBFGS(line_search_fn='strong_wolfe')": partial(
        optim.LBFGS, max_iter=4, line_search_fn="strong_wolfe"
    ),
}


def _optimizer_row(name: str, make: Callable[[Any], Any]) -> None:
    def run(case: Case) -> None:
        case.compare(partial(train, make))

    register("Optimizers and steps", f"torch.optim.{name}")(run)


for _name, _make in _MAKERS.items():
    _optimizer_row(_name, _make)


@habit("torch.optim.Muon for matrices, AdamW for the rest", needs=("torch.optim.Muon",))
def muon(case: Case) -> None:
    def script(model: Any) -> Any:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        optimizers = [optim.Muon(matrices, lr=0.1), optim.AdamW(vectors, lr=0.1)]
        return by_hand(model, optimizers)

    case.computed = torch.bfloat16  # it orthogonalizes in bfloat16
    case.compare(script)


def by_hand(model: Any, optimizers: list[Any], between: Any = lambda model: None) -> Any:
    """Return the losses of three steps. between: what is done between backward and step."""
    losses = []
    for seed in range(3):
        loss = model(*rows(6, seed))
        loss.backward()
        losses += [loss, between(model)]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def sgd(model: Any) -> Any:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@habit("several optimizers, for several submodules")
def several(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizers = [
            optim.SGD(model.up.parameters(), 0.1),
            optim.Adam(model.down.parameters(), 0.1),
        ]
        return by_hand(model, optimizers)

    case.compare(script)


@habit("parameter groups by name: no weight decay for biases")
def groups(case: Case) -> None:
    def script(model: Any) -> Any:
        named = list(model.named_parameters())
        kinds: Any = [
            {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
            {"params": [p for n, p in named if not n.endswith("bias")], "lr": 0.02},
        ]
        return by_hand(model, [optim.AdamW(kinds, lr=0.1, weight_decay=0.1)])

    case.compare(script)


@habit("named_parameters() given to an optimizer")
def named(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = optim.AdamW(model.named_parameters(), lr=0.1)
        return by_hand(model, [optimizer]), optimizer.param_groups[0]["param_names"]

    case.compare(script)


@habit("add_param_group while training, for layers that thaw")
def added(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = optim.SGD(model.down.parameters(), lr=0.1)
        first = by_hand(model, [optimizer])
        optimizer.add_param_group({"params": list(model.up.parameters()), "lr": 0.01})
        model.zero_grad()
        return first, by_hand(model, [optimizer])

    case.compare(script)


@habit("learning rate schedulers: LambdaLR, CosineAnnealingLR, ReduceLROnPlateau, OneCycleLR")
def schedulers(case: Case) -> None:
    makers: list[Any] = [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
    ]

    def script(model: Any) -> Any:
        values = []
        for make in makers:
            optimizer = sgd(model)
            scheduler = make(optimizer)
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            for seed in range(2):
                loss = by_hand(model, [optimizer])[0]
                scheduler.step(loss.item()) if plateau else scheduler.step()
                values += [loss, optimizer.param_groups[0]["lr"] + seed]
        return values

    case.compare(script)


@habit("clip_grad_norm_ of all parameters: the norm and the steps")
def clip_norm(case: Case) -> None:
    def between(model: Any) -> Any:
        return clip_grad_norm_(model.parameters(), 0.05)

    case.compare(lambda model: by_hand(model, [sgd(model)], between))


@habit("clip_grad_norm_ with norm_type=inf, 1, and foreach=True")
def clip_other_norms(case: Case) -> None:
    def between(model: Any) -> Any:
        return [
            clip_grad_norm_(model.parameters(), 0.5, norm_type=1.0),
            clip_grad_norm_(model.parameters(), 0.05, norm_type=float("inf"), foreach=True),
        ]

    case.compare(lambda model: by_hand(model, [sgd(model)], between))


@habit("clip_grad_norm_ of one submodule's parameters")
def clip_part(case: Case) -> None:
    def between(model: Any) -> Any:
        return clip_grad_norm_(model.up.parameters(), 0.01)

    case.compare(lambda model: by_hand(model, [sgd(model)], between))


@habit("clip_grad_value_")
def clip_value(case: Case) -> None:
    def between(model: Any) -> None:
        clip_grad_value_(model.parameters(), 0.02)

    case.compare(lambda model: by_hand(model, [sgd(model)], between))


@habit("get_total_norm of gradients, and of parameters")
def total_norm(case: Case) -> None:
    def between(model: Any) -> Any:
        parameters = list(model.parameters())
        return [get_total_norm([p.grad for p in parameters]), get_total_norm(parameters).detach()]

    case.compare(lambda model: by_hand(model, [sgd(model)], between))


@habit("the norm of a gradient by hand: p.grad.norm().item(), and a sum over them")
def norms_by_hand(case: Case) -> None:
    def between(model: Any) -> Any:
        squares = [p.grad.norm().item() ** 2 for p in model.parameters()]
        return sum(squares) ** 0.5

    case.compare(lambda model: by_hand(model, [sgd(model)], between))


@habit("gradients added up over several batches before a step")
def accumulation(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = sgd(model)
        losses = []
        for seed in range(4):
            loss = model(*rows(6, seed)) / 2
            loss.backward()
            losses.append(loss)
            if seed % 2:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    case.compare(script)


@habit("zero_grad(set_to_none=False), and model.zero_grad()")
def zeroed(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = sgd(model)
        for seed in range(2):
            model(*rows(6, seed)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        model(*rows(6, 3)).backward()
        model.zero_grad(set_to_none=False)
        model(*rows(6, 4)).backward()

    case.compare(script)


@habit("gradients read and written by hand: p.grad.mul_(0.5), p.grad = None, p.grad.zero_()")
def by_gradients(case: Case) -> None:
    def between(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.grad.mul_(0.5)
            if name == "up.bias":
                parameter.grad = None
            if name == "down.bias":
                parameter.grad.zero_()

    case.compare(lambda model: by_hand(model, [sgd(model)], between))


@habit("a step by hand under no_grad: p -= lr * p.grad, and p.data.add_(p.grad)")
def step_by_hand(case: Case) -> None:
    def script(model: Any) -> Any:
        losses = []
        for seed in range(3):
            loss = model(*rows(6, seed))
            loss.backward()
            losses.append(loss)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.data.add_(parameter.grad, alpha=-0.01)
                    parameter.grad = None
        return losses

    case.compare(script)


@habit("an average of weights by hand: ema[name].lerp_(p, 0.1), and copied back")
def average_by_hand(case: Case) -> None:
    def script(model: Any) -> Any:
        mean = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = sgd(model)
        for _ in range(2):
            by_hand(model, [optimizer])
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    mean[name].lerp_(parameter, 0.1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(mean[name])
        return model(*rows(6, 5))

    case.compare(script)


@habit("parameters_to_vector and vector_to_parameters")
def vectors(case: Case) -> None:
    def script(model: Any) -> Any:
        vector = parameters_to_vector(model.parameters()).detach()
        vector_to_parameters(vector * 2, model.parameters())
        return vector, model(*rows(6, 0))

    case.compare(script)


@habit("the number of parameters: sum(p.numel() for p in model.parameters())")
def count(case: Case) -> None:
    def script(model: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        return sum(p.numel() for p in model.parameters()), [tuple(p.shape) for p in trained]

    case.compare(script)


@habit("a penalty on weights in the loss: loss + 0.1 * sum(p.square().sum())")
def penalty(case: Case) -> None:
    def script(model: Any) -> Any:
        losses = []
        optimizer = sgd(model)
        for seed in range(2):
            optimizer.zero_grad()
            loss = model(*rows(6, seed)) + 0.1 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            optimizer.step()
            losses.append(loss)
        return losses

    case.compare(script)


class Twice(Classifier):
    """Reads its second weight a second time, with a penalty on it."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor, scale: Any = 1.0) -> torch.Tensor:
        return super().forward(x, labels, scale) + 0.1 * self.down.weight.abs().sum()


@habit("a penalty on weights inside of forward")
def penalty_inside(case: Case) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return Twice().double()

    case.compare(lambda model: by_hand(model, [sgd(model)]), build)


@habit("ZeroRedundancyOptimizer over the split module's parameters")
def zero_redundancy(case: Case) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def script(model: Any) -> Any:
        if "_autoparallel" not in vars(model):
            return by_hand(model, [optim.Adam(model.parameters(), lr=0.1)])
        with case.group():
            optimizer = ZeroRedundancyOptimizer(model.parameters(), optim.Adam, lr=0.1)
            return by_hand(model, [optimizer])

    case.compare(script)


@habit("spectral_norm and weight_norm parametrizations, made before splitting")
def parametrized(case: Case) -> None:
    def build() -> nn.Module:
        model = plain()
        nn.utils.parametrizations.weight_norm(model.up)
        return model

    case.compare(lambda model: by_hand(model, [sgd(model)]), build)


@habit("pruning with torch.nn.utils.prune, before splitting")
def pruned(case: Case) -> None:
    from torch.nn.utils import prune

    def build() -> nn.Module:
        model = plain()
        prune.l1_unstructured(model.up, "weight", 0.5)
        return model

    case.compare(lambda model: by_hand(model, [sgd(model)]), build)
