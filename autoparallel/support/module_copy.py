"""Copies of a module tree that share its tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from autoparallel.support.fake_tensors import fake_mode
from autoparallel.support.object_state import own_attributes
from autoparallel.support.torch_private import ShapeEnv

__all__ = [
    "DEEPEST",
    "inherit_copies",
    "inherit_originals",
    "keep_attributes",
    "on_meta",
    "originals",
    "redirect",
    "referring",
    "shallow_copy",
]

_ORIGINALS = "_autoparallel_originals"
_INTERNAL = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)

DEEPEST = 4  # containers inside of containers that are looked into


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module tree with dicts of its own;
    parameters and buffers are shared with the original.

    Attributes that refer to modules of the tree (a list of layers, a bound method) refer to the
    copies, and containers in attributes are copies, so that nothing that the copy does writes to
    an attribute of the original.

    >>> linear = nn.Linear(2, 3)
    >>> twin = shallow_copy(linear)
    >>> twin is linear, twin.weight is linear.weight
    (False, True)
    """
    twins: dict[int, nn.Module] = {}
    root = _copied(module, twins)
    # What an object refers to as well must stay one with what it has: objects are not copied.
    containers: dict[int, Any] = {}
    seen: set[tuple[int, bool]] = set()
    for inner in twins.values():
        for name, value in vars(inner).items():
            if name not in _INTERNAL:
                containers.update((id(held), (held, held)) for held in _held_inside(value, seen))
    for inner in twins.values():
        for name, value in list(vars(inner).items()):
            if name not in _INTERNAL:
                vars(inner)[name] = _own_containers(value, containers)
    redirect(twins.values(), twins)
    return root


def redirect(modules: Iterable[nn.Module], twins: Mapping[int, Any]) -> None:
    """Let the modules' attributes refer to the twins, by the ids of the objects that these stand
    for.
    """
    for module in modules:
        for name, value in list(vars(module).items()):
            # Torch's own three dicts are filled by who calls this.
            if name not in ("_parameters", "_buffers", "_modules"):
                redirected = referring(value, twins)
                if redirected is not value:
                    vars(module)[name] = redirected


def _held_inside(
    value: Any, seen: set[tuple[int, bool]], depth: int = 0, inside: bool = False
) -> Iterator[Any]:
    """Yield the containers to which objects and functions in the value of an attribute refer.

    seen: what was looked at, and whether it was inside of an object. inside: whether `value` is.
    """
    plain = (str, bytes, int, float, complex, type, types.ModuleType, nn.Module, torch.Tensor)
    if value is None or isinstance(value, plain) or (id(value), inside) in seen or depth > DEEPEST:
        return
    seen.add((id(value), inside))
    if type(value) in _CONTAINERS or type(value) is tuple:
        if inside and type(value) is not tuple:
            yield value
        parts = list(value.values()) if isinstance(value, dict) else list(value)
    else:
        inside = True
        parts = [getattr(value, "__self__", None), *own_attributes(value).values()]
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                parts.append(cell.cell_contents)
        if isinstance(value, functools.partial):
            parts += [*value.args, *value.keywords.values()]
    for part in parts:
        yield from _held_inside(part, seen, depth + 1, inside)


def _own_containers(value: Any, known: dict[int, Any], depth: int = 0) -> Any:
    """Return lists, dicts and sets copied, the same one to the same copy; anything else as it is.

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
    """Return the copy of one module and of those below it.

    twins: copies by the id of their original, filled here.
    """
    # A module that occurs at two places is copied once, so that both stay one module.
    if id(module) not in twins:
        twin = module.__class__.__new__(module.__class__)
        # Without __init__, which may take arguments, and would make new parameters.
        twin.__dict__ = dict(module.__dict__)
        twins[id(module)] = twin
        for name, value in module.__dict__.items():
            # Torch's own dicts: hooks, parameters and buffers. The user's are shared unless they
            # hold modules.
            if isinstance(value, dict) and name.startswith("_"):
                twin.__dict__[name] = copy.copy(value)
        twin.__dict__["_modules"] = {
            name: None if child is None else _copied(child, twins)
            for name, child in module._modules.items()
        }
    return twins[id(module)]


def referring(value: Any, twins: Mapping[int, Any], depth: int = 0) -> Any:
    """Return `value` with each object that has a twin replaced by it;
    `value` itself where there is none inside.

    value: any attribute of a module. twins: replacements by the id of what they replace. depth: how
    many containers lie around it. It looks into lists, tuples, dicts, bound methods and partial
    functions, not into other objects, and leaves the originals as they are.

    >>> old, new = object(), "new"
    >>> referring([1, (old,)], {id(old): new})
    [1, ('new',)]
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
        redirected = tuple(map(inner, parts))
        if all(a is b for a, b in zip(parts, redirected, strict=True)):
            return value
        return functools.partial(redirected[0], *redirected[1], **redirected[2])
    if isinstance(value, dict):
        items = {key: inner(item) for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        # copy.copy keeps the class: an OrderedDict or a config's own kind of dict.
        redirected_dict = copy.copy(value)
        redirected_dict.update(items)
        return redirected_dict
    if type(value) in (list, tuple):
        redirected_items = [inner(item) for item in value]
        return value if all(map(_same, redirected_items, value)) else type(value)(redirected_items)
    return value


def _same(first: Any, second: Any) -> bool:
    """Return whether both are one object.

    Comparing by == would compare tensors element by element.
    """
    return first is second


def keep_attributes(source: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor with the attributes that were set on the original.

    >>> source = torch.ones(2)
    >>> source.scale = 2.0
    >>> keep_attributes(source, source.clone()).scale
    2.0
    """
    vars(copy).update(vars(source))
    return copy


def on_meta(
    model: nn.Module,
    device: torch.device | None = None,
    shapes: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
) -> nn.Module:
    """Return a copy of the model without memory, for tracing:
    every parameter and buffer is on the meta device.

    device: one where they seem to lie instead, as fake tensors, for what depends on the device.
    shapes: of parameters, by id, that are to have another shape than in the model.
    Tied parameters stay tied, and parameters that need no gradient need none. The original is left
    as it is.

    >>> on_meta(nn.Linear(2, 3)).weight.device.type
    'meta'
    """
    if device is not None:
        with fake_mode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            return _without_memory(model, device, shapes)
    return _without_memory(model, torch.device("meta"), shapes)


def _without_memory(
    model: nn.Module, device: torch.device, shapes: Mapping[int, tuple[int, ...]]
) -> nn.Module:
    """Return the copy of `on_meta`, with tensors on `device` as the mode in force makes them."""
    meta_model = shallow_copy(model)
    meta_twins: dict[int, Any] = {}
    for module in meta_model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in meta_twins:
                    shape = shapes.get(id(parameter), tuple(parameter.shape))
                    meta_twin = nn.Parameter(
                        torch.empty(shape, dtype=parameter.dtype, device=device),
                        requires_grad=parameter.requires_grad,
                    )
                    meta_twins[id(parameter)] = keep_attributes(parameter, meta_twin)
                module._parameters[name] = meta_twins[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in meta_twins:
                    meta_buffer = torch.empty_strided(
                        buffer.shape, buffer.stride(), dtype=buffer.dtype, device=device
                    )
                    meta_twins[id(buffer)] = keep_attributes(buffer, meta_buffer)
                module._buffers[name] = meta_twins[id(buffer)]
    redirect(meta_model.modules(), meta_twins)
    meta_model.__dict__[_ORIGINALS] = _Originals(model, meta_model)
    return meta_model


class _Originals:
    """The original tensors of a copied model, to which objects that its modules keep still refer.

    They are not kept alive. rows: (the original, the copy's module, its path, the tensor's name).
    """

    __slots__ = ("rows",)

    def __init__(self, model: nn.Module | None = None, made: nn.Module | None = None) -> None:
        self.rows: list[tuple[Any, nn.Module, str, str]] = []
        if model is None or made is None:
            return
        copies = dict(made.named_modules(remove_duplicate=False))
        for path, module in model.named_modules(remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.rows.append((weakref.ref(tensor), copies[path], path, name))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (_Originals, ())


def inherit_originals(model: nn.Module, before: nn.Module) -> None:
    """Let a copy stand for the tensors, too, that an earlier copy of the model stands for.

    model, before: as `on_meta` returns them.
    """
    copies = dict(model.named_modules(remove_duplicate=False))
    rows = vars(model)[_ORIGINALS].rows
    for reference, _, path, name in vars(before)[_ORIGINALS].rows:
        twin = copies.get(path)
        if twin is not None and (name in twin._parameters or name in twin._buffers):
            rows.append((reference, twin, path, name))


def inherit_copies(model: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let a copy stand for the deep copies of the tensors, too, that it stands for.

    model: as `on_meta` returns it. memo: that of copy.deepcopy, by the tensors' numbers.
    """
    rows = vars(model)[_ORIGINALS].rows
    for tensor, twin, path, name in list(originals(model)):
        copied = memo.get(id(tensor))
        if isinstance(copied, torch.Tensor):
            rows.append((weakref.ref(copied), twin, path, name))


def originals(model: nn.Module) -> Iterator[tuple[torch.Tensor, nn.Module, str, str]]:
    """Return the tensors of the model that `on_meta` copied, as long as they are still there.

    Each comes with the module of the copy that has its twin, the path of that module, and the name
    in it.
    """
    made = vars(model).get(_ORIGINALS)
    for reference, module, path, name in made.rows if made is not None else ():
        tensor = reference()
        if tensor is not None:
            yield tensor, module, path, name
