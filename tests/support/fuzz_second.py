"""Second derivatives of a split program: a penalty on all first gradients, differentiated again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.seeds import manual_seed
from autoparallel.placement import Invariant, Layout, Shard, local_layout_size
from autoparallel.plan import Plan
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.tensor_parts import join_layout

__all__ = ["Second", "split_second", "whole_second"]

Loss = Callable[[Any], torch.Tensor]
Tensors = tuple[torch.Tensor, ...]
# The penalty, and what comes of it: gradients of parameters by path, of inputs by position.
Second = tuple[torch.Tensor, dict[str, torch.Tensor]]


def whole_second(model: nn.Module, inputs: Tensors, loss_of: Loss) -> Second:
    """Return torch's own result. Raises RuntimeError for what torch cannot differentiate twice."""
    model = copy.deepcopy(model)
    named = {path: p for path, p in model.named_parameters() if p.requires_grad}
    wanted = [*named.values(), *(tensor for tensor in inputs if tensor.requires_grad)]
    penalty = _penalty(loss_of(model(*inputs)), wanted, lambda at, grad: grad)
    if penalty.requires_grad:
        penalty.backward()
    return penalty.detach(), _gradients({path: p.grad for path, p in named.items()}, inputs)


def split_second(model: nn.Module, plan: Plan, inputs: Tensors, loss_of: Loss) -> Second:
    """Return the result of all ranks of a plan. Raises AssertionError where they disagree."""
    paths = [path for path, p in model.named_parameters() if p.requires_grad]
    shapes = [tuple(model.get_parameter(path).shape) for path in paths]
    every = thread_ranks(plan.mesh)

    def work(ranks: Ranks) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[Layout]]:
        module = parallel_module(copy.deepcopy(model), plan, ranks, None, _refuse, 0)
        manual_seed(module, 0)
        named = dict(module.named_parameters())
        layouts = [state_of(module).layouts[path] for path in paths]
        local = tuple(t.detach().requires_grad_(t.requires_grad) for t in inputs)
        wanted = [*(named[path] for path in paths), *(t for t in local if t.requires_grad)]

        def whole(at: int, grad: torch.Tensor) -> torch.Tensor:
            return _whole(grad, layouts[at], shapes[at], ranks) if at < len(paths) else grad

        penalty = _penalty(loss_of(module(*local)), wanted, whole)
        if penalty.requires_grad:
            penalty.backward()
        found = {
            path: torch.zeros_like(named[path]) if named[path].grad is None else named[path].grad
            for path in paths
        }
        return penalty.detach(), _gradients(found, local), layouts

    results = run_ranks(every, work)
    penalty, gradients, layouts = results[0]
    for other, others, _ in results[1:]:
        torch.testing.assert_close(other, penalty, rtol=1e-9, atol=1e-9)
        assert others.keys() == gradients.keys(), (others.keys(), gradients.keys())
    for path, layout in zip(paths, layouts, strict=True):
        parts = [rank[1][path] for rank in results]
        gradients[path] = join_layout(parts, layout, every[0].sizes)
    return penalty, gradients


def _penalty(
    loss: torch.Tensor, wanted: Sequence[torch.Tensor], whole: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Return the loss and a bounded function of every element of its first gradients.

    whole: a function that puts together the gradient of the tensor at a place in `wanted`.
    """
    total = loss
    if not (wanted and loss.requires_grad):
        return total
    firsts = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    for at, first in enumerate(firsts):
        if first is not None:
            grad = whole(at, first)
            weights = torch.linspace(0.4, 1.3, grad.numel(), dtype=grad.dtype).view(grad.shape)
            total = total + (grad.sin() * weights).sum()
    return total


def _whole(
    part: torch.Tensor, layout: Layout, shape: tuple[int, ...], ranks: Ranks
) -> torch.Tensor:
    """Return the whole tensor of which every rank has a part, alike on all of them."""
    for axis in reversed(range(len(layout))):
        cut = layout[axis]
        if isinstance(cut, Shard):
            outer = (*layout[:axis], *(Invariant(),) * (len(layout) - axis))
            size = local_layout_size(shape[cut.dim], cut.dim, outer, ranks.sizes, ranks.coordinates)
            part = convert(part, ranks.groups[axis], cut, Invariant(), size)
    return part


def _gradients(
    found: dict[str, torch.Tensor | None], inputs: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    named = {path: grad for path, grad in found.items() if grad is not None}
    return named | {str(at): t.grad for at, t in enumerate(inputs) if t.grad is not None}


def _refuse(*_: Any) -> Plan:
    raise AssertionError("one call, of inputs that were planned for")
