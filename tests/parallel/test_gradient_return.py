"""Gradients come back to the parameters that the user sees, whichever way they are asked for.

By torch.autograd.grad, to be differentiated again, through hooks that are registered before and
after the model is split, and by backward passes for some of the parameters.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from broad_cases import broad
from changed_plans import spread
from processes import run_processes
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.parameters import whole_tensor
from autoparallel.plan import Plan

pytestmark = pytest.mark.usefixtures("one_trace")


class Tied(nn.Module):
    """A look-up whose table is also the last product, and a parameter that nothing reads.

    The terms of a sum have one gradient, and that of a parameter whose elements are added up is one
    number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(24, 12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 24, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.left, self.right = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))
        self.added = nn.Parameter(torch.ones(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        loss = functional.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(1, 1).flatten())
        return loss + (self.left + self.right).cos().sum() + self.added.sum()


class Branching(Tied):
    """The same with a branch on a value, so that it stays Python, and its modules are parts."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss = super().forward(tokens)
        return loss * (2 if float(loss.detach()) > 1e3 else 1) + self.norm.weight.square().sum()


def tokens() -> torch.Tensor:
    return torch.arange(24).mul(7).remainder(24).view(4, 6)


def plain(kind: type[Tied]) -> Tied:
    torch.manual_seed(3)
    return kind().double()


@cache
def planned(kind: type[Tied], mesh: Mesh) -> Plan:
    return autoparallel.make_plan(plain(kind), mesh=mesh, example_inputs=tokens())


def whole(module: nn.Module, path: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a gradient, or a parameter, as the unsplit model has it."""
    if tensor is None or "_autoparallel" not in module.__dict__:
        return tensor
    state, held = state_of(module), tensor.detach()
    lies = getattr(module.get_parameter(path), "placements", None)
    if getattr(held, "placements", lies) != lies:
        # Of a gradient that has a graph, torch 2.11 accumulates a copy that is whole on each rank.
        return full(held)
    return whole_tensor(held, state.layouts[path], state.ranks)


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {path: whole(module, path, p.grad) for path, p in module.named_parameters()}


def full(tensor: Any) -> torch.Tensor:
    """Return a tensor with all its elements, differentiably."""
    result: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result


def asked_for(make: Callable[..., Tied]) -> Any:
    """torch.autograd.grad for all parameters, and for two of them."""
    module = make()
    named = dict(module.named_parameters())
    every = torch.autograd.grad(module(tokens()), list(named.values()), allow_unused=True)
    some = torch.autograd.grad(module(tokens()), [named["up.weight"], named["norm.bias"]])
    assert all(parameter.grad is None for parameter in named.values())
    pairs = zip([*named, "up.weight", "norm.bias"], (*every, *some), strict=True)
    return [whole(module, path, grad) for path, grad in pairs]


def hessian_product(make: Callable[..., Tied]) -> Any:
    """The derivative of grad . v, by torch.autograd.grad and by a backward pass."""
    module = make()
    # The gradient of what is only added up is a constant.
    read = [each for each in module.named_parameters() if each[0] not in ("unused", "added")]
    named = dict(read)
    firsts = torch.autograd.grad(module(tokens()), list(named.values()), create_graph=True)
    sums = [(full(first) * full(first).detach().cos()).sum() for first in firsts]
    product = torch.stack(sums).sum()
    seconds = torch.autograd.grad(product, list(named.values()), retain_graph=True)
    product.backward()
    return [
        *(whole(module, path, second) for path, second in zip(named, seconds, strict=True)),
        gradients(module),
    ]


def kept_graph(make: Callable[..., Tied]) -> Any:
    """backward(create_graph=True), whose gradients are penalized in a second backward pass."""
    module = make()
    loss = module(tokens())
    with warnings.catch_warnings():  # torch's, that the graph is to be let go of, as below
        warnings.simplefilter("ignore", UserWarning)
        loss.backward(create_graph=True)
    named = {path: p for path, p in module.named_parameters() if path != "unused"}
    penalty = torch.stack([full(p.grad).square().sum() for p in named.values()]).sum()
    firsts = gradients(module)
    for parameter in named.values():
        parameter.grad = None
    (loss + penalty).backward()
    return [penalty.detach(), firsts, gradients(module)]


def several_passes(make: Callable[..., Tied]) -> Any:
    """Passes through one graph, for some of the parameters, and after one that failed."""
    module = make()
    loss = module(tokens())
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    twice = {path: None if g is None else g.clone() for path, g in gradients(module).items()}
    loss.backward(inputs=[module.up.weight, module.norm.weight])
    some = gradients(module)
    module.zero_grad()

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError

    handle = module.table.weight.register_hook(fail)
    for parameter in module.parameters():
        if parameter is not module.table.weight:
            parameter.register_hook(lambda grad: grad)
    with pytest.raises(ArithmeticError):
        module(tokens()).backward()
    handle.remove()
    module.zero_grad()
    module(tokens()).backward()
    return [twice, some, gradients(module)]


def frozen_after_the_forward(make: Callable[..., Tied]) -> Any:
    """Parameters that need no gradient any more when the backward pass comes to them get none."""
    module = make()
    loss = module(tokens())
    frozen = [module.norm.weight, module.up.weight, module.down.bias, module.table.weight]
    for parameter in frozen:
        parameter.requires_grad_(requires_grad=False)
    loss.backward(retain_graph=True)
    some = gradients(module)
    for parameter in frozen[:3]:
        parameter.requires_grad_()
    module.zero_grad()
    loss.backward()
    return [some, gradients(module)]


def hooks_on_tensors(make: Callable[..., Tied]) -> Any:
    """Hooks that change gradients, from before and after the split; one is removed."""
    calls: list[str] = []
    handles = []

    def before(model: Tied) -> None:
        for path, parameter in model.named_parameters():

            def scale(grad: torch.Tensor, path: str = path) -> torch.Tensor:
                calls.append(path)
                return grad * (2 + len(path))

            handles.append(parameter.register_hook(scale))

    module = make(before)
    handles[1].remove()
    module.table.weight.register_hook(lambda grad: grad + 1)
    (grad,) = torch.autograd.grad(module(tokens()), module.up.weight)
    seen: list[Any] = []
    trained = [module.up.weight, module.down.bias, module.norm.weight, module.table.weight]
    torch.autograd.graph.register_multi_grad_hook(trained, seen.append)
    module.up.bias.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    for _ in range(2):
        module(tokens()).backward()
    counts = [len(each) if isinstance(each, (list, tuple)) else each for each in seen]
    return [gradients(module), whole(module, "up.weight", grad), sorted(calls), sorted(counts)]


def hooks_after_accumulation(make: Callable[..., Tied]) -> Any:
    """The optimizer steps in the backward pass and takes the gradient away."""
    stepped: list[str] = []
    optimizers: dict[Any, torch.optim.Optimizer] = {}

    def step(parameter: torch.Tensor) -> None:
        stepped.append(str(tuple(parameter.shape)))
        optimizers[parameter].step()
        parameter.grad = None

    def before(model: Tied) -> None:
        for parameter in list(model.parameters())[::2]:
            parameter.register_post_accumulate_grad_hook(step)

    module = make(before)
    for parameter in list(module.parameters())[1::2]:
        parameter.register_post_accumulate_grad_hook(step)
    for parameter in module.parameters():
        optimizers[parameter] = torch.optim.SGD([parameter], lr=0.1, momentum=0.5)
    losses = []
    for _ in range(3):
        loss = module(tokens())
        loss.backward()
        losses.append(loss.detach())
    assert all(parameter.grad is None for parameter in module.parameters())
    weights = [whole(module, path, p.detach()) for path, p in module.named_parameters()]
    return [losses, weights, sorted(stepped)]


def hooks_on_one_rank(make: Callable[..., Tied]) -> Any:
    """Hooks that only look, as loggers register them on the first rank alone."""
    module = make()
    if not dist.is_initialized() or dist.get_rank() == 0:
        for parameter in list(module.parameters())[1:4]:
            parameter.register_hook(lambda grad: None)
            parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    module(tokens()).backward()
    return [gradients(module)]


def copies_and_files(make: Callable[..., Tied]) -> Any:
    """A copy of a module that has gradients has none yet; a gradient can be saved and read."""
    module = make()
    module(tokens()).backward()
    twin = copy.deepcopy(module)
    assert all(parameter.grad is None for parameter in twin.parameters())
    twin(2 * tokens() % 24).backward()
    file = io.BytesIO()
    torch.save(module.norm.bias.grad, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    return [gradients(module), gradients(twin), whole(module, "norm.bias", saved)]


KINDS = {
    check.__name__: check
    for check in (
        asked_for,
        hessian_product,
        kept_graph,
        several_passes,
        frozen_after_the_forward,
        hooks_on_tensors,
        hooks_after_accumulation,
        hooks_on_one_rank,
        copies_and_files,
    )
}


def unsplit(kind: type[Tied], before: Callable[[Tied], None] = lambda _: None) -> Tied:
    model = plain(kind)
    before(model)
    return model


def split(kind: type[Tied], plan: Plan, before: Callable[[Tied], None] = lambda _: None) -> Tied:
    model = plain(kind)
    before(model)
    module = autoparallel.apply_plan(model, plan)
    assert isinstance(module, kind)
    return module


def plan_both(world_size: int) -> None:
    for kind in (Tied, Branching):
        planned(kind, Mesh(tp=world_size))


def on_a_mesh(rank: int, world_size: int, ways: tuple[str, ...]) -> dict[str, Any]:
    """All checks on a real group, of a traced model in some ways, and of one in parts."""
    torch.set_num_threads(1)
    traced = planned(Tied, Mesh(tp=world_size))
    plans = {
        "as planned": (Tied, traced),
        "ZeRO-1": (Tied, spread(traced, at_once=False)),
        "ZeRO-2": (Tied, spread(traced, at_once=True)),
        "parts": (Branching, planned(Branching, Mesh(tp=world_size))),
    }
    assert plans["parts"][1].breaks
    return {
        f"{way}, {name}": check(lambda *before, kind=kind, plan=plan: split(kind, plan, *before))
        for way, (kind, plan) in plans.items()
        if way in ways
        for name, check in KINDS.items()
    }


WAYS = ("as planned", "ZeRO-2", "parts")


@pytest.mark.parametrize(
    ("world_size", "ways"), [*broad((2, (*WAYS, "ZeRO-1"))), (3, WAYS)], ids=["2", "3"]
)
def test_every_way_on_processes(world_size: int, ways: tuple[str, ...]) -> None:
    expected = {
        (kind, name): check(lambda *before, kind=kind: unsplit(kind, *before))
        for kind in (Tied, Branching)
        for name, check in KINDS.items()
    }
    before = partial(plan_both, world_size)
    for results in run_processes(on_a_mesh, world_size, world_size, ways, before=before):
        for case, result in results.items():
            kind = Branching if case.startswith("parts") else Tied
            close(result, expected[kind, case.split(", ")[1]], case)


@pytest.mark.parametrize("name", KINDS)
def test_every_way_on_one_process(name: str) -> None:
    expected = KINDS[name](lambda *before: unsplit(Tied, *before))
    plan = planned(Tied, Mesh(tp=1))
    close(KINDS[name](lambda *before: split(Tied, plan, *before)), expected, name)


def close(actual: Any, expected: Any, case: str) -> None:
    """Compare nested results, in which None and words are equal to themselves."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            actual, expected, rtol=1e-9, atol=1e-12, msg=lambda m: f"{case}: {m}"
        )
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), case
        for key, value in expected.items():
            close(actual[key], value, f"{case} {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), case
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            close(one, other, f"{case} {index}")
    else:
        assert actual == expected, case


def test_a_hook_on_several_parameters_is_refused_before_the_split() -> None:
    model = plain(Tied)
    torch.autograd.graph.register_multi_grad_hook([model.up.weight, model.up.bias], print)
    with pytest.raises(AutoParallelError, match=r"hook on several(.|\n)*up\.(weight|bias)"):
        autoparallel.apply_plan(model, planned(Tied, Mesh(tp=1)))


def test_a_module_that_is_called_for_the_first_time_has_the_hooks() -> None:
    model = plain(Tied)
    model.up.bias.register_hook(lambda grad: grad * 3)
    expected = copy.deepcopy(model)
    expected.up.bias.register_hook(lambda grad: grad * 3)
    module = autoparallel.autoparallelize(model, 1)
    for each in (module, expected):
        each(tokens()).backward()
    torch.testing.assert_close(module.up.bias.grad, expected.up.bias.grad, rtol=1e-9, atol=0)


def test_gradients_pass_parameters_that_are_computed() -> None:
    """As where a step of an optimizer is differentiated, by torch.func.functional_call."""
    model = plain(Tied)
    module = split(Tied, planned(Tied, Mesh(tp=1)))
    results = []
    for each in (model, module):
        loss = each(tokens())
        named = {path: p for path, p in each.named_parameters() if path != "unused"}
        firsts = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        fast = {p: w - 0.1 * g for (p, w), g in zip(named.items(), firsts, strict=True)}
        inner = torch.func.functional_call(each, fast, (tokens(),))
        inner.backward()
        results.append([inner.detach(), {p: w.grad for p, w in each.named_parameters()}])
    close(results[1], results[0], "functional_call")
