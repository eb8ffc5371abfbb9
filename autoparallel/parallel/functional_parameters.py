"""Parameters that torch.func.functional_call puts in the place of a split module's for one call.

They are whole tensors of the user's, or parts that were computed of the module's own. The whole
ones are cut for the call, in a step that autograd records, so that gradients come back whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autoparallel.errors import AutoParallelError, CaptureError
from autoparallel.parallel.distributed_layouts import distributed_placements
from autoparallel.parallel.module_state import State
from autoparallel.parallel.split_tensor import part_of
from autoparallel.support.torch_private import in_function_transform

__all__ = ["cut_for_call", "refuse_export", "refuse_transforms"]


def refuse_export(state: State) -> None:
    """Raise CaptureError for a call under torch.export."""
    if torch.compiler.is_exporting():
        raise CaptureError(
            "a split module is exported",
            where=state.path or type(state.skeleton).__name__,
            why="it runs the program of one rank, which is chosen by each call, and its parameters "
            "are parts",
            fix="export the module before it is split; or load full_state_dict(model) into one "
            "that is not, and export that",
        )


def refuse_transforms(state: State) -> None:
    """Raise AutoParallelError for a call with other parameters, such as a transform of torch.func
    puts in their place, over several ranks.
    """
    if state.ranks.world_size > 1 and in_function_transform():
        raise AutoParallelError(
            "a transform of torch.func (grad, vmap, jacrev) gives a split module other parameters",
            where=state.path or type(state.skeleton).__name__,
            why="the transforms take apart neither DTensors nor the collectives of a program",
            fix="use torch.autograd.grad (create_graph=True for second derivatives) or "
            "torch.autograd.functional; or transform a whole copy: load full_state_dict(model) "
            "into a module that is not split",
        )


@contextlib.contextmanager
def cut_for_call(state: State) -> Iterator[None]:
    """Have whole tensors that stand in the place of split parameters cut, within.

    A new nn.Parameter is none of these: it stays, and whole.
    """
    tree = state.tree
    cut: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    # Not every state knows all parameters; that of the model does.
    layouts: Mapping[str, Any] = vars(tree.root)["_autoparallel"].parameters
    if tree.mesh is not None:
        for path, known in tree.parameters.items():
            owner, _, name = path.rpartition(".")
            try:
                held: Any = tree.root.get_submodule(owner)._parameters
            except AttributeError:
                continue
            value, layout = held.get(name), layouts.get(path)
            if (
                isinstance(value, torch.Tensor)
                and not isinstance(value, (nn.Parameter, DTensor))
                and isinstance(known, DTensor)
                and layout is not None
                and tuple(value.shape) == layout.shape
            ):
                placements = distributed_placements(layout.state, tree.mesh.shape)
                held[name] = part_of(value, tree.mesh, placements)
                cut.append((held, name, value))
    try:
        yield
    finally:
        for held, name, value in cut:
            held[name] = value
