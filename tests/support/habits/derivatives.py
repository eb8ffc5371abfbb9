"""Habits with derivatives beyond one backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from .case import Case
from .models import built, inputs, plain, rows, scores
from .registry import in_group

habit = in_group("Derivatives of all kinds")


def parameters_of(case: Case, model: Any, values: Any) -> list[torch.Tensor]:
    """Return whole tensors of what came for each parameter, detached."""
    names = [name for name, _ in model.named_parameters()]
    return [case.whole(model, n, v).detach() for n, v in zip(names, values, strict=True)]


@habit("torch.autograd.grad(loss, model.parameters())")
def autograd_grad(case: Case) -> None:
    def script(model: Any) -> Any:
        gradients = torch.autograd.grad(model(*rows(6, 0)), list(model.parameters()))
        return parameters_of(case, model, gradients)

    case.compare(script)


@habit("torch.autograd.grad(loss, x) of the inputs")
def grad_of_inputs(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs(grad=True)
        return torch.autograd.grad(model(x).square().mean(), x)

    case.compare(script, scores, inputs(grad=True))


@habit("a gradient penalty: the norm of the input's gradient added to the loss")
def gradient_penalty(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs(grad=True)
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        loss = y.square().mean() + (slope.norm(dim=1) - 1).square().mean()
        loss.backward()
        return loss

    case.compare(script, scores, inputs(grad=True))


class Energy(nn.Module):
    """An energy of positions; a force is its negative gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))).sum()


class Forces(Energy):
    """Differentiates inside of its forward."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        energy = super().forward(x)
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy, -slope


@habit("forces outside of the model: -grad(energy, positions), trained on")
def forces(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs(grad=True)
        energy = model(x)
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        loss = energy.square() + (slope + 1).square().mean()
        loss.backward()
        return loss

    case.compare(script, lambda: built(Energy), inputs(grad=True))


@habit("forces inside of the model: torch.autograd.grad in forward, trained on")
def forces_inside(case: Case) -> None:
    def script(model: Any) -> Any:
        energy, force = model(inputs())
        loss = energy.square() + (force - 1).square().mean()
        loss.backward()
        return loss

    case.compare(script, lambda: built(Forces), inputs())


@habit("a Hessian-vector product over the parameters (create_graph=True, grad twice)")
def hessian_vector(case: Case) -> None:
    def script(model: Any) -> Any:
        parameters = list(model.parameters())
        first = torch.autograd.grad(model(*rows(6, 0)), parameters, create_graph=True)
        dot = sum((g * g).sum() for g in first)
        second = torch.autograd.grad(dot, parameters)
        return parameters_of(case, model, second)

    case.compare(script)


@habit("loss.backward(create_graph=True), and a loss on the gradients")
def create_graph(case: Case) -> None:
    def script(model: Any) -> Any:
        model(*rows(6, 0)).backward(create_graph=True)
        names = dict(model.named_parameters())
        first = names["up.weight"].grad
        model.zero_grad()
        first.square().sum().backward()
        return case.whole(model, "up.weight", first).detach()

    case.compare(script)


@habit("backward() twice through one graph (retain_graph=True)")
def retain_graph(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(*rows(6, 0))
        loss.backward(retain_graph=True)
        loss.backward()

    case.compare(script)


@habit("backward() twice without retain_graph=True")
def backward_twice(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(*rows(6, 0))
        loss.backward()
        loss.backward()

    case.compare(script, fails=True)


@habit("backward(inputs=[a parameter]): only that one gets a gradient")
def backward_inputs(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(*rows(6, 0))
        loss.backward(inputs=[dict(model.named_parameters())["up.weight"]])

    case.compare(script)


@habit("two losses of one output, each with its backward pass")
def two_losses(case: Case) -> None:
    def script(model: Any) -> Any:
        y = model(inputs())
        y.square().mean().backward(retain_graph=True)
        y.abs().mean().backward()

    case.compare(script, scores, inputs())


@habit("one batch in two calls, and one backward pass for both")
def two_calls(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(*rows(6, 0)) + model(*rows(4, 1))
        loss.backward()
        return loss

    case.compare(script)


@habit("torch.func.functional_call with the module's own parameters, changed")
def functional(case: Case) -> None:
    def script(model: Any) -> Any:
        values = {n: p.detach() * 2 for n, p in model.named_parameters()}
        return functional_call(model, values, rows(6, 0))

    case.compare(script)


@habit("torch.func.functional_call with whole tensors of one's own")
def functional_whole(case: Case) -> None:
    def script(model: Any) -> Any:
        values = {n: p.detach() * 2 for n, p in plain().named_parameters()}
        return functional_call(model, values, rows(6, 0))

    case.compare(script)


@habit("torch.func.grad over functional_call")
def func_grad(case: Case) -> None:
    def script(model: Any) -> Any:
        values = {n: p.detach() for n, p in model.named_parameters()}
        gradients = grad(lambda v: functional_call(model, v, rows(6, 0)))(values)
        return parameters_of(case, model, gradients.values())

    case.compare(script)


@habit("torch.func.vmap over functional_call: a gradient for each sample")
def per_sample(case: Case) -> None:
    def script(model: Any) -> Any:
        values = {n: p.detach() for n, p in model.named_parameters()}

        def loss(v: Any, x: torch.Tensor) -> torch.Tensor:
            return functional_call(model, v, (x[None],)).square().mean()

        gradients = vmap(grad(loss), (None, 0))(values, inputs())
        return [value.detach() for value in gradients.values()]

    case.compare(script, scores, inputs())


@habit("torch.func.vmap over calls of the module")
def vmapped(case: Case) -> None:
    def script(model: Any) -> Any:
        return vmap(model)(inputs().view(2, 3, 6))

    case.compare(script, scores, inputs())


@habit("torch.func.jvp over the module: forward-mode derivatives")
def forward_mode(case: Case) -> None:
    def script(model: Any) -> Any:
        return jvp(model, (inputs(),), (inputs(seed=1),))

    case.compare(script, scores, inputs())


@habit("torch.func.jacrev over the module")
def jacobian_of_func(case: Case) -> None:
    case.compare(lambda model: jacrev(model)(inputs(2)), scores, inputs())


@habit("torch.func.hessian of a scalar of the module")
def hessian_of_func(case: Case) -> None:
    def script(model: Any) -> Any:
        return hessian(lambda x: model(x).square().sum())(inputs(2))

    case.compare(script, scores, inputs())


@habit("torch.autograd.functional.jacobian over the module")
def jacobian(case: Case) -> None:
    def script(model: Any) -> Any:
        return torch.autograd.functional.jacobian(model, inputs(2))

    case.compare(script, scores, inputs())


@habit("torch.autograd.gradcheck over the module")
def gradcheck(case: Case) -> None:
    def script(model: Any) -> Any:
        return torch.autograd.gradcheck(model, (inputs(2, grad=True),))

    case.compare(script, scores, inputs(grad=True))


@habit("torch.autograd.detect_anomaly()")
def anomaly(case: Case) -> None:
    def script(model: Any) -> Any:
        with torch.autograd.detect_anomaly(check_nan=True):
            loss = model(*rows(6, 0))
            loss.backward()
        return loss

    case.compare(script)
