"""The model without memory, by which other calls are traced, as the running model is now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from autoparallel.capture.equal_blocks import token_of
from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES
from autoparallel.parallel.module_state import Tree
from autoparallel.parallel.shown_parameters import held_by
from autoparallel.support.module_copy import inherit_originals, on_meta, referring

__all__ = ["attributes_of", "fresh_skeleton", "own_forward", "traceable"]

# What this project keeps in a module, and what module.compile() has put there.
_OWN = ("_autoparallel", "_generator", "_compiled_call_impl")
_HOOKS = tuple(name for name in sorted(MODULE_ATTRIBUTES) if "hooks" in name)
_DEPTH = 3  # levels of plain objects that are compared


def attributes_of(model: nn.Module) -> Any:
    """Return a value that is another one whenever a trace of the model could be.

    It tells of plain attributes, of the modules and their classes, and of the parameters but for
    their numbers.
    """
    paths: dict[int, str] = {}
    rows: list[Any] = []
    named = list(model.named_modules(remove_duplicate=False))
    for path, module in named:
        paths.setdefault(id(module), path)
        tensors: dict[str, Any] = {**held_by(module), **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None:
                paths.setdefault(id(tensor), f"{path}.{name}")
    for path, module in named:
        state = vars(module).get("_autoparallel")
        kind = type(module) if state is None else type(module).__bases__[1]
        own_forward = None if state is None else token_of(state.own_forward, paths)
        rows.append((path, paths[id(module)], kind, own_forward))
        tensors = {**held_by(module), **module._buffers}
        for name, tensor in tensors.items():
            looks = tensor is None or (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            rows.append((name, looks, tensor is None or paths[id(tensor)]))
            rows.append(None if tensor is None else token_of(dict(vars(tensor)), paths))
        for name, value in vars(module).items():
            if name not in MODULE_ATTRIBUTES and name not in _OWN:
                rows.append((name, token_of(value, paths, depth=_DEPTH)))
    return rows


def traceable(tree: Tree) -> nn.Module:
    """Return the model without memory, as it is now, to be traced for a call.

    tree: of the running model, whose skeleton is made again where anything has changed.
    """
    with tree.whole.as_held(), torch.inference_mode(False):
        attributes = attributes_of(tree.root)
        if attributes != tree.attributes:
            tree.skeleton = fresh_skeleton(tree)
            tree.attributes = attributes
            tree.elsewhere.clear()
            for path, module in tree.root.named_modules():
                if "_autoparallel" in vars(module):
                    vars(module)["_autoparallel"].skeleton = tree.skeleton.get_submodule(path)
        # What a forward makes lies on the device of the parameters, and autocast depends on it.
        device = tree.device()
        if device not in tree.elsewhere:
            tree.elsewhere[device] = fresh_skeleton(tree, device)
        return tree.elsewhere[device]


@contextlib.contextmanager
def own_forward(twin: nn.Module, module: nn.Module) -> Iterator[None]:
    """Have a module without memory run the forward that it was planned with, within.

    twin: of `module`, in whose place the user may have put another forward. That one runs as
    Python, and it has called the one before it.
    """
    if "forward" not in vars(module):
        yield
        return
    replaced = vars(twin).pop("forward", None)
    state = vars(module)["_autoparallel"]
    if state.own_forward is not None:
        vars(twin)["forward"] = referring(state.own_forward, {id(module): twin})
    try:
        yield
    finally:
        vars(twin).pop("forward", None)
        if replaced is not None:
            vars(twin)["forward"] = replaced


def fresh_skeleton(tree: Tree, device: torch.device | None = None) -> nn.Module:
    """Return the running model without memory, of the user's own classes.

    tree: of the model. The hooks are those of its skeleton so far: others, which were registered
    since, are run by Python. device: where its tensors seem to lie; by default they are on the meta
    device.
    """
    model, before = tree.root, tree.skeleton
    layouts = vars(model)["_autoparallel"].parameters
    # A rank may hold a part of a parameter alone.
    shapes = {id(item): layouts[path].shape for path, item in tree.parameters.items()}
    skeleton = on_meta(model, device, shapes)
    inherit_originals(skeleton, before)
    twins: dict[int, Any] = {}
    inner = dict(model.named_modules(remove_duplicate=False))
    for path, twin in skeleton.named_modules(remove_duplicate=False):
        twins[id(inner[path])] = twin
    hooked = dict(before.named_modules(remove_duplicate=False))
    for path, twin in skeleton.named_modules():
        own = vars(twin)
        state = own.get("_autoparallel")
        for name in _OWN:
            own.pop(name, None)
        if state is not None:
            twin.__class__ = type(inner[path]).__bases__[1]
            if state.own_forward is not None:
                own["forward"] = referring(state.own_forward, twins)
        for name in _HOOKS:
            hooks = vars(hooked[path])[name] if path in hooked else {}
            if isinstance(own[name], dict):
                own[name] = type(own[name])(hooks)
    return skeleton
