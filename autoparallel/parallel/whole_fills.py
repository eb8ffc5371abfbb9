"""The first weights of a meta model whose initializers read values: modules filled whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.errors import AutoParallelError
from autoparallel.placement import Layout, Shard
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.module_copy import shallow_copy
from autoparallel.support.module_paths import join_path
from autoparallel.support.torch_private import (
    TorchDispatchMode,
    schema_of,
    storage_key,
    tree_leaves,
)

__all__ = ["children_first", "filled_whole", "nothing_fills", "resetting"]


def children_first(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with their paths, in the order of nn.Module.apply."""
    for name, child in module.named_children():
        yield from children_first(child, join_path(path, name))
    yield path, module


def resetting(module: nn.Module) -> Callable[[], Any] | None:
    """Return the method with which a module fills its own tensors, None if it has none.

    Torch's attention and transformers call theirs `_reset_parameters`.
    """
    for name in ("reset_parameters", "_reset_parameters"):
        method = getattr(module, name, None)
        if callable(method):
            return method
    return None


def filled_whole(
    model: nn.Module, layouts: Mapping[str, Layout], ranks: Ranks, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return this rank's parts of a meta model's parameters, and its buffers, by path.

    layouts: the layout of each parameter, by path; what has none stays whole. device: the device of
    the parts.
    Module by module, in the order of nn.Module.apply, the whole is allocated, filled by the
    model's own initializer, cut, and freed, so that a rank never holds more than one module whole.
    Every rank draws the whole from torch's generator, so the parts are those of one device with the
    same seed that runs `model.apply(model._init_weights)`; a tied parameter is what was drawn for
    it last. An initializer of a module may also fill what its children own, but nothing deeper.
    Raises AutoParallelError that lists the modules, or their parameters, that nothing fills.
    """
    initializer = getattr(model, "_init_weights", None)
    parts: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    unfilled: set[str] = set()
    named: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    named.update(model.named_parameters(remove_duplicate=False))
    for path, module in children_first(model):
        real, held = _allocated(module, device)
        if not held:
            continue
        reset = resetting(real)
        owns = any("." not in name for name in held)
        with _Written() as written:
            if callable(initializer):
                initializer(real)
            elif owns and reset is not None:
                reset()
            elif owns:
                missing.append(path or type(model).__name__)
                continue
        for name, tensor in held.items():
            full = join_path(path, name)
            # Integers have no NaN that says that nothing has filled them.
            alone = not _has_nan(tensor) and storage_key(tensor) not in written.storages
            empty = alone and named[full].is_meta
            # A child's tensor was filled with the child, and its parent left it alone.
            if full in parts and (empty or _is_left(tensor)):
                continue
            if empty:
                unfilled.add(full)
            else:
                unfilled.discard(full)
            part, layout = tensor.detach(), layouts.get(full, ())
            if any(isinstance(placement, Shard) for placement in layout):
                part = take_layout_part(part, layout, ranks.sizes, ranks.coordinates).clone()
            parts.pop(full, None)  # so that they stand in the order in which they were drawn
            parts[full] = part
    # A tied tensor was allocated once for each of its paths. As on one device, where it is a single
    # tensor that is filled several times, the numbers that were drawn last stay.
    drawn_last = {id(named[path]): part for path, part in parts.items()}
    parts = {path: drawn_last[id(named[path])] for path in parts}
    # An initializer that leaves a tensor alone leaves the NaNs of its allocation.
    for path, part in parts.items():
        if path in unfilled or _is_left(part):
            missing.append(path)
    if missing:
        raise nothing_fills(missing)
    return parts


class _Written(TorchDispatchMode):
    """Notes the storages that are written to within."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and note what its schema says that it writes to."""
        given = kwargs or {}
        for at, argument in enumerate(schema_of(function).arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[at] if at < len(args) else given.get(argument.name)
                tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
                self.storages.update(map(storage_key, tensors))
        return function(*args, **given)


def _has_nan(tensor: torch.Tensor) -> bool:
    """Return whether the type of a tensor has NaN."""
    return tensor.is_floating_point() or tensor.is_complex()


def _is_left(tensor: torch.Tensor) -> bool:
    """Return whether some of a tensor is the NaN that it was allocated with."""
    return _has_nan(tensor) and bool(tensor.isnan().any())


def nothing_fills(missing: list[str]) -> AutoParallelError:
    """Return the error about tensors, or modules, that no initializer fills.

    missing: their paths.
    """
    return AutoParallelError(
        "the model is on the meta device and cannot be initialized",
        where=", ".join(missing),
        why="no reset_parameters() of theirs and no _init_weights(module) fills them",
        fix="give them reset_parameters(), or pass the model with real weights",
    )


def _allocated(
    module: nn.Module, device: torch.device
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a copy of the module in which its own and its children's meta tensors have memory.

    Return also these tensors, by their paths in the module. Floating ones are filled with NaN, so
    that what an initializer leaves alone can be told.
    """
    real = shallow_copy(module)
    held: dict[str, torch.Tensor] = {}
    for prefix, owner in (("", real), *((f"{n}.", m) for n, m in real.named_children())):
        dictionaries: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for tensors in dictionaries:
            for name, value in tensors.items():
                if value is None:
                    continue
                allocated = value
                if value.is_meta:
                    allocated = torch.empty_like(value, device=device)
                    allocated.fill_(float("nan") if _has_nan(allocated) else 0)
                if isinstance(value, nn.Parameter):
                    allocated = nn.Parameter(allocated, value.requires_grad)
                tensors[name] = allocated
                held[prefix + name] = allocated
    return real, held
