"""Copies of a module tree that share its tensors."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["DEEPEST", "on_meta", "originals", "redirect", "referring", "shallow_copy"]

_ORIGINALS = "_autoparallel_originals"
_INTERNAL = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)

DEEPEST = 4  # containers inside of containers that are looked into


def shallow_copy(module: nn.Module) -> nn.Module:
    """The same module tree with dicts of its own; parameters and buffers are shared.

    Attributes that refer to modules of the tree (a list of layers, a bound method) refer to the
    copies, and containers in attributes are copies: a forward may write to them.
    """
    twins: dict[int, nn.Module] = {}
    made = _copied(module, twins)
    containers: dict[int, Any] = {}
    for inner in twins.values():
        for name, value in list(vars(inner).items()):
            if name not in _INTERNAL:
                vars(inner)[name] = _own_containers(value, containers)
    redirect(twins.values(), twins)
    return made


def redirect(modules: Iterable[nn.Module], twins: Mapping[int, Any]) -> None:
    """Let the modules' attributes refer to the twins."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                replaced = referring(value, twins)
                if replaced is not value:
                    vars(module)[name] = replaced


def _own_containers(value: Any, known: dict[int, Any], depth: int = 0) -> Any:
    """Lists, dicts and sets copied, the same one to the same copy; anything else as it is.

    known: of what has been copied, by id, the object and its copy.
    """
    if type(value) is tuple:
        items = tuple(_own_containers(item, known, depth + 1) for item in value)
        return value if all(map(_same, items, value)) else items
    if type(value) not in _CONTAINERS or depth > DEEPEST:
        return value
    if id(value) not in known:
        made = copy.copy(value)
        known[id(value)] = (value, made)
        if isinstance(made, dict):
            for key, item in made.items():
                made[key] = _own_containers(item, known, depth + 1)
        elif isinstance(made, list):
            made[:] = [_own_containers(item, known, depth + 1) for item in made]
    return known[id(value)][1]


def _copied(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in twins:
        made = module.__class__.__new__(module.__class__)
        made.__dict__ = dict(module.__dict__)
        twins[id(module)] = made
        for name, value in module.__dict__.items():
            if isinstance(value, dict) and name.startswith("_"):
                made.__dict__[name] = copy.copy(value)
        made.__dict__["_modules"] = {
            name: None if child is None else _copied(child, twins)
            for name, child in module._modules.items()
        }
    return twins[id(module)]


def referring(value: Any, twins: Mapping[int, Any], depth: int = 0) -> Any:
    """`value` with each object that has a twin (by id) replaced by it; itself if there is none.

    Looks into lists, tuples, dicts, bound methods and partial functions, not into other objects.
    """
    if id(value) in twins:
        return twins[id(value)]
    if depth > DEEPEST:
        return value
    inner = functools.partial(referring, twins=twins, depth=depth + 1)
    if isinstance(value, types.MethodType):
        owner = inner(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        made = tuple(map(inner, parts))
        if all(a is b for a, b in zip(parts, made, strict=True)):
            return value
        return functools.partial(made[0], *made[1], **made[2])
    if isinstance(value, dict):
        items = {key: inner(item) for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        replaced = copy.copy(value)
        replaced.update(items)
        return replaced
    if type(value) in (list, tuple):
        found = [inner(item) for item in value]
        return value if all(map(_same, found, value)) else type(value)(found)
    return value


def _same(first: Any, second: Any) -> bool:
    return first is second


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without memory, for tracing: everything on the meta device."""
    made = shallow_copy(model)
    known: dict[int, Any] = {}
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"),
                        requires_grad=parameter.requires_grad,
                    )
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in known:
                    known[id(buffer)] = torch.empty_like(buffer, device="meta")
                module._buffers[name] = known[id(buffer)]
    redirect(made.modules(), known)
    made.__dict__[_ORIGINALS] = _Originals(model, made)
    return made


class _Originals:
    """What the tensors of a copied model were: objects that its modules keep refer to those still.

    They are not kept alive. rows: (the original, the copy's module, its path, the tensor's name).
    """

    __slots__ = ("rows",)

    def __init__(self, model: nn.Module | None = None, made: nn.Module | None = None) -> None:
        self.rows: list[tuple[Any, nn.Module, str, str]] = []
        if model is None or made is None:
            return
        own = dict(made.named_modules(remove_duplicate=False))
        for path, module in model.named_modules(remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.rows.append((weakref.ref(tensor), own[path], path, name))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (_Originals, ())


def originals(model: nn.Module) -> Iterator[tuple[torch.Tensor, nn.Module, str, str]]:
    """Of a model made by `on_meta`: tensors of the model that it was made from, which are there
    still; and what has their copies: module, its path, and the name in it."""
    made = vars(model).get(_ORIGINALS)
    for reference, module, path, name in made.rows if made is not None else ():
        tensor = reference()
        if tensor is not None:
            yield tensor, module, path, name
