"""Ops that were once left whole: split in plans that nobody would choose, they are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from any_plans import any_plans, network_of
from broad_cases import broad, share_of
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.simulate import simulate_plan
from autoparallel.placement import Shard
from autoparallel.plan import Plan
from autoparallel.planning.solution_to_plan import plan_of_solution
from autoparallel.strategy.cost_network import CostNetwork
from planners import Solution, exact

MESHES = [Mesh(tp=2), Mesh(tp=3), Mesh(x=2, y=2)]


class Between(nn.Module):
    """A function of a product, and a loss of all that it returns."""

    def __init__(self, function: Callable[..., Any], *weights: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.up = nn.Linear(6, 6)
        self.weights = nn.ParameterList(torch.randn(shape) * 0.5 for shape in weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = self.function(self.up(x), *self.weights)
        results = results if isinstance(results, (tuple, list)) else (results,)
        loss = x.sum() * 0
        for result in results:
            if result.is_floating_point():
                loss = loss + (result * (result * 0.5 + 0.3)).sum()
            else:
                loss = loss + (self.up.bias * result.sum()).sum()
        return loss


def matrices(x: torch.Tensor) -> torch.Tensor:
    """Return matrices that have an inverse, one for each of the batch."""
    return x @ x.mT + 3 * torch.eye(x.shape[-2], dtype=x.dtype)


def spoken() -> tuple[torch.Tensor, ...]:
    """Return labels of 4 sequences of 6 steps, and the lengths of both."""
    return (torch.tensor([[1, 2], [3, 3], [5, 0], [2, 1]]), torch.tensor([6, 5, 6, 6]),
            torch.tensor([2, 2, 1, 2]))  # fmt: skip


# By name: a function of a tensor of (4, 6, 6), shapes of its weights, and the op that is split.
CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], str]] = {
    "max": (lambda x: (x.max(), x.amin((0, 2))), (), "aten.max.default"),
    "prod": (lambda x: ((x * 0.1 + 1).prod(), x.prod(1)), (), "aten.prod.default"),
    "any": (lambda x: ((x > 2).any(), (x > -3).all(), (x > 0.5).any(1)), (), "aten.any.default"),
    "norm": (lambda x: (x.norm(), x.norm(1, (0, 1))), (), "aten.linalg_vector_norm.default"),
    "var": (lambda x: (x.var(), *torch.var_mean(x, (0, 2)), x.std(1)), (), "aten.std.dim"),
    "inverse": (lambda x: torch.linalg.inv(matrices(x)), (), "aten.linalg_inv_ex.default"),
    "solve": (
        lambda x, b: torch.linalg.solve(matrices(x), b),
        ((4, 6, 5),),
        "aten._linalg_solve_ex.default",
    ),
    "factors": (
        lambda x: torch.linalg.lu_factor(matrices(x))[0],
        (),
        "aten.linalg_lu_factor_ex.default",
    ),
    "instance": (
        lambda x, w: functional.instance_norm(x, weight=w),
        ((6,),),
        "aten.instance_norm.default",
    ),
    "group": (
        lambda x, w, b: functional.group_norm(x, 1, w, b, eps=1e-3),
        ((6,), (6,)),
        "aten.group_norm.default",
    ),
    "correlation": (lambda x: torch.corrcoef(x.flatten(1)), (), "aten.matmul.default"),
    "spoken": (
        lambda x: functional.ctc_loss(x.transpose(0, 1).log_softmax(-1), *spoken(), blank=0),
        (),
        "autoparallel.ctc_loss.default",
    ),
    "transposed": (
        lambda x, w, b: functional.conv_transpose1d(x, w, b),
        ((6, 4, 2), (4,)),
        "aten.conv_transpose1d.default",
    ),
    "grouped": (
        lambda x, w, b: functional.conv1d(x, w, b, groups=2),
        ((8, 3, 2), (8,)),
        "aten.conv1d.default",
    ),
}


def expected(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the loss and all gradients of the unsplit model."""
    model.zero_grad()
    loss = model(x)
    loss.backward()
    grads = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def split_plans(captured: Any, network: CostNetwork, target: str) -> Iterator[Plan]:
    """Yield the cheapest plans in which the call of `target` has its first and its last split."""
    (node, *_) = (node for node in captured.graph.calls if node.target == target)
    splits = [
        state
        for state, strategy in enumerate(network.strategies[node.name])
        if any(isinstance(p, Shard) for layout in strategy.operands for p in layout)
    ]
    problem = network.problem(1.0, {}, None)
    for state in dict.fromkeys((splits[0], splits[-1])):
        pinned = problem.weighed(0.0).pinned({node.name: state})
        solution = Solution.of(problem, exact.solve(pinned).assignment, "pinned", multiplier=0.0)
        yield plan_of_solution(captured, "pinned", network.mesh, network, solution, 1.0)


def require_right(model: nn.Module, plan: Plan, x: torch.Tensor) -> None:
    """Require the loss and the gradients of the unsplit model, alike on all ranks."""
    result = simulate_plan(model, plan, (x,), {})
    actual = {"loss": result.output.detach(), **result.gradients}
    assert result.apart <= 1e-9
    for key, value in expected(model, x).items():
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", share_of(CASES, 3))
def test_any_plan_is_right(name: str) -> None:
    """On 2 and 3 ranks and on 2 by 2, drawn at random, and with the op split."""
    function, shapes, target = CASES[name]
    model = Between(function, *shapes).double()
    torch.manual_seed(1)
    x = torch.randn(4, 6, 6, dtype=torch.float64)
    captured = None
    for mesh in MESHES:
        captured, network = network_of(model, (x,), mesh, captured)
        for plan, _ in any_plans(captured, network, range(2)):
            require_right(model, plan, x)
        for plan in split_plans(captured, network, target):
            require_right(model, plan, x)


class OneHead(nn.Module):
    """Attention over the pixels of an image, as in the middle of an autoencoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Conv2d(2, channels, 3, padding=1)
        self.qkv = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.into(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(rows).unsqueeze(1) for layer in self.qkv)
        return functional.scaled_dot_product_attention(q, k, v).square().mean()


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_attention_with_one_head_is_split_along_queries(world_size: int) -> None:
    """Not every rank computes all of it, though no weight says how to split it."""
    attention = "aten.scaled_dot_product_attention.default"
    with torch.device("meta"):
        large = OneHead(256).float()
    image = torch.empty(1, 2, 64, 64, device="meta")
    plan = autoparallel.make_plan(large, world_size, example_inputs=(image,))
    (op,) = (op for op in plan.ops if op.target == attention)
    assert op.results[0] == (Shard(2),)
    model = OneHead(6).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    captured, network = network_of(model, (x,), Mesh(tp=world_size), data_parallel=False)
    layouts = []
    for split in split_plans(captured, network, attention):
        layouts += [op.results[0] for op in split.ops if op.target == attention]
        require_right(model, split, x)
    assert (Shard(2),) in layouts
