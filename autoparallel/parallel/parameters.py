"""Parameters of a parallel module: DTensors outside, plain local tensors inside.

The user and the optimizer see a DTensor; the program reads a local tensor that shares its memory.
How a gradient returns from one to the other is in `gradient_return`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.gradient_bucket import GradientBucket
from autoparallel.parallel.gradient_return import GradientReturn, as_distributed
from autoparallel.parallel.split_tensor import mark
from autoparallel.placement import Layout, Shard, whole_layout
from autoparallel.plan import ParameterChoice
from autoparallel.plan.kept_layouts import kept_layout
from autoparallel.runtime.joint_moves import gathered
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import require_refined
from autoparallel.support.torch_private import local_part

__all__ = [
    "GatheredCopy",
    "LocalParameter",
    "ParameterLayouts",
    "as_distributed",
    "computing_stream",
    "refresh",
    "whole_tensor",
]


@dataclass(frozen=True)
class ParameterLayouts:
    """The layouts of one parameter, and the shape of the unsharded tensor.

    storage: as programs read it. gradient: of the finished gradient. state: as the optimizer
    updates it, and the user sees it. On one mesh axis, (storage, gradient, state) are (I, I, S) for
    ZeRO-1, (I, S, S) for ZeRO-2 and (S, S, S) for ZeRO-3 (arXiv:1910.02054), where I is Invariant
    and S is Shard.
    """

    shape: tuple[int, ...]
    storage: Layout
    gradient: Layout
    state: Layout

    @staticmethod
    def of(
        choice: ParameterChoice | None, shape: tuple[int, ...], sizes: tuple[int, ...]
    ) -> ParameterLayouts:
        """Return the planned layouts, unsharded ones where choice is None.

        shape: of the unsharded tensor. sizes: of the mesh axes. Where the planned state has parts
        that no DTensor can describe, such as heads that do not divide by the ranks or blocks of
        unequal size, the user and the optimizer have equal parts of the same dim, and what computes
        is exchanged for these after every step.
        Raises PlanError where the planned state is no refinement of storage, so that one could not
        be gathered from the other.

        >>> ParameterLayouts.of(None, (4, 6), sizes=(2,)).storage
        (Invariant(),)
        """
        if choice is None:
            return ParameterLayouts(shape, *(whole_layout(len(sizes)),) * 3)
        require_refined(choice.storage, choice.state, choice.path)
        state = kept_layout(choice.state, shape, sizes)
        return ParameterLayouts(shape, choice.storage, choice.gradient, state)

    def reduced_first(self, produced: Layout) -> Layout:
        """Return the layout to which a gradient is reduced at once, when it is finished.

        produced: its layout as the backward pass leaves it. On an axis where the gradient is held
        in parts (ZeRO-2 and -3) it is reduce-scattered at once, to free its memory. What is left is
        done in a bucket at the end of the backward pass. Outer axes cut first: where an outer cut
        of a dim is left to the bucket, an inner cut of the same dim must wait for it.
        """
        first = list(produced)
        waiting: set[int] = set()
        for axis, (early, late) in enumerate(zip(self.gradient, self.state, strict=True)):
            if not isinstance(late, Shard) or produced[axis] == late:
                continue
            if early == late and late.dim not in waiting:
                first[axis] = late
            else:
                waiting.add(late.dim)
        return tuple(first)


def whole_tensor(tensor: torch.Tensor, layout: Layout, ranks: Ranks) -> torch.Tensor:
    """Return the whole value, on every rank, of a parameter or its gradient. A collective call.

    tensor: a DTensor, or a plain tensor of a single rank. It is right for every layout, dims in
    blocks and parts of unequal size included, for which DTensor.full_tensor() is not. The result
    shares no memory with the parameter.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    part, unsharded = local.detach(), whole_layout(len(layout))
    whole = gathered([part], [layout], [unsharded], [tuple(tensor.shape)], ranks)[0]
    return whole.clone() if whole is part else whole


def _held(parameter: Any) -> torch.Tensor:
    """Return the part that this rank holds of a parameter, in the parameter's memory."""
    held: torch.Tensor = local_part(parameter) if isinstance(parameter, DTensor) else parameter.data
    return held


class _Steps(threading.local):
    """Counts the steps of all optimizers, in each thread, because ranks may be threads.

    Some optimizers write to `parameter.data`, which raises no tensor's version: without the count,
    a gathered copy would not be known to be out of date.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


_steps = _Steps()


@cache
def _count_steps() -> None:
    """Have torch call `_steps` after each step; only the first of these calls registers it."""
    register_optimizer_step_post_hook(_steps)


class GatheredCopy:
    """The tensor that computes in place of a parameter of which a rank holds less than computes.

    This is what ZeRO-1 and ZeRO-2 do: the optimizer updates a part, and every forward reads the
    whole. It is gathered when the parameter may have changed: after a step of an optimizer, or when
    weights were loaded. owner, name: the dictionary of parameters, and the key, where it is.
    """

    def __init__(self, owner: dict[str, Any], name: str, layouts: ParameterLayouts) -> None:
        self.owner, self.name, self.layouts = owner, name, layouts
        self.value: torch.Tensor | None = None
        self.seen: tuple[Any, ...] = ()
        _count_steps()

    @property
    def version(self) -> tuple[Any, ...]:
        """A value that is another one whenever the parameter may have another value.

        It compares what can be seen without reading the numbers: identity, memory and versions.
        """
        parameter = self.owner[self.name]
        held = _held(parameter)
        where = (id(parameter), held.data_ptr(), held.dtype, held.device)
        return (*where, parameter._version, held._version, _steps.count)

    def forget(self) -> None:
        """Have the copy gathered again before it is used, because the parameter was written to."""
        self.seen = ()

    def set(self, value: torch.Tensor) -> None:
        """Take a value that was gathered now, into the memory of the one before if possible.

        The local tensor of the program shares that memory, and stays the same.
        """
        before = self.value
        if before is not None and (before.dtype, before.device) == (value.dtype, value.device):
            before.copy_(value)
        else:
            self.value = value.contiguous()
        self.seen = self.version


def refresh(copies: Sequence[GatheredCopy], ranks: Ranks) -> None:
    """Gather all copies that are out of date, one collective per mesh axis. A collective call."""
    old = [copy for copy in copies if copy.seen != copy.version]
    if not old:
        return
    # A copy that was made under inference_mode could not be trained with later.
    with torch.inference_mode(False), torch.no_grad():
        wholes = gathered(
            [_held(copy.owner[copy.name]).detach() for copy in old],
            [copy.layouts.state for copy in old],
            [copy.layouts.storage for copy in old],
            [copy.layouts.shape for copy in old],
            ranks,
        )
        for copy, whole in zip(old, wholes, strict=True):
            copy.set(whole)


def computing_stream() -> Any:
    """Return the GPU's stream that computes now, None where no GPU is in use."""
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


class LocalParameter:
    """One parameter: the DTensor that the user sees and the local tensor that computes.

    The local tensor shares the DTensor's memory, or that of `copy`, where more computes than is
    updated. It is made of the DTensor once, by a step that autograd records (see
    `gradient_return`), and every forward reads it: autograd knows that a loss depends on the
    user's parameter, and no call pays for it.
    owner, name: the dictionary of parameters, and the key, where the user's is. path: in the model.
    layouts: its layouts. gradient: the layout of the local gradient as the backward pass leaves it.
    bucket: the one in which its gradient waits for the end of the backward pass, if it has to.
    """

    def __init__(
        self,
        owner: dict[str, Any],
        name: str,
        path: str,
        layouts: ParameterLayouts,
        gradient: Layout,
        bucket: GradientBucket,
        copy: GatheredCopy | None = None,
    ) -> None:
        self.owner, self.name, self.path, self.layouts = owner, name, path, layouts
        self.copy = copy
        self.way = GradientReturn(
            layouts.shape, gradient, layouts.reduced_first(gradient), layouts.state, bucket
        )
        self.parameter: Any = None
        self.local: torch.Tensor | None = None
        self.stream: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the local tensor, which cannot be copied apart from its parameter and is
        made when it is needed.
        """
        return {**vars(self), "parameter": None, "local": None, "stream": None}

    @property
    def held(self) -> torch.Tensor:
        """The part that this rank holds of the parameter, in the parameter's memory."""
        return _held(self.owner[self.name])

    def get(self, stream: Any = None) -> torch.Tensor:
        """Return the local tensor of the parameter as it is now, the same one if nothing changed.

        Users may put another parameter in place, move the module, or change requires_grad. stream:
        the GPU's stream that computes now, on which autograd is to bring the gradient back.
        Raises AutoParallelError where one was given memory that its part does not share.
        """
        parameter, local = self.owner[self.name], self.local
        if parameter is not self.parameter:
            local = None
            # A plain parameter whose gradient needs no reduction computes itself: torch does the
            # rest.
            if not isinstance(parameter, DTensor) and self.way.is_trivial:
                return parameter
        if type(parameter) is DTensor:  # it was converted, or put in by the user
            mark(parameter)
        # A DTensor has no memory of its own, until `parameter.data = tensor` gives it some, which
        # neither its part nor torch's DTensor knows of.
        if isinstance(parameter, DTensor) and parameter.data_ptr():
            raise AutoParallelError(
                f"parameter {self.path} was given other memory (parameter.data = tensor)",
                where=self.path,
                why="it is a DTensor, whose part on this rank does not follow that",
                fix="call model.load_state_dict({name: tensor}, strict=False) instead, which cuts "
                "a whole tensor; or assign nn.Parameter(tensor), equal on every rank",
            )
        held = _held(parameter) if self.copy is None else self.copy.value
        assert held is not None
        if (
            local is None
            or local.data_ptr() != held.data_ptr()
            or local.dtype != held.dtype
            or local.requires_grad != parameter.requires_grad
            or stream != self.stream
        ):
            local = self.way.local_of(parameter, held)
            self.parameter, self.local, self.stream = parameter, local, stream
        return local

    def shared(self) -> nn.Parameter:
        """Return a leaf in the same memory, an nn.Parameter as torch.fx wants it.

        Its gradient is handed over to the parameter.
        """
        local = self.get()
        if isinstance(local, nn.Parameter):
            return local
        twin = nn.Parameter(local.detach(), local.requires_grad)
        if local.requires_grad:
            parameter = self.parameter

            def hand_over(leaf: torch.Tensor) -> None:
                """Take the leaf's finished gradient, and go on with it as if it came of a call."""
                grad, leaf.grad = leaf.grad, None
                torch.autograd.backward(self.way.local_of(parameter, leaf.detach()), grad)

            twin.register_post_accumulate_grad_hook(hand_over)
        return twin
