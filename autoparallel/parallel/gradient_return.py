"""The way of a gradient from the local tensor that computes back to the user's parameter.

The local tensor is made of the parameter by an autograd function that keeps nothing for its
backward pass, so that one tensor serves all forward passes: torch frees what a graph has kept, and
here there is nothing. So the parameter is in the graph of every loss. `torch.autograd.grad` finds
it, hooks on it run, and a gradient that is to be differentiated in turn is.

Most backward passes want less: they add to `grad` of parameters without hooks. Then the gradient is
put there at once, past DTensor's own operators, which cost far more for many parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoparallel.parallel.distributed_layouts import distributed_placements
from autoparallel.parallel.optimizer_steps import watch_steps
from autoparallel.parallel.pending_gradients import add_pending, pending_layout, take_pending
from autoparallel.parallel.pieces import teach_torch
from autoparallel.parallel.split_tensor import GRADIENT, mark
from autoparallel.placement import Layout, Partial, Placement, Shard
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import Reduction, reduced
from autoparallel.support.torch_private import (
    at_end_of_backward,
    backward_pass,
    distributed_tensor_like,
    gradient_hooks_of,
    local_part,
    references_to,
    run_when_ready,
    will_accumulate,
    without_function_overrides,
)

__all__ = ["GradientBucket", "GradientReturn", "as_distributed", "local_together"]


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


class _Waiting:
    """The gradients that wait for the end of one backward pass, each with the parameter that it is
    for.

    It lives as long as the backward pass: one that fails takes what waited with it.
    """

    def __init__(self) -> None:
        # With the layout of each.
        self.items: list[tuple[GradientReturn, Any, torch.Tensor, Layout]] = []
        self.parameters: set[int] = set()
        # Bytes of the items that are to be reduced, as whole tensors; parameters whose gradients'
        # reduction has begun.
        self.nbytes = 0
        self.begun: list[tuple[list[tuple[GradientReturn, Any]], Reduction]] = []

    def begin(self, ranks: Ranks) -> None:
        """Begin the reduction of the items.

        Autograd finishes gradients of one op in any order; all ranks reduce them in the order in
        which their programs read the parameters.
        """
        items = sorted(self.items, key=lambda item: item[0].number)
        self.items, self.nbytes = [], 0
        reduction = Reduction(
            [grad for _, _, grad, _ in items],
            [layout for _, _, _, layout in items],
            [way.state for way, _, _, _ in items],
            [way.shape for way, _, _, _ in items],
            ranks,
        )
        self.begun.append(([(way, parameter) for way, parameter, _, _ in items], reduction))


class GradientBucket:
    """Gradients that are reduced together, while the backward pass goes on.

    ranks: the mesh over whose axes they are reduced. nbytes: a reduction begins when gradients of
    so many bytes wait; None for one reduction when the backward pass ends. One collective for many
    gradients costs the latency once. All programs of a model share one bucket, because they may
    share parameters. Gradients become ready in the same order on all ranks, because their programs
    are the same.
    """

    def __init__(self, ranks: Ranks, nbytes: int | None = None) -> None:
        self.ranks, self.nbytes = ranks, nbytes
        # By the number of the backward pass: one may run inside of another.
        self.passes: weakref.WeakValueDictionary[int, _Waiting] = weakref.WeakValueDictionary()
        self.ways = 0
        # The ids of parameters of which some gradient has to wait.
        self.late: set[int] = set()
        # Whether sums over the ranks are put off, and the parameters of which some are, by id.
        self.holds, self.held = False, dict[int, tuple[GradientReturn, Any]]()
        # The backward pass that was last seen, and whether it adds to the `grad` of parameters.
        self.number, self.accumulates = -1, False

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the gradients that wait now, which belong to a backward pass."""
        empty: dict[str, Any] = {"passes": weakref.WeakValueDictionary(), "late": set()}
        return {**vars(self), **empty, "held": list(self.held.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, in which parameters may be copies, with other ids."""
        vars(self).update(state, held={id(item[1]): item for item in state["held"]})

    def add(self, way: GradientReturn, parameter: Any, grad: torch.Tensor) -> None:
        """Keep a local gradient until the end of the backward pass that runs now."""
        number = backward_pass()
        waiting = self.passes.get(number)
        if waiting is None:
            waiting = self.passes[number] = _Waiting()
            at_end_of_backward(partial(self.finish, waiting))
        waiting.parameters.add(id(parameter))
        if self.holds:
            if way.sums and isinstance(parameter, DTensor) and not grad.is_sparse:
                self._hold(way, parameter, grad, way.first)
                return
        elif id(parameter) in self.held and pending_layout(parameter, way.state) == way.first:
            del self.held[id(parameter)]
            grad = take_pending(parameter) + grad
        waiting.items.append((way, parameter, grad, way.first))
        if not way.waits:
            # Its hooks alone have it wait, which the other ranks may not have.
            return
        # Whole tensors are counted: the number is the same on all ranks, also where parts differ.
        waiting.nbytes += prod(way.shape) * grad.element_size()
        if self.nbytes is not None and waiting.nbytes >= self.nbytes:
            waiting.begin(self.ranks)

    def _hold(self, way: GradientReturn, parameter: Any, grad: torch.Tensor, have: Layout) -> None:
        """Add a gradient, in a layout, to those of which the sum over the ranks is put off."""
        self.held[id(parameter)] = (way, parameter)
        add_pending(parameter, grad, have, way.state, self.ranks.coordinates)

    def has(self, parameter: Any) -> bool:
        """Return whether a gradient of the parameter waits in the backward pass that runs now."""
        waiting = self.passes.get(backward_pass())
        return waiting is not None and id(parameter) in waiting.parameters

    def finish(self, waiting: _Waiting) -> None:
        """Reduce all gradients that wait, and hand each to its parameter."""
        with without_function_overrides():
            self._finish(waiting)

    def _finish(self, waiting: _Waiting) -> None:
        if self.held and not self.holds:
            # Of parameters that this backward pass has not reached, or has along other axes.
            for way, parameter in self.held.values():
                layout = pending_layout(parameter, way.state)
                if layout is not None:  # else the user has cleared it
                    waiting.items.append((way, parameter, take_pending(parameter), layout))
            self.held = {}
        if waiting.items:
            waiting.begin(self.ranks)
        begun, waiting.begun = waiting.begun, []
        totals: dict[int, tuple[GradientReturn, Any, torch.Tensor]] = {}
        for parameters, reduction in begun:
            for (way, parameter), grad in zip(parameters, reduction.finish(), strict=True):
                if id(parameter) in totals:
                    grad = totals[id(parameter)][2] + grad
                totals[id(parameter)] = (way, parameter, grad)
        hooked = []
        for way, parameter, grad in totals.values():
            if id(parameter) in self.held:
                self._hold(way, parameter, grad, way.state)
            elif any(gradient_hooks_of(parameter)):
                hooked.append((parameter, grad))
            else:
                give(parameter, grad)
        if hooked:
            # Torch itself runs the hooks, in a backward pass that begins at the parameters.
            torch.autograd.backward(
                [parameter for parameter, _ in hooked],
                [mark(_like(grad, parameter)) for parameter, grad in hooked],
            )


def _like(grad: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return a finished local gradient as the parameter's: a DTensor where that is one.

    It is no split tensor until the user reads it: see `SplitTensor`.
    """
    return distributed_tensor_like(grad, parameter) if isinstance(parameter, DTensor) else grad


def give(parameter: Any, grad: torch.Tensor) -> None:
    """Add a finished local gradient, in the layout of the state, to the parameter's `grad`."""
    # Autograd's own way: the first gradient is taken as it is, further ones are added in place.
    held = GRADIENT.__get__(parameter)
    if held is None:
        GRADIENT.__set__(parameter, _like(grad, parameter))
    else:
        (local_part(held) if isinstance(held, DTensor) else held).add_(grad)


class _OfGradients:
    """A hook on a gradient that does not run where there is none.

    Torch runs hooks also where a gradient would come that waits in the bucket instead.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, grad: torch.Tensor | None) -> Any:
        return None if grad is None else self.hook(grad)


class _OfFinished:
    """A hook on a parameter whose gradient was added, which does not run while that waits."""

    def __init__(self, hook: Any, bucket: GradientBucket) -> None:
        self.hook, self.bucket = hook, bucket

    def __call__(self, parameter: torch.Tensor) -> None:
        if not self.bucket.has(parameter):
            self.hook(parameter)


def _wrap(hooks: dict[int, Any] | None, kind: Any) -> None:
    """Have all hooks of a dictionary run as those of a kind do, each under the key that it has."""
    for key, hook in list((hooks or {}).items()):
        if not isinstance(hook, (_OfGradients, _OfFinished)):
            assert hooks is not None
            hooks[key] = kind(hook)


class GradientReturn:
    """The layouts that a parameter's gradient passes through, and the bucket that it may wait in.

    shape: of the unsharded parameter. produced: the layout of the gradient as the backward pass
    leaves it. first: the layout to which it is reduced at once. state: that of the finished one.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        produced: Layout,
        first: Layout,
        state: Layout,
        bucket: GradientBucket,
    ) -> None:
        self.shape, self.produced, self.first, self.state = shape, produced, first, state
        self.waits = first != state
        # Its sum over the ranks takes no less memory than what is summed: it may as well be taken
        # once for several backward passes. What a rank keeps but a part of is reduced at once.
        self.sums = self.waits and not any(
            have != want and isinstance(want, Shard)
            for have, want in zip(first, state, strict=True)
        )
        self.bucket, self.number = bucket, bucket.ways
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
        self, ctx: Any, place: int, parameter: Any, grad: torch.Tensor, alone: tuple[int, int]
    ) -> torch.Tensor | None:
        """Return the gradient of the parameter; None where it is put into `grad`, now or at the end
        of the backward pass.

        ctx: of the node, which the parameter is an operand of. place: among its operands. alone:
        `references_to` a gradient there that nobody else holds. This is asked for every parameter
        in every backward pass, and takes as few steps as it can.
        """
        bucket, is_leaf = self.bucket, ctx.is_leaf
        if torch.is_grad_enabled():
            return self.differentiable(grad, parameter)
        if is_leaf and not parameter.requires_grad:
            # It was frozen after the forward pass, and gets none, as of autograd itself.
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
        number = backward_pass()
        # A parameter that is no leaf, as torch.func.functional_call may put in place, has a way
        # of its own from there. A backward pass adds all gradients to `grad`, or, for
        # torch.autograd.grad, returns them all.
        if ctx.is_together:
            # What a pass wants of one of them says nothing of the others.
            accumulates = will_accumulate(ctx.next_functions[place][0])
        else:
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
                if on_tensor or after:
                    _wrap(on_tensor, _OfGradients)
                    _wrap(after, partial(_OfFinished, bucket=bucket))
                bucket.add(self, parameter, grad)
                return None
            if not after:
                give(parameter, grad)
                return None
        elif self.waits:
            (grad,) = reduced([grad], [self.first], [self.state], [self.shape], bucket.ranks)
        return mark(_like(grad, parameter))

    def differentiable(self, grad: torch.Tensor, parameter: Any) -> torch.Tensor:
        """Return the parameter's gradient, which depends on `grad` for autograd, too."""
        groups = self.bucket.ranks.groups
        steps: list[tuple[int, Placement]] = []
        # The order of `reduced`: first what becomes a part, from the outermost axis inwards.
        for axis, (have, want) in enumerate(zip(self.produced, self.state, strict=True)):
            if have != want and isinstance(want, Shard):
                steps.append((axis, want))
        for axis, (have, want) in enumerate(zip(self.produced, self.state, strict=True)):
            if isinstance(have, Partial) and not isinstance(want, (Partial, Shard)):
                steps.append((axis, want))
        for axis, want in steps:
            grad = convert(grad, groups[axis], self.produced[axis], want)
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
        ctx.is_together = False
        return held.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        """Return the parameter's gradient, or see to it that it comes."""
        if grad is None:
            return None, None, None
        with without_function_overrides():
            return ctx.way.bring(ctx, 0, ctx.parameter, grad, ctx.way.alone), None, None


class _LocalTogether(torch.autograd.Function):
    """The local tensors of several parameters, as of `_Local`, by one node.

    A node takes longer than all that is to be done for one gradient of a small parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ways: Sequence[Any],
        alone: tuple[int, int],
        held: Sequence[torch.Tensor],
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return tensors in the memory of `held`."""
        ctx.set_materialize_grads(False)
        ctx.parameters, ctx.ways, ctx.alone = parameters, ways, alone
        ctx.is_leaf = ctx.is_together = True
        return tuple([tensor.detach() for tensor in held])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """Return the parameters' gradients, or see to it that they come."""
        brought: list[Any] = [None, None, None]
        with without_function_overrides():
            for place, grad in enumerate(grads):
                brought.append(
                    None
                    if grad is None
                    else ctx.ways[place].bring(ctx, place, ctx.parameters[place], grad, ctx.alone)
                )
        return tuple(brought)


# Parameters of at most so many bytes on a rank come together, in groups of at most so many: their
# gradients wait for each other, and must not add to the memory of a step.
_SMALL_NBYTES, _TOGETHER_NBYTES = 2**16, 2**20


def local_together(
    ways: Sequence[GradientReturn | None], parameters: Sequence[Any], held: Sequence[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Return the local tensors of small parameters that one node makes for several, by place.

    ways: of all parameters, None for those that are to stay by themselves, as all do whose
    gradients the ranks exchange.
    """
    groups: list[list[int]] = [[]]
    nbytes = 0
    for place, way in enumerate(ways):
        small = way is not None and held[place].nbytes <= _SMALL_NBYTES and way.is_trivial
        if not small or not (parameters[place].requires_grad and parameters[place].is_leaf):
            continue
        nbytes += held[place].nbytes
        if nbytes > _TOGETHER_NBYTES:
            groups.append([])
            nbytes = held[place].nbytes
        groups[-1].append(place)
    made: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for places in groups:
            if len(places) < 2:
                continue
            locals_ = _LocalTogether.apply(
                [ways[place] for place in places],
                _alone_together(),
                [held[place] for place in places],
                *(parameters[place] for place in places),
            )
            run_when_ready(locals_[0])
            made.update(zip(places, locals_, strict=True))
    return made


class _Counted:
    """In the place of a `GradientReturn`: it counts the references to a gradient that nobody else
    holds.
    """

    def __init__(self) -> None:
        self.references = self.alone = (0, 0)

    def bring(
        self, ctx: Any, place: int, parameter: Any, grad: torch.Tensor, alone: tuple[int, int]
    ) -> None:
        """Note the count, in the same place as `GradientReturn.bring` does."""
        self.references = references_to(grad)


@cache
def _alone() -> tuple[int, int]:
    """Return `references_to` a gradient in `GradientReturn.bring` that nobody else holds.

    Such a one becomes the parameter's as it is; others are copied, as autograd does. The engine
    holds it, too, in ways that differ between releases.
    """
    counted: Any = _Counted()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros(2, device="cpu", requires_grad=True)
        torch.autograd.backward((_Local.apply(leaf, leaf.detach(), counted) * 2).sum())
    references: tuple[int, int] = counted.references
    return references


@cache
def _alone_together() -> tuple[int, int]:
    """Return what `_alone` does, of a gradient that comes with others."""
    counted = _Counted()
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [torch.zeros(2, device="cpu", requires_grad=True) for _ in range(2)]
        held = [leaf.detach() for leaf in leaves]
        one, other = _LocalTogether.apply([counted] * 2, (0, 0), held, *leaves)
        torch.autograd.backward((one * 2).sum() + (other * 2).sum())
    return counted.references
