"""Parameters of a parallel module: DTensors outside, plain local leaves inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as DTensorReplicate
from torch.distributed.tensor import Shard as DTensorShard
from torch.distributed.tensor.placement_types import _StridedShard

from autoparallel.copies import shallow_copy
from autoparallel.errors import AutoParallelError
from autoparallel.placement import Invariant, Placement, Shard
from autoparallel.runtime.collectives import move, sum_together, take_part
from autoparallel.runtime.groups import Group

__all__ = ["Bundle", "Leaf", "as_distributed", "materialize", "whole_tensor"]


def _distributed_placement(placement: Placement) -> Any:
    if not isinstance(placement, Shard):
        return DTensorReplicate()
    if placement.blocks != 1:
        return _StridedShard(placement.dim, split_factor=placement.blocks)
    return DTensorShard(placement.dim)


def as_distributed(
    local: torch.Tensor, placement: Placement, shape: tuple[int, ...], mesh: DeviceMesh
) -> DTensor:
    """The whole tensor of `shape` of which this rank holds `local`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local,
        mesh,
        [_distributed_placement(placement)],
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def whole_tensor(tensor: torch.Tensor, placement: Placement, group: Group) -> torch.Tensor:
    """The whole value on every rank, of a parameter or its gradient. A collective call.

    Right for every placement, blocks and uneven runs included.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not isinstance(placement, Shard):
        return local.detach().clone()
    size = tensor.shape[placement.dim]
    return move(local.detach(), group, placement, Invariant(), size)


class Bundle:
    """Gradients to be summed over the ranks in one collective, when the backward pass ends."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.waiting: list[tuple[Leaf, torch.Tensor]] = []

    def add(self, leaf: Leaf, grad: torch.Tensor) -> None:
        """Keep a leaf's local gradient until the end of this backward pass."""
        if not self.waiting:
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        self.waiting.append((leaf, grad))

    def finish(self) -> None:
        """Sum all, and hand each to its parameter. Ranks agree on the order: that of the names."""
        waiting, self.waiting = sorted(self.waiting, key=lambda item: item[0].path), []
        sums = sum_together([grad for _, grad in waiting], self.group)
        for (leaf, _), total in zip(waiting, sums, strict=True):
            leaf.give(total)


class Leaf:
    """One parameter: the DTensor that the user sees and the local tensor that computes.

    The local leaf shares the DTensor's memory. Its gradient is handed over as a DTensor as soon
    as it is complete, because going through autograd costs far more for many parameters.
    """

    def __init__(
        self,
        owner: dict[str, Any],
        name: str,
        path: str,
        bundle: Bundle | None = None,
    ) -> None:
        self.owner, self.name, self.path, self.bundle = owner, name, path, bundle
        self.parameter: Any = None
        self.local: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        """The local leaf of the parameter as it is now."""
        parameter = self.owner[self.name]
        distributed = isinstance(parameter, DTensor)
        if not distributed and self.bundle is None:
            return parameter
        held = parameter._local_tensor if distributed else parameter.data
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

    def hand_over(self, local: torch.Tensor) -> None:
        """Move the leaf's finished gradient to the parameter, or to the bundle it waits in."""
        grad = local.grad
        local.grad = None
        assert grad is not None
        if self.bundle is not None:
            self.bundle.add(self, grad)
        else:
            self.give(grad)

    def give(self, grad: torch.Tensor) -> None:
        """Add a finished local gradient to the parameter's."""
        parameter = self.parameter
        distributed = isinstance(parameter, DTensor)
        if parameter.grad is None:
            parameter.grad = (
                DTensor(grad, parameter._spec, requires_grad=False) if distributed else grad
            )
        else:
            held = parameter.grad._local_tensor if distributed else parameter.grad
            held.add_(grad)


def _children_first(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The order of nn.Module.apply."""
    for name, child in module.named_children():
        yield from _children_first(child, f"{path}.{name}" if path else name)
    yield path, module


def materialize(
    model: nn.Module, storage: dict[str, Placement], group: Group, device: torch.device
) -> dict[str, torch.Tensor]:
    """This rank's parts of a meta model's parameters, and its buffers, by path.

    Module by module, in the order of nn.Module.apply, the whole is allocated, filled by the
    model's own initializer (the model's `_init_weights(module)`, else `reset_parameters()`), cut,
    and freed. Every rank draws the same numbers, so the parts are those of one device with the
    same seed that runs `model.apply(model._init_weights)`; a tied parameter is what was drawn for
    it last. An initializer of a module may also fill what its children own, but nothing deeper.
    Raises AutoParallelError that lists the modules, or their parameters, that nothing fills.
    """
    own = getattr(model, "_init_weights", None)
    parts: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    for path, module in _children_first(model):
        real, held = _allocated(module, path, device)
        if not held:
            continue
        reset = getattr(real, "reset_parameters", None)
        owns = any("." not in name for name in held)
        if callable(own):
            own(real)
        elif owns and callable(reset):
            reset()
        elif owns:
            missing.append(path or type(model).__name__)
            continue
        for name, tensor in held.items():
            full = f"{path}.{name}" if path else name
            if full in parts and bool(tensor.isnan().any()):
                continue
            part, placed = tensor.detach(), storage.get(full)
            if isinstance(placed, Shard):
                part = take_part(part, placed, group.world_size, group.rank).clone()
            parts.pop(full, None)  # so that they stand in the order in which they were drawn
            parts[full] = part
    named: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    named.update(model.named_parameters(remove_duplicate=False))
    drawn_last = {id(named[path]): part for path, part in parts.items()}
    parts = {path: drawn_last[id(named[path])] for path in parts}
    for path, part in parts.items():
        if part.is_floating_point() and bool(part.isnan().any()):
            missing.append(path)
    if missing:
        raise AutoParallelError(
            "the model is on the meta device and cannot be initialized",
            where=", ".join(missing),
            why="no reset_parameters() of theirs and no _init_weights(module) fills them",
            fix="give them reset_parameters(), or pass the model with real weights",
        )
    return parts


def _allocated(
    module: nn.Module, path: str, device: torch.device
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy of the module whose own and whose children's meta tensors have memory.

    Floating ones are filled with NaN, so that what an initializer leaves alone can be told.
    """
    real = shallow_copy(module)
    held: dict[str, torch.Tensor] = {}
    for prefix, owner in (("", real), *((f"{n}.", m) for n, m in real.named_children())):
        own: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for tensors in own:
            for name, value in tensors.items():
                if value is None:
                    continue
                made = value
                if value.is_meta:
                    made = torch.empty_like(value, device=device)
                    if made.is_floating_point():
                        made.fill_(float("nan"))
                if isinstance(value, nn.Parameter):
                    made = nn.Parameter(made, value.requires_grad)
                tensors[name] = made
                held[prefix + name] = made
    return real, held
