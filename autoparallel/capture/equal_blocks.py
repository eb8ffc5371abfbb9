"""The groups of equal blocks in a model, of which tracing one tells about all.

Two blocks are the same when every attribute of theirs that a forward could read is the same:
classes, parameters and buffers but for their values, modes, plain attributes, what is shared with
whom. An integer that counts the blocks (`layer_idx`) may differ; the trace watches that the
forward never reads it.
"""

from __future__ import annotations

import array
import collections
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES, named_tensors
from autoparallel.support.module_paths import join_path
from autoparallel.support.object_state import contents_of, own_attributes, random_state
from autoparallel.support.torch_private import expression_of

__all__ = ["Group", "find_groups", "fingerprint", "occurrences_of", "state_of", "token_of"]
__all__ += ["watched_class"]

# In a trace with fewer members there is nothing to win: the first and the last are shown anyway.
_FEWEST = 3
# Containers and objects inside of others that are opened; deeper ones are equal only if they are
# one object.
_DEEPEST = 4
# Hooks that a call of the module runs. Those of state_dict do not matter to a forward.
_HOOKS = tuple(
    sorted(name for name in MODULE_ATTRIBUTES if "hooks" in name and "state_dict" not in name)
)
# Values that are the same if their texts are.
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice)


@dataclass(frozen=True)
class Group:
    """Blocks of a model that compute the same but for the values of their parameters.

    members: (path, block), in the model's order. positions: (path inside the block, attribute) of
    the integers that count the blocks, such as `layer_idx`, in which alone they may differ.
    """

    members: tuple[tuple[str, nn.Module], ...]
    positions: tuple[tuple[str, str], ...]


def find_groups(model: nn.Module, called: bool = False, fewest: int = _FEWEST) -> tuple[Group, ...]:
    """Return the groups of equal blocks among siblings that are numbered from 0.

    model: is searched from the outside in; what is inside of a grouped block is in no other group.
    called: leave out blocks without a forward (lists and dicts of modules), which nobody can call:
    what is in them may be grouped instead. fewest: members of a group, two or more.

    >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    >>> [path for path, _ in find_groups(nn.Sequential(layers))[0].members]
    ['0.0', '0.1', '0.2']
    """
    places: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[id(module)] = places.get(id(module), 0) + 1
    search = _Search(occurrences_of(model), places, called, fewest)
    search.visit(model, "")
    return tuple(search.collected)


def occurrences_of(model: nn.Module) -> dict[int, int]:
    """Return how often each tensor occurs in the model, by id.

    >>> list(occurrences_of(nn.Linear(2, 2)).values())
    [1, 1]
    """
    occurrences: dict[int, int] = {}
    for _, _, _, tensor in named_tensors(model):
        occurrences[id(tensor)] = occurrences.get(id(tensor), 0) + 1
    return occurrences


class _Search:
    """The search down the tree of modules.

    occurrences: how often each tensor occurs in the model, by id. places: the same of modules.
    called, fewest: see find_groups. collected: the groups so far.
    """

    def __init__(
        self, occurrences: dict[int, int], places: dict[int, int], called: bool, fewest: int
    ) -> None:
        self.occurrences, self.places = occurrences, places
        self.called, self.fewest = called, fewest
        self.collected: list[Group] = []
        self.seen: set[int] = set()

    def visit(self, module: nn.Module, path: str) -> None:
        """Add the groups among the children of a module, and inside of the others of them."""
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        children = {name: child for name, child in module._modules.items() if child is not None}
        grouped: set[str] = set()
        if len(children) >= self.fewest and list(children) == [
            str(index) for index in range(len(children))
        ]:
            for group in self.groups(children, path):
                self.collected.append(group)
                grouped.update(member_path.rpartition(".")[2] for member_path, _ in group.members)
        for name, child in children.items():
            if name not in grouped:
                self.visit(child, join_path(path, name))

    def groups(self, children: dict[str, nn.Module], path: str) -> Iterator[Group]:
        """Yield the groups among numbered siblings, children of the module at `path`."""
        positions = _positions(list(children.values()))
        alike: dict[Any, list[tuple[str, nn.Module]]] = {}
        for name, child in children.items():
            # Leaves are quickly traced, and a block in two places is not one of a series.
            if not child._modules or self.places[id(child)] > 1:
                continue
            if self.called and type(child).forward is nn.Module.forward:
                continue
            mark = fingerprint(child, positions, self.occurrences)
            if mark is not None:
                alike.setdefault(mark, []).append((join_path(path, name), child))
        for members in alike.values():
            if len(members) >= self.fewest:
                inside = {name for name, _ in members[0][1].named_modules()}
                yield Group(tuple(members), tuple(p for p in positions if p[0] in inside))


def _positions(blocks: list[nn.Module]) -> tuple[tuple[str, str], ...]:
    """Return (path inside the block, attribute) of the integers that count the blocks.

    blocks: siblings in their order. Such an integer is the block's number, or differs from it by a
    constant; with one block alone every integer would be of that kind, so two must have it.
    """
    offsets: dict[tuple[str, str], set[int]] = {}
    counts: dict[tuple[str, str], int] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and name not in MODULE_ATTRIBUTES:
                    offsets.setdefault((path, name), set()).add(value - index)
                    counts[path, name] = counts.get((path, name), 0) + 1
    return tuple(key for key, values in offsets.items() if len(values) == 1 and counts[key] > 1)


def fingerprint(
    block: nn.Module, positions: tuple[tuple[str, str], ...], occurrences: dict[int, int]
) -> Any:
    """Return a hashable value that is equal for equal blocks.

    positions: attributes that are left out. occurrences: how often each tensor occurs in the model,
    by id: a tensor that others hold too is the same only if it is one tensor. None where a block
    must be traced by itself: it has hooks or a forward of its own, or runs outside of Python.

    >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint(one, (), {}) == fingerprint(two, (), {})
    True
    """
    # Modules inside are the same wherever the block is: attributes refer to them by their paths.
    paths = {id(module): path for path, module in reversed(list(block.named_modules()))}
    counted = set(positions)
    first: dict[int, str] = {}
    inside: dict[int, int] = {}
    for _, _, _, tensor in named_tensors(block):
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
                        first.setdefault(id(tensor), join_path(path, name)),
                        id(tensor) if shared else None,
                        name in module._non_persistent_buffers_set,
                        _marks(tensor),
                    )
                )
        for name, child in module._modules.items():
            if child is None:
                parts.append(("m", name, None))
        for name, value in vars(module).items():
            if name in MODULE_ATTRIBUTES or (path, name) in counted:
                continue
            parts.append((name, token_of(value, paths)))
    return tuple(parts)


def _marks(tensor: torch.Tensor) -> tuple[tuple[str, str], ...]:
    """Return the simple attributes that somebody has set on a tensor."""
    own = vars(tensor).items()
    return tuple((name, repr(value)) for name, value in own if isinstance(value, _SIMPLE))


def token_of(value: Any, paths: dict[int, str], depth: int = 0, above: tuple[int, ...] = ()) -> Any:
    """Return a hashable value that is equal for values that a forward cannot tell apart.

    value: anything that an attribute or an argument may be. paths: of modules and tensors by id,
    which count as the same if their paths are. depth: how many levels of plain objects are opened;
    the others are the same only if they are one object. above: ids of the containers that `value`
    is in, so that one that holds itself comes to an end.

    >>> token_of([1, 2.0], {}) == token_of([1, 2.0], {}), token_of([1], {}) == token_of([True], {})
    (True, False)
    """
    if isinstance(value, _SIMPLE):
        # By text: nan is nan, 0.0 is not -0.0, and 1 is not True.
        return (type(value), repr(value))
    if isinstance(value, _VALUES):
        return (type(value), str(value))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), str(expression_of(value)))
    if id(value) in paths:
        return ("module", paths[id(value)])
    if isinstance(value, torch.Tensor):
        # The version counts in-place writes: the same tensor after one is another value.
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
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value), *[inner(item) for item in value])
    if isinstance(value, (bytearray, array.array)):
        return (type(value), bytes(value))
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return (type(value), str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, (set, frozenset)):
        return (type(value), *sorted(str(inner(item)) for item in value))
    drawn = random_state(value)
    if drawn is not None:
        return (type(value), id(value), drawn[0])
    if depth > 0 and isinstance(value, types.FunctionType):
        # It may count in a variable around it, in a default or in an attribute of its own.
        kept = [value.__defaults__, value.__kwdefaults__]
        # Torch keeps things of its own in attributes of its functions, at their first call.
        if str(value.__module__).partition(".")[0] != "torch":
            kept.append(vars(value))
        deeper = functools.partial(
            token_of, paths=paths, depth=depth - 1, above=(*above, id(value))
        )
        # Not as a tuple: where nothing is opened any more, its identity is another each time.
        inside = [deeper(item) for item in contents_of(value) if not _is_context(item)]
        return (type(value), id(value), *inside, *[deeper(item) for item in kept if item])
    slots = getattr(type(value), "__slots__", None)
    plain = slots or hasattr(value, "__dict__")
    if depth > 0 and plain and not isinstance(value, (type, nn.Module)):
        deeper = functools.partial(
            token_of, paths=paths, depth=depth - 1, above=(*above, id(value))
        )
        inside = [(name, deeper(item)) for name, item in own_attributes(value).items()]
        return (type(value), id(value), *inside)
    return (type(value), id(value))


def _is_context(value: Any) -> bool:
    """Return whether a value is one of torch's contexts, which a decorator of torch's holds: it
    notes at each entry what was set before, as `torch.autocast` does.
    """
    kind = type(value)  # the object itself may answer anything
    return kind.__module__.partition(".")[0] == "torch" and hasattr(kind, "__exit__")


def state_of(block: nn.Module, depth: int = 2) -> Any:
    """Return all that the block holds, to be compared before and after its forward.

    A forward that changes any of it has side effects, and its graph cannot stand for another block.
    The values of tensors are not read, only how often they were written to. depth: how many levels
    of plain objects are opened; with two, a counter in a shared context is seen.

    >>> block = nn.Linear(2, 2)
    >>> before = state_of(block)
    >>> block.calls = 1
    >>> state_of(block) == before
    False
    """
    paths: dict[int, str] = {}
    parts: list[Any] = []
    todo = [block]
    while todo:
        module = todo.pop()
        # By its dictionary: a tracer shows a block without what is inside of it.
        own = vars(module)
        children = own["_modules"]
        parts.append((id(module), module.training, tuple(children)))
        todo += [child for child in children.values() if child is not None]
        for tensors in (own["_parameters"], own["_buffers"]):
            for name, tensor in tensors.items():
                parts.append((name, None if tensor is None else (id(tensor), tensor._version)))
        for name, value in own.items():
            if name not in MODULE_ATTRIBUTES:
                parts.append((name, token_of(value, paths, depth=depth)))
    return parts


def watched_class(
    base: Any, attributes: tuple[str, ...], notice: Callable[[str], None], **methods: Any
) -> type:
    """Return a subclass of `base` that reports whenever one of these attributes is read.

    attributes: names of plain attributes of the instances. notice: is called with the name before
    the value is returned; it may raise. methods: what else the subclass has of its own. It goes by
    the name of `base`, and an instance becomes one by having its `__class__` set.

    >>> class Layer:
    ...     index = 3
    >>> layer, reads = Layer(), []
    >>> layer.index = 5
    >>> layer.__class__ = watched_class(Layer, ("index",), reads.append)
    >>> layer.index, reads
    (5, ['index'])
    """

    def watched(name: str) -> property:
        """Return the property that reports reads of the attribute and lets writes through."""

        def read(instance: Any) -> Any:
            notice(name)
            return vars(instance)[name]

        return property(read, lambda instance, value: vars(instance).__setitem__(name, value))

    body: dict[str, Any] = {name: watched(name) for name in attributes}
    body |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base)(base.__name__, (base,), {**body, **methods})
