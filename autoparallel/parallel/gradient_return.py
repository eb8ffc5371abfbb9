"""The way of a gradient from the local tensor that computes back to the user's parameter.

The local tensor is made of the parameter by an autograd function that keeps nothing for its
backward pass, so that one tensor serves all forward passes: torch frees what a graph has kept, and
here there is nothing. So the parameter is in the graph of every loss. `torch.autograd.grad` finds
it, hooks on it run, and a gradient that is to be differentiated in turn is.

Most backward passes want less: they add to `grad` of parameters without hooks. Then the gradient is
put there at once, past DTensor's own operators, which cost far more for many parameters.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoparallel.parallel.distributed_layouts import distributed_placements
from autoparallel.parallel.gradient_bucket import (
    GradientBucket,
    GradientLayouts,
    give,
    like_parameter,
    pass_over_waiting,
)
from autoparallel.parallel.optimizer_steps import watch_steps
from autoparallel.parallel.pieces import teach_torch
from autoparallel.parallel.split_tensor import mark
from autoparallel.placement import Layout
from autoparallel.runtime.joint_moves import reduced
from autoparallel.runtime.recorded_reduction import recorded_reduction
from autoparallel.support.torch_private import (
    backward_pass,
    gradient_hooks_of,
    is_returned,
    local_part,
    references_to,
    run_when_ready,
    will_accumulate,
    without_function_overrides,
)

__all__ = ["Counted", "GradientReturn", "as_distributed"]


def as_distributed(
    local: torch.Tensor, layout: Layout, shape: tuple[int, ...], mesh: DeviceMesh
) -> DTensor:
    """Return the DTensor of which this rank holds `local`, without copying or communicating.

    layout: how the whole is split over the mesh. shape: of the whole, which may not divide by the
    number of ranks.
    """
    teach_torch()
    watch_steps(mesh)
    # DTensor would take all parts for as large as this one; it must be told the whole.
    sizes = [size or 1 for size in shape]
    stride = tuple(prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
    split: DTensor = DTensor.from_local(
        local,
        mesh,
        distributed_placements(layout, mesh.shape),
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )
    mark(split)
    return split


class GradientReturn(GradientLayouts):
    """The way of a parameter's gradient through its layouts, and the bucket that it may wait in.

    The arguments are those of `GradientLayouts`, which the bucket numbers.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        produced: Layout,
        first: Layout,
        state: Layout,
        bucket: GradientBucket,
    ) -> None:
        super().__init__(shape, produced, first, state, bucket.ways)
        self.bucket = bucket
        bucket.ways += 1
        self.alone = _alone()

    @property
    def is_trivial(self) -> bool:
        """True if the gradient is finished as the backward pass leaves it."""
        return self.produced == self.state

    def local_of(self, parameter: Any, held: torch.Tensor) -> torch.Tensor:
        """Return a tensor in the memory of `held` that autograd takes for made of the parameter."""
        with torch.inference_mode(False), torch.enable_grad():
            if not parameter.requires_grad:
                return held.detach()
            if self.waits:
                self.bucket.late.add(id(parameter))
            local: torch.Tensor = _Local.apply(parameter, held, self)
        # Autograd runs first what was recorded last. A gradient whose way was recorded long ago
        # would be kept to the end of the backward pass. Gradients that come at once, of one op, go
        # on in an order that all ranks have in common, because some are reduced on the way.
        run_when_ready(local, 1 + self.number)
        return local

    def bring(
        self, ctx: Any, node: Any, parameter: Any, grad: torch.Tensor, alone: tuple[int, int]
    ) -> torch.Tensor | None:
        """Return the gradient of the parameter; None where it is put into `grad`, now or at the end
        of the backward pass.

        ctx: of the node, which the parameter is an operand of. node: of the parameter, where it is
        one of several operands, else None. alone: `references_to` a gradient there that nobody else
        holds. This is asked for every parameter in every backward pass, and takes as few steps as
        it can.
        """
        bucket, is_leaf = self.bucket, ctx.is_leaf
        if torch.is_grad_enabled():
            return self.differentiable(grad, parameter)
        if is_leaf and not parameter.requires_grad:
            # It was frozen after the forward pass, and gets none, as of autograd itself.
            self.pass_over(parameter)
            return None
        if self.first != self.produced:
            (grad,) = reduced([grad], [self.produced], [self.first], [self.shape], bucket.ranks)
        elif (not self.waits or bucket.holds) and references_to(grad) != alone:
            # It is the gradient of something else as well, as of the other term of a sum.
            grad = grad.clone()
        if (
            (not self.waits or (bucket.holds and self.sums))
            and not grad.is_sparse
            and not grad.is_contiguous()
        ):
            grad = _laid_out(grad, parameter)
        # A parameter that is no leaf, as torch.func.functional_call may put in place, has a way
        # of its own from there. A backward pass adds all gradients to `grad`, or, for
        # torch.autograd.grad, returns them all.
        if node is not None:
            # What a pass wants of one of them says nothing of the others.
            accumulates = will_accumulate(node)
            if not accumulates and not is_returned(node):
                return None
        else:
            number = backward_pass()
            if number != bucket.number and is_leaf:
                bucket.number = number
                bucket.accumulates = will_accumulate(ctx.next_functions[0][0])
            accumulates = bucket.accumulates
        if is_leaf and accumulates:
            on_tensor, after = gradient_hooks_of(parameter)
            # Hooks run once, when all gradients of the parameter are there. Those that may change
            # the gradient run together, as torch.autograd.graph.register_multi_grad_hook needs.
            late = after and id(parameter) in bucket.late
            if self.waits or on_tensor or late or (bucket.held and id(parameter) in bucket.held):
                self.pass_over(parameter)
                bucket.add(self, parameter, grad)
                return None
            if not after:
                give(parameter, grad)
                return None
        elif self.waits:
            (grad,) = reduced([grad], [self.first], [self.state], [self.shape], bucket.ranks)
        return mark(like_parameter(grad, parameter))

    def pass_over(self, parameter: Any) -> None:
        """Have the hooks of a parameter that gets no gradient from this node not run for that."""
        on_tensor, after = gradient_hooks_of(parameter)
        if on_tensor or after:
            pass_over_waiting(on_tensor, after, self.bucket)

    def differentiable(self, grad: torch.Tensor, parameter: Any) -> torch.Tensor:
        """Return the parameter's gradient, which depends on `grad` for autograd, too."""
        ranks = self.bucket.ranks
        grad = recorded_reduction(grad, self.produced, self.state, self.shape, ranks)
        if not isinstance(parameter, DTensor):
            return grad
        return as_distributed(grad, self.state, self.shape, parameter.device_mesh)


def _laid_out(grad: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return a finished local gradient in the strides of the parameter, as autograd has it.

    It may lie in less memory than it has elements, as that of a sum does, and cannot be added to.
    """
    held = local_part(parameter) if isinstance(parameter, DTensor) else parameter
    if grad.stride() == held.stride():
        return grad
    return torch.empty_like(held, dtype=grad.dtype).copy_(grad)


class _Local(torch.autograd.Function):
    """The local tensor that computes in place of a parameter; its gradient becomes the
    parameter's.
    """

    @staticmethod
    def forward(
        ctx: Any, parameter: torch.Tensor, held: torch.Tensor, way: GradientReturn
    ) -> torch.Tensor:
        """Return a tensor in the memory of `held`."""
        ctx.set_materialize_grads(False)
        ctx.parameter, ctx.is_leaf, ctx.way = parameter, parameter.is_leaf, way
        return held.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        """Return the parameter's gradient, or see to it that it comes."""
        with without_function_overrides():
            if grad is None:
                # The node that reads it belongs to other tensors as well.
                ctx.way.pass_over(ctx.parameter)
                return None, None, None
            return ctx.way.bring(ctx, None, ctx.parameter, grad, ctx.way.alone), None, None


class Counted:
    """In the place of a `GradientReturn`: it counts the references to a gradient that nobody else
    holds. each: of gradients that come together, as `references_to_each` counts them.
    """

    is_trivial = True

    def __init__(self) -> None:
        self.references = self.alone = (0, 0)
        self.each: list[tuple[int, int]] = []

    def pass_over(self, parameter: Any) -> None:
        """Leave hooks as they are."""

    def bring(
        self, ctx: Any, node: Any, parameter: Any, grad: torch.Tensor, alone: tuple[int, int]
    ) -> None:
        """Note the count, in the same place as `GradientReturn.bring` does."""
        self.references = references_to(grad)


@cache
def _alone() -> tuple[int, int]:
    """Return `references_to` a gradient in `GradientReturn.bring` that nobody else holds.

    Such a one becomes the parameter's as it is; others are copied, as autograd does. The engine
    holds it, too, in ways that differ between releases.
    """
    counted: Any = Counted()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros(2, device="cpu", requires_grad=True)
        torch.autograd.backward((_Local.apply(leaf, leaf.detach(), counted) * 2).sum())
    references: tuple[int, int] = counted.references
    return references
