"""Parameters of a parallel module: DTensors outside, plain local leaves inside."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as DTensorReplicate
from torch.distributed.tensor import Shard as DTensorShard
from torch.optim.optimizer import register_optimizer_step_post_hook

from autoparallel.placement import Layout, Shard, whole_layout
from autoparallel.plan import ParameterChoice
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import gathered, reduced, require_refined
from autoparallel.support.torch_private import (
    at_end_of_backward,
    distributed_tensor_like,
    local_part,
    strided_shard,
)

__all__ = [
    "GatheredCopy",
    "GradientBucket",
    "LocalParameter",
    "ParameterLayouts",
    "as_distributed",
    "refresh",
    "whole_tensor",
]


@dataclass(frozen=True)
class ParameterLayouts:
    """How one parameter is kept. shape: of the whole; the layouts are those of ParameterChoice."""

    shape: tuple[int, ...]
    storage: Layout
    gradient: Layout
    state: Layout

    @staticmethod
    def of(choice: ParameterChoice | None, shape: tuple[int, ...], axes: int) -> ParameterLayouts:
        """As planned; whole where nothing is. Raises PlanError for what is impossible."""
        if choice is None:
            return ParameterLayouts(shape, *(whole_layout(axes),) * 3)
        require_refined(choice.storage, choice.state, choice.path)
        return ParameterLayouts(shape, choice.storage, choice.gradient, choice.state)

    def reduced_first(self, given: Layout) -> Layout:
        """What becomes at once of a gradient that lies as `given`: it is cut where it is to be.

        Where it is cut on an outer axis later, an inner cut of the same dim must wait for that.
        """
        first = list(given)
        waiting: set[int] = set()
        for axis, (early, late) in enumerate(zip(self.gradient, self.state, strict=True)):
            if not isinstance(late, Shard) or given[axis] == late:
                continue
            if early == late and late.dim not in waiting:
                first[axis] = late
            else:
                waiting.add(late.dim)
        return tuple(first)


def _distributed_placements(layout: Layout, mesh: DeviceMesh) -> list[Any]:
    """The layout in DTensor's words, where blocks are counted in the whole, over all outer cuts."""
    found: list[Any] = []
    pieces: dict[int, int] = {}
    for axis, cut in enumerate(layout):
        if not isinstance(cut, Shard):
            found.append(DTensorReplicate())
            continue
        outer = pieces.get(cut.dim, 1)
        pieces[cut.dim] = outer * mesh.size(axis)
        if cut.blocks != 1:
            found.append(strided_shard(cut.dim, cut.blocks * outer))
        else:
            found.append(DTensorShard(cut.dim))
    return found


def as_distributed(
    local: torch.Tensor, layout: Layout, shape: tuple[int, ...], mesh: DeviceMesh
) -> DTensor:
    """The whole tensor of `shape` of which this rank holds `local`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local,
        mesh,
        _distributed_placements(layout, mesh),
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def whole_tensor(tensor: torch.Tensor, layout: Layout, ranks: Ranks) -> torch.Tensor:
    """The whole value on every rank, of a parameter or its gradient. A collective call.

    Right for every layout, blocks and uneven runs included.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    own, whole = local.detach(), whole_layout(len(layout))
    made = gathered([own], [layout], [whole], [tuple(tensor.shape)], ranks)[0]
    return made.clone() if made is own else made


def _held(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter."""
    held: torch.Tensor = local_part(parameter) if isinstance(parameter, DTensor) else parameter.data
    return held


class _Steps(threading.local):
    """Steps of optimizers so far. Some write to `parameter.data`, which changes no version."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


_steps = _Steps()


@cache
def _count_steps() -> None:
    register_optimizer_step_post_hook(_steps)


class GatheredCopy:
    """What computes in place of a parameter of which the ranks hold less than computes.

    It is gathered when the parameter may have changed: after a step of an optimizer, or when
    weights were loaded.
    """

    def __init__(self, owner: dict[str, Any], name: str, kept: ParameterLayouts) -> None:
        self.owner, self.name, self.kept = owner, name, kept
        self.value: torch.Tensor | None = None
        self.seen: tuple[Any, ...] = ()
        _count_steps()

    @property
    def version(self) -> tuple[Any, ...]:
        """Another one when the parameter has another value."""
        parameter = self.owner[self.name]
        held = _held(parameter)
        where = (id(parameter), held.data_ptr(), held.dtype, held.device)
        return (*where, parameter._version, held._version, _steps.count)

    def forget(self) -> None:
        """The parameter was written to: gather it again before it is used."""
        self.seen = ()

    def set(self, value: torch.Tensor) -> None:
        """Take a value that was gathered now, into the memory of the one before if possible."""
        known = self.value
        if known is not None and (known.dtype, known.device) == (value.dtype, value.device):
            known.copy_(value)
        else:
            self.value = value.contiguous()
        self.seen = self.version


def refresh(copies: Sequence[GatheredCopy], ranks: Ranks) -> None:
    """Gather all copies that are out of date, together. A collective call."""
    old = [copy for copy in copies if copy.seen != copy.version]
    if not old:
        return
    with torch.inference_mode(False), torch.no_grad():
        wholes = gathered(
            [_held(copy.owner[copy.name]).detach() for copy in old],
            [copy.kept.state for copy in old],
            [copy.kept.storage for copy in old],
            [copy.kept.shape for copy in old],
            ranks,
        )
        for copy, whole in zip(old, wholes, strict=True):
            copy.set(whole)


class GradientBucket:
    """Gradients that are reduced together, when the backward pass ends."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.waiting: list[tuple[LocalParameter, torch.Tensor]] = []

    def add(self, leaf: LocalParameter, grad: torch.Tensor) -> None:
        """Keep a leaf's local gradient until the end of this backward pass."""
        if not self.waiting:
            at_end_of_backward(self.finish)
        self.waiting.append((leaf, grad))

    def finish(self) -> None:
        """Reduce all, and hand each to its parameter. Ranks agree on the order: of the names."""
        waiting, self.waiting = sorted(self.waiting, key=lambda item: item[0].path), []
        done = reduced(
            [grad for _, grad in waiting],
            [leaf.first for leaf, _ in waiting],
            [leaf.kept.state for leaf, _ in waiting],
            self.ranks,
        )
        for (leaf, _), total in zip(waiting, done, strict=True):
            leaf.give(total)


class LocalParameter:
    """One parameter: the DTensor that the user sees and the local tensor that computes.

    The local leaf shares the DTensor's memory, or that of `copy`, where more computes than is
    updated. Its gradient is handed over as a DTensor as soon as it is complete, because going
    through autograd costs far more for many parameters. gradient: how it then lies.
    """

    def __init__(
        self,
        owner: dict[str, Any],
        name: str,
        path: str,
        kept: ParameterLayouts,
        gradient: Layout,
        bundle: GradientBucket,
        copy: GatheredCopy | None = None,
    ) -> None:
        self.owner, self.name, self.path, self.kept = owner, name, path, kept
        self.gradient, self.bundle, self.copy = gradient, bundle, copy
        self.first = kept.reduced_first(gradient)
        self.parameter: Any = None
        self.local: torch.Tensor | None = None

    @property
    def held(self) -> torch.Tensor:
        """What this rank keeps of the parameter."""
        return _held(self.owner[self.name])

    def get(self) -> torch.Tensor:
        """The local leaf of the parameter as it is now."""
        parameter = self.owner[self.name]
        if not isinstance(parameter, DTensor) and self.gradient == self.kept.state:
            return parameter
        held = _held(parameter) if self.copy is None else self.copy.value
        assert held is not None
        local = self.local
        if (
            parameter is not self.parameter
            or local is None
            or local.data_ptr() != held.data_ptr()
            or local.dtype != held.dtype
        ):
            with torch.inference_mode(False):
                local = held.detach()
            self.parameter, self.local = parameter, local
        if local.requires_grad != parameter.requires_grad:
            local.requires_grad_(parameter.requires_grad)
            if parameter.requires_grad:
                local.register_post_accumulate_grad_hook(self.hand_over)
        return local

    def shared(self) -> nn.Parameter:
        """Another leaf in the same memory, whose gradient is handed over likewise."""
        local = self.get()
        if isinstance(local, nn.Parameter):
            return local
        made = nn.Parameter(local.detach(), local.requires_grad)
        if local.requires_grad:
            made.register_post_accumulate_grad_hook(self.hand_over)
        return made

    def hand_over(self, local: torch.Tensor) -> None:
        """Move the leaf's finished gradient to the parameter, or to the bundle it waits in."""
        grad = local.grad
        local.grad = None
        assert grad is not None
        if self.first != self.gradient:
            (grad,) = reduced([grad], [self.gradient], [self.first], self.bundle.ranks)
        if self.first != self.kept.state:
            self.bundle.add(self, grad)
        else:
            self.give(grad)

    def give(self, grad: torch.Tensor) -> None:
        """Add a finished local gradient to the parameter's."""
        parameter = self.parameter
        distributed = isinstance(parameter, DTensor)
        if parameter.grad is None:
            parameter.grad = distributed_tensor_like(grad, parameter) if distributed else grad
        else:
            held = local_part(parameter.grad) if distributed else parameter.grad
            held.add_(grad)
