"""Ops that were once left whole: split in plans that nobody would choose, they are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_plans import any_plans, network_of
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.simulate import simulate_plan
from autoparallel.placement import Partial, Shard
from autoparallel.plan import OpChoice
from autoparallel.planning.solution_to_plan import plan_of_solution
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


def is_split(op: OpChoice) -> bool:
    return any(
        isinstance(placement, (Shard, Partial))
        for layout in (*op.operands, *op.results)
        for placement in layout
    )


@pytest.mark.parametrize("name", CASES)
def test_any_plan_is_right(name: str) -> None:
    """Loss and gradients on 2 and 3 ranks and on 2 by 2; some plan splits the op."""
    function, shapes, target = CASES[name]
    model = Between(function, *shapes).double()
    torch.manual_seed(1)
    x = torch.randn(4, 6, 6, dtype=torch.float64)
    reference = expected(model, x)
    split: set[str] = set()
    for mesh in MESHES:
        captured, network = network_of(model, (x,), mesh)
        for plan, _ in any_plans(captured, network, range(3)):
            split |= {op.target for op in plan.ops if is_split(op)}
            result = simulate_plan(model, plan, (x,), {})
            actual = {"loss": result.output.detach(), **result.gradients}
            assert result.apart <= 1e-9
            for key, value in reference.items():
                torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-10, msg=key)
    assert target in split, sorted(split)


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


@pytest.mark.parametrize("world_size", [2, 3])
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
    reference = expected(model, x)
    captured, network = network_of(model, (x,), Mesh(tp=world_size), data_parallel=False)
    (node,) = (node for node in captured.graph.calls if node.target == attention)
    states = network.strategies[node.name]
    (along_queries,) = (at for at, s in enumerate(states) if s.results[0] == (Shard(2),))
    problem = network.problem(1.0, {}, None)
    pinned = problem.weighed(0.0).pinned({node.name: along_queries})
    solution = Solution.of(problem, exact.solve(pinned).assignment, "pinned", multiplier=0.0)
    split = plan_of_solution(captured, "pinned", network.mesh, network, solution, 1.0)
    result = simulate_plan(model, split, (x,), {})
    for key, value in {"loss": result.output.detach(), **result.gradients}.items():
        torch.testing.assert_close(value, reference[key], rtol=1e-9, atol=1e-10, msg=key)
