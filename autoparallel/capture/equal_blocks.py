"""Which of a model's blocks are the same, so that tracing one of them tells about all.

Two blocks are the same when every attribute of theirs that a forward could read is the same:
classes, parameters and buffers but for their values, modes, plain attributes, what is shared with
whom. An integer that counts the blocks (`layer_idx`) may differ; the trace watches that the
forward never reads it.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoparallel.support.torch_private import expression_of

__all__ = ["Group", "find_groups", "state_of", "token_of"]

# With fewer members there is nothing to win: the first and the last are traced anyway.
_FEWEST = 3
_DEEPEST = 4
_EMPTY = nn.Module()
_INTERNAL = frozenset(vars(_EMPTY))
_HOOKS = tuple(name for name in _INTERNAL if "hooks" in name and "state_dict" not in name)
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice)


@dataclass(frozen=True)
class Group:
    """members: (path, block) of equal blocks, in the model's order.

    positions: (path inside the block, attribute) of the integers that count the blocks.
    """

    members: tuple[tuple[str, nn.Module], ...]
    positions: tuple[tuple[str, str], ...]


def find_groups(model: nn.Module, called: bool = False) -> tuple[Group, ...]:
    """Equal blocks among siblings that are numbered from 0, the outermost ones only.

    called: leave out blocks without a forward (lists and dicts of modules), which nobody can call:
    what is in them may be grouped instead.
    """
    occurrences: dict[int, int] = {}
    for _, tensor in _tensors(model):
        occurrences[id(tensor)] = occurrences.get(id(tensor), 0) + 1
    homes: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        homes[id(module)] = homes.get(id(module), 0) + 1
    search = _Search(occurrences, homes, called)
    search.visit(model, "")
    return tuple(search.found)


class _Search:
    """The search down the tree of modules. called: see find_groups.

    occurrences: how often each tensor occurs in the model, by id. homes: the same of modules.
    """

    def __init__(self, occurrences: dict[int, int], homes: dict[int, int], called: bool) -> None:
        self.occurrences, self.homes, self.called = occurrences, homes, called
        self.found: list[Group] = []
        self.seen: set[int] = set()

    def visit(self, module: nn.Module, path: str) -> None:
        """Add the groups among the children of a module, and inside of the others of them."""
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        children = {name: child for name, child in module._modules.items() if child is not None}
        grouped: set[str] = set()
        if len(children) >= _FEWEST and list(children) == [
            str(index) for index in range(len(children))
        ]:
            for group in self.groups(children, path):
                self.found.append(group)
                grouped.update(member_path.rpartition(".")[2] for member_path, _ in group.members)
        for name, child in children.items():
            if name not in grouped:
                self.visit(child, _join(path, name))

    def groups(self, children: dict[str, nn.Module], path: str) -> Iterator[Group]:
        """The groups among numbered siblings."""
        positions = _positions(list(children.values()))
        alike: dict[Any, list[tuple[str, nn.Module]]] = {}
        for name, child in children.items():
            if not child._modules or self.homes[id(child)] > 1:
                continue
            if self.called and type(child).forward is nn.Module.forward:
                continue
            mark = _fingerprint(child, positions, self.occurrences)
            if mark is not None:
                alike.setdefault(mark, []).append((_join(path, name), child))
        for members in alike.values():
            if len(members) >= _FEWEST:
                inside = {name for name, _ in members[0][1].named_modules()}
                yield Group(tuple(members), tuple(p for p in positions if p[0] in inside))


def _positions(blocks: list[nn.Module]) -> tuple[tuple[str, str], ...]:
    """The integers that are the block's number, or differ from it by a constant."""
    offsets: dict[tuple[str, str], set[int]] = {}
    counts: dict[tuple[str, str], int] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and name not in _INTERNAL:
                    offsets.setdefault((path, name), set()).add(value - index)
                    counts[path, name] = counts.get((path, name), 0) + 1
    return tuple(key for key, found in offsets.items() if len(found) == 1 and counts[key] > 1)


def _fingerprint(
    block: nn.Module, positions: tuple[tuple[str, str], ...], occurrences: dict[int, int]
) -> Any:
    """Hashable, equal for equal blocks. None where a block must be traced by itself."""
    paths = {id(module): path for path, module in reversed(list(block.named_modules()))}
    counted = set(positions)
    first: dict[int, str] = {}
    inside: dict[int, int] = {}
    for _, tensor in _tensors(block):
        inside[id(tensor)] = inside.get(id(tensor), 0) + 1
    parts: list[Any] = []
    for path, module in block.named_modules(remove_duplicate=False):
        if any(vars(module).get(name) for name in _HOOKS) or "forward" in vars(module):
            return None
        if isinstance(module, torch.jit.ScriptModule):
            return None
        parts.append((path, paths[id(module)], type(module), module.training))
        for kind, tensors in (("p", module._parameters), ("b", module._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    parts.append((kind, name, None))
                    continue
                shared = occurrences.get(id(tensor), 0) > inside[id(tensor)]
                parts.append(
                    (
                        kind,
                        name,
                        type(tensor),
                        tuple(tensor.shape),
                        tensor.stride(),
                        tensor.dtype,
                        tensor.device,
                        tensor.requires_grad,
                        first.setdefault(id(tensor), _join(path, name)),
                        id(tensor) if shared else None,
                        name in module._non_persistent_buffers_set,
                    )
                )
        for name, child in module._modules.items():
            if child is None:
                parts.append(("m", name, None))
        for name, value in vars(module).items():
            if name in _INTERNAL or (path, name) in counted:
                continue
            parts.append((name, token_of(value, paths)))
    return tuple(parts)


def token_of(value: Any, paths: dict[int, str], depth: int = 0, above: tuple[int, ...] = ()) -> Any:
    """Hashable; equal for values that a forward cannot tell apart.

    paths: of modules and tensors by id, which are the same wherever they are. depth: how many
    levels of plain objects are opened; the others are the same only if they are one object.
    """
    if isinstance(value, _SIMPLE):
        return (type(value), repr(value))
    if isinstance(value, _VALUES):
        return (type(value), str(value))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), str(expression_of(value)))
    if id(value) in paths:
        return ("module", paths[id(value)])
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value), value._version)
    if len(above) > _DEEPEST or id(value) in above:
        return ("deep", type(value), id(value))
    inner = functools.partial(token_of, paths=paths, depth=depth, above=(*above, id(value)))
    if isinstance(value, weakref.ref):
        return (type(value), inner(value()))
    if isinstance(value, types.MethodType):
        return ("method", id(value.__func__), inner(value.__self__))
    if isinstance(value, functools.partial):
        return ("partial", inner(value.func), inner(value.args), inner(value.keywords))
    if isinstance(value, dict):
        return (type(value), *[(inner(key), inner(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), *[inner(item) for item in value])
    if isinstance(value, (set, frozenset)):
        return (type(value), *sorted(str(inner(item)) for item in value))
    if depth > 0 and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        deeper = functools.partial(
            token_of, paths=paths, depth=depth - 1, above=(*above, id(value))
        )
        inside = [(name, deeper(item)) for name, item in vars(value).items()]
        return (type(value), id(value), *inside)
    return (type(value), id(value))


def state_of(block: nn.Module) -> Any:
    """What the block holds besides its parameters' values: a forward that changes it has effects.

    Objects are opened two levels deep, so that a counter in a shared context is seen.
    """
    paths: dict[int, str] = {}
    parts: list[Any] = []
    for path, module in block.named_modules(remove_duplicate=False):
        parts.append((path, id(module), module.training, tuple(module._modules)))
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                parts.append((name, None if tensor is None else (id(tensor), tensor._version)))
        for name, value in vars(module).items():
            if name not in _INTERNAL:
                parts.append((name, token_of(value, paths, depth=2)))
    return parts


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
