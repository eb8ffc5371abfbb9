"""A copied module tree gets parameters and buffers of its own: this rank's parts of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.parallel.materialize import materialize
from autoparallel.parallel.parameters import GatheredCopy, ParameterLayouts, as_distributed
from autoparallel.parallel.shown_parameters import held_by
from autoparallel.placement import Layout
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.module_copy import redirect

__all__ = ["fill_tree", "gathered_copies"]


def fill_tree(
    model: nn.Module,
    tree: nn.Module,
    layouts: Mapping[str, Layout],
    ranks: Ranks,
    mesh: DeviceMesh | None,
    absent: Collection[str] = (),
) -> None:
    """Give a copied tree split parameters, and buffers, of its own.

    model: the user's, which stays as it is. tree: a shallow copy of it, which shares its tensors
    until then. layouts: the layout of each parameter, by path, as the user is to see it. mesh: the
    DeviceMesh of the DTensors, None for a single process. absent: the paths of parameters that the
    ranks of other stages have; here they have names, sizes and no memory. What is tied in the model
    is tied in the tree. A model on the meta device is materialized, on the GPU if there is one.
    """
    parts: dict[str, torch.Tensor] = {}
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        parts = materialize(model, layouts, ranks, device, absent)
    # By the identity of the model's tensor: what stands in several places becomes one.
    twins: dict[int, nn.Parameter] = {}
    buffers: dict[int, torch.Tensor] = {}
    originals = dict(model.named_modules(remove_duplicate=False))
    # A module that stands at several paths is one object, and is filled once.
    done: set[int] = set()
    for path, module in tree.named_modules(remove_duplicate=False):
        if id(module) in done:
            continue
        done.add(id(module))
        prefix = f"{path}." if path else ""
        original = originals[path]
        for name, parameter in original._parameters.items():
            if parameter is None:
                continue
            full = prefix + name
            if id(parameter) not in twins:
                if full in absent:
                    empty = torch.empty_like(parameter, device="meta")
                    twins[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                    vars(twins[id(parameter)]).update(vars(parameter))
                    module._parameters[name] = twins[id(parameter)]
                    continue
                layout = layouts[full]
                part = parts.get(full)
                if part is None:
                    whole = parameter.detach()
                    # A part is a view, which would keep the whole in memory.
                    part = take_layout_part(whole, layout, ranks.sizes, ranks.coordinates).clone()
                data = part
                if mesh is not None:
                    data = as_distributed(part.contiguous(), layout, tuple(parameter.shape), mesh)
                twin = nn.Parameter(data, parameter.requires_grad)
                # Marks that users put on parameters, for the groups of an optimizer, say.
                vars(twin).update(vars(parameter))
                if mesh is None:
                    _count_writes_of(twin, parameter)
                twins[id(parameter)] = twin
            module._parameters[name] = twins[id(parameter)]
        for name, buffer in original._buffers.items():
            if buffer is not None:
                copied = parts.get(prefix + name, buffer.detach().clone())
                _count_writes_of(copied, buffer)
                module._buffers[name] = buffers.setdefault(id(buffer), copied)
    # Attributes of modules may refer to a buffer besides the module that registered it.
    redirect(tree.modules(), buffers)


def _count_writes_of(copied: torch.Tensor, original: torch.Tensor) -> None:
    """Have a copy's version be that of its original: a forward may ask how often it was written to.

    The versions of DTensors count nothing that the optimizer writes, and are not told.
    """
    if not copied.is_inference() and not original.is_inference():
        missing = original._version - copied._version
        torch.autograd.graph.increment_version([copied] * missing)


def gathered_copies(
    tree: nn.Module, parameters: Mapping[str, ParameterLayouts]
) -> dict[int, GatheredCopy]:
    """Return the copies that compute in place of parameters, by the parameters' ids.

    There is one for every parameter of which a rank keeps less than it computes with: ZeRO-1 and
    ZeRO-2 (arXiv:1910.02054) split what the optimizer updates, and each forward reads the whole.
    """
    copies: dict[int, GatheredCopy] = {}
    for path, parameter in tree.named_parameters():
        if parameter.is_meta:  # the ranks of another stage have it
            continue
        if parameters[path].state != parameters[path].storage:
            owner, _, name = path.rpartition(".")
            holder = held_by(tree.get_submodule(owner))
            copies[id(parameter)] = GatheredCopy(holder, name, parameters[path])
    return copies
