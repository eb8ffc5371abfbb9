"""Parameters, gradients and outputs of a split model answer as the whole tensors do.

Each habit runs with the unsplit model and, on a real group, with the split one. Values, every
parameter and every gradient must be equal in float64.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.parallel.split_tensor import SplitTensor, cut_like


class Scores(nn.Module):
    """A look-up and two products, of sizes that 2 and 3 divide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.table(words))))


def plain(seed: int = 3) -> Scores:
    torch.manual_seed(seed)
    return Scores().double()


def words(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 12, (6, 4), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, seed: int = 0) -> torch.Tensor:
    return model(words(seed)).square().mean()


def trained(model: Any) -> torch.Tensor:
    loss = loss_of(model)
    loss.backward()
    return loss


def refusal(call: Callable[[], Any]) -> str:
    """Return the first words of the error that a call raises."""
    try:
        call()
    except (RuntimeError, AutoParallelError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:60]
    return "nothing is raised"


# Habits that write to parameters.


def copies_whole(model: Any) -> Any:
    with torch.no_grad():
        model.up.weight.copy_(plain(5).up.weight)
        model.down.weight.data.copy_(plain(5).down.weight)
        model.up.bias.lerp_(plain(5).up.bias, 0.25)
    return trained(model)


def draws(model: Any) -> Any:
    torch.manual_seed(11)
    for weight in (model.up.weight, model.down.weight, model.table.weight):
        nn.init.xavier_uniform_(weight)
    nn.init.normal_(model.up.bias)
    with torch.no_grad():
        model.down.bias.uniform_(-1, 1)
        model.down.weight.add_(torch.randn_like(model.down.weight), alpha=0.1)
        model.up.weight.mul_(functional.dropout(torch.ones_like(model.up.weight), 0.5))
    return trained(model)


def writes_places(model: Any) -> Any:
    with torch.no_grad():
        model.table.weight[3] = 0
        model.up.weight.data[:, 2] = 1.5
        model.down.weight[torch.tensor([0, 5])] = torch.ones(12, dtype=torch.float64)
        model.down.weight.masked_fill_(torch.ones(6, 12).tril(-2).bool(), 0.25)
    return trained(model)


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def writes_to_views(model: Any) -> Any:
    """Views across the parts, of one dim or the other, written to by all kinds of functions."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in (model.up.weight, model.down.weight, model.table.weight):
            rows, columns = weight.shape
            nn.init.orthogonal_(weight)
            weight[1 : rows - 1].copy_(numbers(rows - 2, columns))
            weight[:, 1 : columns - 1].mul_(numbers(columns - 2))
            weight.data[:, 2].normal_()
            weight[2].zero_()
            weight.chunk(2)[1].add_(1)
            weight.chunk(2, dim=1)[0].add_(numbers(rows, columns // 2))
            weight.t()[1:3].neg_()
            weight.view(-1)[7:40].data.clamp_(-0.5, 0.5)
            weight.diagonal().fill_(3)
            weight.fill_diagonal_(2)
            weight.detach()[: rows // 2 + 1].sub_(1)
            weight.view_as(numbers(rows, columns)).add_(numbers(rows, columns))
            weight[torch.tensor([0, 2])].zero_()  # a copy, for torch too
            weight.t().reshape(-1)[3:9].zero_()  # and another
    return trained(model)


def writes_out(model: Any) -> Any:
    nn.init.eye_(model.up.weight)
    with torch.no_grad():
        torch.add(model.down.weight, numbers(6, 12), out=model.down.weight)
        model.up.bias[1:7] += 2
    return trained(model)


def keeps_views(model: Any) -> Any:
    """Views follow what is written to the tensor, in whatever way that is."""
    weight = model.up.weight
    with torch.no_grad():
        views = [weight[4:9], weight[:, 1:5], weight.data.view(-1)[5:50], weight[5:8][:, 1:3]]
        weight.mul_(2)
        weight[3:6] = 4
        sums = [view.sum() for view in views]
        views[0].zero_()
        sums += [view.clone() for view in views]
        model.up.weight.data.add_(numbers(12, 6))
        sums += [view.square().sum() for view in views]
    trained(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        return sums, [view.sum() for view in views]


def merges_with_gradients_on(model: Any) -> Any:
    """LoRA's merge, which autograd records where nobody asked it not to."""
    factor = nn.Parameter(numbers(12, 1))
    model.up.weight.data += factor @ numbers(1, 6)
    model.down.weight.data[:, 2:5].add_(factor[:3, 0])
    return trained(model)


def writes_to_a_leaf(model: Any) -> Any:
    return refusal(lambda: model.up.weight.mul_(torch.ones(12, 6))), trained(model)


def writes_gradients(model: Any) -> Any:
    trained(model)
    torch.manual_seed(4)
    model.up.weight.grad.add_(torch.randn_like(model.up.weight.grad))
    model.up.bias.grad.copy_(torch.arange(12.0))
    model.down.weight.grad = torch.arange(72.0, dtype=torch.float64).view(6, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    return loss_of(model)


# Habits that read them.


def penalizes(model: Any) -> Any:
    penalty = sum(p.square().sum() for p in model.parameters())
    loss = loss_of(model) + 0.1 * penalty + model.up.weight.abs().max()
    loss.backward()
    return loss


def computes_with_weights(model: Any) -> Any:
    x = torch.arange(24.0, dtype=torch.float64).view(4, 6).requires_grad_()
    y = functional.linear(x, model.up.weight, model.up.bias) @ model.down.weight.T
    (y.tanh().sum() + loss_of(model)).backward()
    return y, x.grad, (model.table.weight * torch.ones(12, 1)).sum()


def reads_numbers(model: Any) -> Any:
    trained(model)
    gradient = model.up.weight.grad
    with torch.no_grad():
        weight = model.down.weight
        return [
            gradient.norm().item(),
            float(gradient.sum()),
            float(weight.mean()),
            f"{gradient.norm():.6f}",
            weight.tolist(),
            torch.from_numpy(weight.numpy().copy()),
            torch.equal(weight, plain().down.weight),
            bool(weight.sum() > 0),
            [p.norm().item() for p in model.parameters()],
            weight.argmax().item(),
        ]


def differentiates_twice(model: Any) -> Any:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(model), parameters, create_graph=True)
    loss = loss_of(model, 1) + sum((g * torch.ones(g.shape)).square().sum() for g in gradients)
    weight = model.up.weight
    (first,) = torch.autograd.grad((weight * torch.ones(6)).pow(3).sum(), weight, create_graph=True)
    (loss + first.square().sum()).backward()
    return loss


def gives_gradients(model: Any) -> Any:
    """Whole gradients of split results: products with a Hessian, and backward passes."""
    weights = [model.up.weight, model.down.weight]
    gradients = torch.autograd.grad(loss_of(model), weights, create_graph=True)
    vectors = [numbers(*weight.shape) for weight in weights]
    products = torch.autograd.grad(gradients, weights, vectors, retain_graph=True)
    gradients[0].backward(vectors[0], retain_graph=True)
    torch.autograd.backward(gradients[1], grad_tensors=vectors[1])
    return products


def masks_gradients(model: Any) -> Any:
    """Hooks compute with whole tensors, and return whole ones."""
    seen = []
    for path, parameter in model.named_parameters():
        mask = numbers(*parameter.shape) > 0
        if "up" in path:
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
        else:
            parameter.register_hook(lambda gradient, mask=mask: whole(gradient) * mask)
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, mask=mask: seen.append((parameter.grad * mask).sum().item())
        )
    trained(model)
    return sorted(seen), torch.autograd.grad(loss_of(model), model.up.weight)


def centers_gradients(model: Any) -> Any:
    """DTensor leaves the mean over a split dim a sum that is pending, and what is added to it."""

    def centered(gradient: Any) -> Any:
        return gradient - gradient.mean(-1, keepdim=True)

    handles = [parameter.register_hook(centered) for parameter in model.parameters()]
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for seed in range(3):
        losses.append(loss_of(model, seed))
        losses[-1].backward()
        for handle in handles:
            handle.remove()
        if seed == 1:
            for parameter in parameters:
                parameter.grad = centered(parameter.grad)
            loss_of(model, 4).backward()  # which adds to it
        if seed == 2:
            for parameter in parameters:
                parameter.grad.sub_(parameter.grad.mean(-1, keepdim=True))
        losses.append(torch.nn.utils.clip_grad_norm_(parameters, 0.1))
        optimizer.step()
        if seed < 2:
            optimizer.zero_grad()
    (weight,) = torch.autograd.grad(loss_of(model), parameters[1], create_graph=True)
    centered(weight).square().sum().backward()
    return losses


def finds_the_node_of_a_gradient(model: Any) -> Any:
    weight = model.up.weight
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    return type(node).__name__, trained(model)


# Optimizers, copies and files.


def loads_an_optimizer(model: Any) -> Any:
    other = plain()
    before = torch.optim.AdamW(other.parameters(), lr=0.05)
    trained(other)
    before.step()
    model.load_state_dict(other.state_dict(), assign=True)
    losses = []
    for foreach in (True, False):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=foreach)
        optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
        optimizer.zero_grad()
        losses.append(trained(model))
        optimizer.step()
    return losses


def is_too_late(model: Any) -> Any:
    """The backward pass of a loss from before a step, or a write by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained(model)
    loss = loss_of(model)
    optimizer.step()
    first = refusal(loss.backward)
    model.zero_grad()
    loss = loss_of(model)
    with torch.no_grad():
        model.down.weight.mul_(2)
    second = refusal(loss.backward)
    model.zero_grad()  # some gradients may have come before the error
    return first, second


def copies_and_files(model: Any) -> Any:
    trained(model)
    weight = copy.deepcopy(model.up.weight)
    with torch.no_grad():
        weight.add_(1)
    stream = io.BytesIO()
    torch.save(model.up.state_dict(), stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    return weight, type(weight) is type(model.up.weight), loaded["weight"]


def moves(model: Any) -> Any:
    """The host has other names: libraries that place a model give its device a number."""
    weight = model.up.weight.to("cpu:0") * 2
    model.to(torch.device("cpu", 0)).to(device="cpu:0", dtype=torch.float32).to(
        "cpu:0", torch.double
    )
    return weight.sum(), trained(model)


def calls_functionally(model: Any) -> Any:
    values = {n: (p.detach() * 1.5).requires_grad_() for n, p in plain().named_parameters()}
    for _ in range(2):
        loss = torch.func.functional_call(model, values, (words(),)).square().mean()
        loss.backward()
    return [value.grad for value in values.values()], loss, trained(model)


HABITS = {
    function.__name__: function
    for function in (
        copies_whole,
        draws,
        writes_places,
        writes_to_views,
        writes_out,
        keeps_views,
        merges_with_gradients_on,
        gives_gradients,
        masks_gradients,
        centers_gradients,
        writes_to_a_leaf,
        writes_gradients,
        penalizes,
        computes_with_weights,
        reads_numbers,
        differentiates_twice,
        finds_the_node_of_a_gradient,
        loads_an_optimizer,
        is_too_late,
        copies_and_files,
        moves,
        calls_functionally,
    )
}


def whole(value: Any) -> Any:
    """Return results with whole tensors in place of DTensors, and numbers as tensors."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor()
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return [whole(item) for item in value]
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value


def outcome(habit: Callable[[Any], Any], model: nn.Module) -> Any:
    result = whole(habit(model))
    named = dict(model.named_parameters())
    gradients = {path: whole(p.grad) for path, p in named.items() if p.grad is not None}
    return result, {path: whole(p) for path, p in named.items()}, gradients


def on_a_group(rank: int, world_size: int) -> dict[str, Any]:
    """All habits with split models of one plan, and what is refused of one."""
    plan = autoparallel.make_plan(plain(), world_size, example_inputs=(words(),))
    results = {}
    for name, habit in HABITS.items():
        try:
            results[name] = outcome(habit, autoparallel.apply_plan(plain(), plan))
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    model = autoparallel.apply_plan(plain(), plan)
    split = next(p for p in model.parameters() if not p.placements[0].is_replicate())
    results["split"] = type(split) is SplitTensor
    results["leaf"] = refusal(lambda: model.up.weight.mul_(torch.ones(12, 6)))
    with torch.no_grad():
        sums = torch.zeros_like(split)
    # What is added to them is recorded, which a part of them would not remember.
    results["recorded"] = refusal(lambda: sums.add_(split * torch.ones(split.shape)))
    results["collective"] = refusal(lambda: torch.distributed.all_reduce(split.detach()))
    results["memory"] = refusal(split.data_ptr)
    with pytest.raises(ValueError, match="read-only"):
        split.detach().numpy()[0, 0] = 1
    gathered = cut_like(split.detach().full_tensor(), split)
    results["cut"] = torch.equal(gathered.to_local(), split.detach().to_local())
    return results


def alike(actual: Any, expected: Any) -> None:
    """Require equal results: tensors to rounding, texts as they are."""
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            alike(one, other)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        alike(list(actual.values()), list(expected.values()))
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    else:
        assert actual == expected


@cache
def split_results(world_size: int) -> dict[str, Any]:
    return run_processes(on_a_group, world_size, world_size)[0]


@pytest.mark.parametrize("world_size", [*broad(2), 3])
@pytest.mark.parametrize("name", HABITS)
def test_a_habit_gives_what_it_gives_unsplit(name: str, world_size: int) -> None:
    actual = split_results(world_size)[name]
    assert not isinstance(actual, str), actual
    alike(actual, outcome(HABITS[name], plain()))


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_what_cannot_be_right_is_refused(world_size: int) -> None:
    results = split_results(world_size)
    assert results["split"]
    assert results["recorded"].startswith("AutoParallelError: add_ writes to a split tensor")
    assert results["collective"].startswith("AutoParallelError: allreduce of a split tensor")
    assert "asks for the memory of" in results["memory"]
    assert results["cut"]
