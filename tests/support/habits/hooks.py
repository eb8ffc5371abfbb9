"""Habits with hooks: on modules, on tensors and on parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .case import Case
from .models import Scores, built, inputs, plain, rows, scores
from .registry import in_group

habit = in_group("Hooks")


def one_step(model: Any, seed: int = 0) -> torch.Tensor:
    """Return the loss of one batch, after its backward pass."""
    loss = model(*rows(6, seed))
    loss.backward()
    return loss


def doubled(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


@habit("a forward hook on a submodule, registered before splitting, that changes the output")
def forward_before(case: Case) -> None:
    case.compare(one_step, before=lambda model: model.up.register_forward_hook(doubled))


@habit("a forward hook on a submodule, registered after splitting, and removed again")
def forward_after(case: Case) -> None:
    def script(model: Any) -> Any:
        handle = model.up.register_forward_hook(doubled)
        hooked = one_step(model)
        handle.remove()
        return hooked, one_step(model)

    case.compare(script)


@habit("a forward hook that keeps activations of a submodule in a list")
def activations(case: Case) -> None:
    def script(model: Any) -> Any:
        kept: list[torch.Tensor] = []
        model.up.register_forward_hook(lambda module, args, output: kept.append(output))
        loss = one_step(model)
        return loss, kept[0].detach()

    case.compare(script)


@habit("forward pre-hooks and forward hooks with_kwargs=True on the model")
def with_kwargs(case: Case) -> None:
    def pre(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "scale": 3.0}

    def post(module: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        return output * kwargs["scale"]

    def script(model: Any) -> Any:
        model.register_forward_pre_hook(pre, with_kwargs=True)
        model.register_forward_hook(post, with_kwargs=True)
        loss = model(*rows(6, 0), scale=1.0)
        loss.backward()
        return loss

    case.compare(script)


def halved(module: Any, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if g is None else g / 2 for g in grad_input)


@habit("a full backward hook on a submodule, registered before splitting, that scales gradients")
def backward_before(case: Case) -> None:
    case.compare(one_step, before=lambda model: model.down.register_full_backward_hook(halved))


@habit("a full backward hook on a submodule, registered after splitting, and removed again")
def backward_after(case: Case) -> None:
    def script(model: Any) -> Any:
        handle = model.down.register_full_backward_hook(halved)
        one_step(model)
        hooked = model.up.bias.grad
        model.zero_grad()
        handle.remove()
        return case.whole(model, "up.bias", hooked), one_step(model)

    case.compare(script)


@habit("a full backward pre-hook on the model")
def backward_pre(case: Case) -> None:
    def script(model: Any) -> Any:
        model.register_full_backward_pre_hook(lambda module, grads: tuple(g * 3 for g in grads))
        return one_step(model)

    case.compare(script)


@habit("a full backward hook that keeps gradients of a submodule's output")
def backward_kept(case: Case) -> None:
    def script(model: Any) -> Any:
        kept: list[torch.Tensor] = []
        model.down.register_full_backward_hook(lambda m, gi, go: kept.append(go[0]))
        one_step(model)
        return kept

    case.compare(script)


class Hooked(Scores):
    """Its forward registers a hook on a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        return self.down(self.norm(hidden)).square().mean()


@habit("tensor.register_hook in forward, which clips a gradient")
def tensor_hook(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(inputs())
        loss.backward()
        return loss

    case.compare(script, lambda: built(Hooked), inputs())


@habit("retain_grad() on the model's output, and on its input")
def retain_grad(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs(grad=True) * 2
        x.retain_grad()
        y = model(x)
        y.retain_grad()
        y.square().mean().backward()
        return x.grad, y.grad

    case.compare(script, scores, inputs(grad=True))


@habit("register_hook on the tensor that the model returned")
def output_hook(case: Case) -> None:
    def script(model: Any) -> Any:
        y = model(inputs())
        y.register_hook(lambda grad: grad * 2)
        y.square().mean().backward()

    case.compare(script, scores, inputs())


@habit("parameter.register_hook, before splitting")
def parameter_hook_before(case: Case) -> None:
    case.compare(one_step, before=lambda m: m.up.weight.register_hook(lambda grad: grad * 2))


@habit("parameter.register_hook, after splitting, and removed again")
def parameter_hook_after(case: Case) -> None:
    def script(model: Any) -> Any:
        handle = model.up.weight.register_hook(lambda grad: grad * 2)
        one_step(model)
        handle.remove()
        return one_step(model, 1)

    case.compare(script)


@habit("parameter.register_hook that centers gradients: g - g.mean(1, keepdim=True)")
def centered(case: Case) -> None:
    def script(model: Any) -> Any:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.register_hook(lambda grad: grad - grad.mean(1, keepdim=True))
        return [one_step(model), one_step(model, 1)]

    case.compare(script)


@habit("parameter.register_hook that keeps gradients, with several backward passes added up")
def parameter_hook_kept(case: Case) -> None:
    def script(model: Any) -> Any:
        kept: list[Any] = []
        model.down.bias.register_hook(lambda grad: kept.append(grad.detach().clone()))
        one_step(model)
        one_step(model, 1)
        return [case.whole(model, "down.bias", grad) for grad in kept]

    case.compare(script)


@habit("register_post_accumulate_grad_hook on parameters, after splitting")
def post_accumulate(case: Case) -> None:
    def script(model: Any) -> Any:
        seen: list[str] = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
        one_step(model)
        return sorted(seen)

    case.compare(script)


@habit("the optimizer's step inside of the backward pass, one optimizer for each parameter")
def optimizer_in_backward(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

        def step(parameter: Any) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        return [one_step(model, seed) for seed in range(3)]

    case.compare(script)


@habit("global hooks on all modules (register_module_forward_hook)")
def global_hook(case: Case) -> None:
    def script(model: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            return output * 2 if isinstance(module, nn.Linear) else None

        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            return one_step(model)
        finally:
            handle.remove()

    case.compare(script, plain)


@habit("saved_tensors_hooks around the call, which pack to another type")
def saved_tensors(case: Case) -> None:
    def script(model: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
            loss = model(*rows(6, 0))
        loss.backward()
        return loss

    case.compare(script)
