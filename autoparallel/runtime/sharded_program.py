"""The module around an emitted program that was written to a file: weights in parts, one per rank.

Such a file runs without the model, without a plan and without the planner; it imports torch and
files of this package alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from autoparallel.errors import PlanError, WorldSizeError
from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Partial, Shard, parse_layout
from autoparallel.runtime import rng
from autoparallel.runtime.groups import ProcessGroup
from autoparallel.runtime.moves import move
from autoparallel.runtime.ranks import Ranks, process_ranks, single_rank
from autoparallel.runtime.tensor_parts import take_layout_part

__all__ = ["ShardedProgram", "join"]


def join(mesh: Mapping[str, int]) -> Ranks:
    """Return this process's place on a mesh, and start the process group where torchrun has not.

    mesh: sizes by axis, outermost first. Raises WorldSizeError where other ranks run.

    >>> join({"tp": 1}).rank
    0
    """
    count = 1
    for size in mesh.values():
        count *= size
    if count == 1:
        return single_rank(Mesh(**mesh))
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if dist.get_world_size() != count:
        raise WorldSizeError(
            f"the program is for {count} ranks, and {dist.get_world_size()} run",
            fix=f"torchrun --nproc-per-node {count} ...",
        )
    device = "cuda" if cuda else "cpu"
    devices = init_device_mesh(device, tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    return process_ranks(ProcessGroup(dist.group.WORLD), devices)


class ShardedProgram(nn.Module):
    """A ShardedProgram is one rank's module: its parts of the parameters, under the user's names.

    file: the names that the file defines: `forward` or `forward_RANK`, and the tables MESH, AXES,
    PARAMETERS (by path, first the layouts of storage and gradient), BUFFERS, CONSTANTS, WRITTEN
    (paths of buffers that are written) and OUTPUTS (layouts). What it calls the groups of ranks is
    set.
    weights: whole tensors by path, such as a state_dict, of parameters and buffers.

    Example: `ShardedProgram(globals(), torch.load("weights.pt"))` at the end of such a file.
    """

    def __init__(self, file: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.ranks = join(file["MESH"])
        file.update(zip(file["AXES"], self.ranks.groups, strict=True), ranks=self.ranks)
        rank = self.ranks.rank
        self._run: Callable[..., Any] = file.get(f"forward_{rank}") or file["forward"]
        self._layouts = {
            path: (parse_layout(row[0]), parse_layout(row[1]))
            for path, row in file["PARAMETERS"].items()
        }
        self._buffer_paths: Sequence[str] = file["BUFFERS"]
        self._written: Sequence[str] = file["WRITTEN"]
        self._outputs = [parse_layout(text) for text in file["OUTPUTS"]]
        missing = [path for path in (*self._layouts, *self._buffer_paths) if path not in weights]
        if missing:
            raise PlanError(
                f"the weights have no {missing[0]!r}" + f" ({len(missing)} are missing)",
                fix="give the state_dict of the unsplit model",
            )
        cuda = torch.cuda.is_available() and self.ranks.world.world_size > 1
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device(
            "cpu"
        )  # fmt: skip
        for path, (storage, _) in self._layouts.items():
            part = take_layout_part(
                weights[path].detach(), storage, self.ranks.sizes, self.ranks.coordinates
            )
            parameter = nn.Parameter(part.clone().to(self.device))
            self._home(path).register_parameter(path.rpartition(".")[2], parameter)
        for path in self._buffer_paths:
            buffer = weights[path].detach().clone().to(self.device)
            self._home(path).register_buffer(path.rpartition(".")[2], buffer)
        self._constants = [tensor.to(self.device) for tensor in file["CONSTANTS"]]
        self.generator = rng.Generator(seed=0)

    def _home(self, path: str) -> nn.Module:
        """Return the module that a path's last name belongs to, with those on the way to it."""
        module: nn.Module = self
        for name in path.split(".")[:-1]:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        return module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return this rank's outputs. inputs: the whole tensors, the same on every rank."""
        parameters = [self.get_parameter(path) for path in self._layouts]
        buffers = [self.get_buffer(path) for path in self._buffer_paths]
        given = [tensor.to(self.device) for tensor in inputs]
        with rng.using(self.generator):
            outputs, written = self._run(parameters, buffers, self._constants, given, self.device)
        with torch.no_grad():
            for path, value in zip(self._written, written, strict=True):
                self.get_buffer(path).copy_(value)
        return tuple(outputs)

    def finish_gradients(self) -> None:
        """Sum the gradients that are pending; to be called after every backward pass."""
        for path, (storage, gradient) in self._layouts.items():
            parameter = self.get_parameter(path)
            for group, have, want in zip(self.ranks.groups, gradient, storage, strict=True):
                pending = isinstance(have, Partial) and not isinstance(want, Partial)
                if parameter.grad is not None and pending:
                    parameter.grad = move(parameter.grad, group, have, want)

    def whole(self, output: torch.Tensor, index: int) -> torch.Tensor:
        """Return an output put together from all ranks' parts. index: its place among them."""
        for group, placement in reversed(
            list(zip(self.ranks.groups, self._outputs[index], strict=True))
        ):
            if isinstance(placement, Shard):
                size = torch.tensor([output.shape[placement.dim]], device=output.device)
                size = move(size, group, Partial(), Invariant())
                output = move(output.detach(), group, placement, Invariant(), int(size))
            elif isinstance(placement, Partial):
                output = move(output.detach(), group, placement, Invariant())
        return output
