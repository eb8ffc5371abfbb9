"""Guards: a program is right for a call while all that its trace read in Python is what it was.

This is asked at every call. All values are therefore compared by identity with those of the last
call in which they were right (see `SeenPlaces`), and only what is another object is looked at.
"""

from __future__ import annotations

import array
import collections
import contextlib
import functools
import operator
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.graph.attribute_read import (
    ABSENT,
    LEFT,
    SIMPLE,
    UNKNOWN,
    Answer,
    AttributeRead,
    Contents,
    Where,
    name_of,
)
from autoparallel.graph.attribute_write import AttributeWrite
from autoparallel.graph.read_holders import (
    ClassParts,
    FunctionParts,
    GivenNames,
    Held,
    Items,
    Methods,
    Namespace,
    ObjectKinds,
)
from autoparallel.parallel.frozen_values import (
    ALL,
    DEEPEST,
    equal,
    frozen,
    is_array,
    shows_bytes,
)
from autoparallel.parallel.guarded_contents import (
    Attributes,
    Functions,
    HeldTensor,
    Inside,
    LeftValues,
    Names,
    attributes_now,
    dictionary_of,
)
from autoparallel.parallel.shown_parameters import held_by
from autoparallel.support.bare_values import plain_contents
from autoparallel.support.memory_writes import memory_of
from autoparallel.support.object_state import is_bound, is_of_library, own_attributes
from autoparallel.support.seen_places import SeenPlaces

__all__ = ["Guards"]

_SAME = operator.is_
# Objects that hold what can change, but for lists, dicts and objects of classes in Python, which
# are looked into by themselves.
_CHANGING = (
    *(collections.deque, set, bytearray, array.array, types.SimpleNamespace),
    *(functools.partial, types.MethodType, weakref.ref, types.MappingProxyType),
)
# Holders that list as much as they did, of which the length need not be asked.
_OF_ONE_LENGTH = (ClassParts, FunctionParts, GivenNames, Functions, Methods, ObjectKinds)


class Guards:
    """The values of all that a program's trace has read, in one module of the running model.

    module: the one that the program is of. reads: what was read. Other values than the trace had,
    where those are known, and places that the module does not have, make it stale from the start.
    writes: the places that the program sets itself. left: what programs have left in attributes of
    modules; it is as right there as what was there before. constants: tensors that the program
    reads themselves. Others in containers are guarded: a copy of the module has its own.

    >>> layer = nn.Dropout(0.5)
    >>> guards = Guards(layer, [AttributeRead("", (), "p", Where.INSTANCE, 0.5)])
    >>> before = guards.hold()
    >>> layer.p = 0.1
    >>> before, guards.hold()
    (True, False)
    """

    def __init__(
        self,
        module: nn.Module,
        reads: Iterable[AttributeRead],
        writes: Iterable[AttributeWrite] = (),
        left: LeftValues | None = None,
        constants: Iterable[torch.Tensor] = (),
    ) -> None:
        self.constants = frozenset(map(memory_of, constants))
        self.left = LeftValues() if left is None else left
        self.set: list[tuple[Mapping[Any, Any], str, Any]] = []
        # Of each value: the mapping and the key where it is, the one that was seen last, and all
        # that are right.
        self.places: list[tuple[Mapping[Any, Any], Any]] = []
        self.seen: list[Any] = []
        self.right: list[tuple[Any, ...]] = []
        self.lists: list[tuple[Any, list[Any]]] = []
        self.asked: list[tuple[Any, str, Any]] = []
        self.kept: list[tuple[Any, Any]] = []
        self.held: set[int] = set()  # the identities of what is kept, or listed in its place
        self.stale = False
        self.own = frozenset(_owned(module, writes))
        # By owner and name, whether it has the attribute: classes are those of many objects.
        self.known: dict[tuple[int, str], bool] = {}
        reached: list[tuple[Any, AttributeRead]] = []
        for read in reads:
            try:
                reached.append((_reached(module, read), read))
            except (AttributeError, KeyError, IndexError, TypeError):
                self.stale = True
        # Objects whose attributes were seen to be read are guarded by these.
        self.opened = {id(item) for item, read in reached if read.route}
        for item, read in reached:
            self.add(item, read)
        self.sort()

    def sort(self) -> None:
        """Put apart the places in dictionaries, and what is asked by fewer steps."""
        self.dictionaries, self.mappings = SeenPlaces(ABSENT), []
        self.accepted: list[tuple[Any, ...]] = []
        for (mapping, name), seen, right in zip(self.places, self.seen, self.right, strict=True):
            if not isinstance(mapping, dict):
                self.mappings.append((mapping, name, seen, right))
            elif len(right) == 1 and right[0] is ABSENT:
                self.dictionaries.add_absent(mapping, name)
            else:
                self.dictionaries.add(mapping, name, seen)
                self.accepted.append(right)
        self.fixed = [each for each in self.lists if isinstance(each[0], _OF_ONE_LENGTH)]
        self.lists = [each for each in self.lists if not isinstance(each[0], _OF_ONE_LENGTH)]

    def add(self, item: Any, read: AttributeRead) -> None:
        """Guard one attribute of an object."""
        if read.where is Where.ASKED:
            value = getattr(item, read.name, ABSENT)
            self.asked.append((item, read.name, self.expected(value, read)))
            self.contents(value, 0)
            return
        if read.where is Where.NAMES:
            names = Names(vars(item))
            self.lists.append((names, list(names)))
            return
        if read.where is Where.NAMED:
            self.named(item if isinstance(item, Mapping) else attributes_now(item), read.name)
            # A name is followed by reads of its own; what a function returns is known by nothing.
            if isinstance(item, Answer):
                self.returned(item.get(read.name, ABSENT))
            return
        if read.where is Where.LISTED:
            self.lists.append((item, item.before))
            self.stale = self.stale or not equal(list(item), item.before)
            for value in item.before if isinstance(item, (FunctionParts, Items)) else ():
                self.contents(value, 1)
            return
        if read.where is Where.ENCLOSED:
            self.place(item, read.name, item.get(read.name, ABSENT), read)
            return
        # Objects of classes with slots, and builtin functions, have no attributes of their own.
        own = attributes_now(item)
        if read.where in (Where.INSTANCE, Where.GLOBAL):
            if not isinstance(own, Mapping):
                self.stale = True  # it is another object now, or one that shows something else
            else:
                self.place(own, read.name, own.get(read.name, ABSENT), read)
            return
        if own is not None:
            self.absent(own, read.name, id(item))
        mro = type(item).__mro__
        if own is not None and "_autoparallel" in own:
            mro = (mro[0], *mro[2:])  # the mixin of this project stands behind the first
        for kind in mro:
            # Many objects are of one class.
            if self.known.get((id(kind), read.name)):
                return
            if read.name in vars(kind):
                self.known[id(kind), read.name] = True
                self.place(vars(kind), read.name, vars(kind)[read.name], read)
                return
            self.absent(vars(kind), read.name, id(kind))
        self.stale = True

    def absent(self, mapping: Mapping[Any, Any], name: str, owner: int) -> None:
        """Guard that an object, or a class, has no attribute of this name. owner: its id."""
        key = (owner, name)
        if key not in self.known:
            self.known[key] = False
            self.watch(mapping, name, ABSENT, (ABSENT,))
            self.stale = self.stale or name in mapping

    def watch(self, mapping: Mapping[Any, Any], name: Any, seen: Any, right: Any) -> None:
        """Note a place with the value that was seen there, and those that are right."""
        self.places.append((dictionary_of(mapping), name))
        self.seen.append(seen)
        self.right.append(right)

    def named(self, mapping: Mapping[Any, Any], name: str) -> None:
        """Guard that a name refers to the object that it refers to now, or to none."""
        key = (id(mapping), name)
        if key not in self.known:
            value = mapping.get(name, ABSENT)
            self.known[key] = value is not ABSENT
            self.watch(mapping, name, value, (value,))

    def returned(self, value: Any) -> None:
        """Guard what is in an object that a function has returned, and returns again."""
        if not isinstance(value, (*SIMPLE, torch.Tensor, type, nn.Module, types.ModuleType)):
            self.kept.append((value, self.frozen(value)))

    def place(self, mapping: Mapping[Any, Any], name: Any, value: Any, read: AttributeRead) -> None:
        """Guard the value at a key of a mapping."""
        expected = self.expected(value, read)
        if LEFT in read.others:
            self.set.append((mapping, name, expected))
            self.left.follow(mapping, name)
            return
        self.watch(mapping, name, value, (expected, *read.others))
        if not any(equal(value, one) for one in self.right[-1]):
            self.stale = True
            self.seen[-1] = ABSENT
        self.contents(value, 0)
        plain = not isinstance(value, (type, nn.Module, torch.Tensor, types.FunctionType))
        seen = read.route or id(value) in self.opened
        if isinstance(mapping, Answer):
            self.returned(value)
        # Tensors may be read as numbers, and objects by their dictionaries.
        if is_of_library(value):
            self.keep(value)
        elif read.where is Where.INSTANCE and not seen:
            tensor = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
            slots = getattr(type(value), "__slots__", None)
            plain = plain and value is not ABSENT
            if tensor or (plain and (slots or hasattr(value, "__dict__")) and not callable(value)):
                self.keep(value)

    def keep(self, value: Any) -> None:
        """Guard what an object holds, which many modules may refer to, as to a configuration."""
        if id(value) in self.held:
            return
        self.held.add(id(value))
        if Attributes.fit(value) and not any(owner == id(value) for owner, _ in self.own):
            attributes = Attributes(value)
            self.lists.append((attributes, list(attributes)))
            for item in vars(value).values():
                self.contents(item, 1)
        else:
            self.kept.append((value, self.frozen(value)))

    def expected(self, value: Any, read: AttributeRead) -> Any:
        """Return the value that is right: that of the trace, or the present one if it is none of
        those that can be told apart by what they are."""
        if read.value is UNKNOWN:
            return value
        return read.value.value if isinstance(read.value, Contents) else read.value

    def contents(self, value: Any, depth: int) -> None:
        """Guard what is in a list, a dict or a tuple, and in other objects that can change."""
        if (id(value), ALL) in self.own:
            return
        if depth > 0 and type(value) is torch.Tensor and memory_of(value) not in self.constants:
            self.keep(value)
        enclosing = isinstance(value, types.FunctionType) and value.__closure__
        partly = any(owner == id(value) for owner, _ in self.own)
        changing = isinstance(value, _CHANGING) or is_array(value) or shows_bytes(value)
        changing = changing or is_bound(value)
        # It does not change itself, and may hold what does.
        if isinstance(value, frozenset):
            changing = not all(isinstance(item, SIMPLE) for item in value)
        functions = None if partly or not enclosing else Functions.around(value)
        if functions is not None:
            self.lists.append((functions, list(functions)))
            return
        if changing or enclosing or partly:
            self.keep(value)
            return
        if depth > DEEPEST or not isinstance(value, (list, tuple, dict)):
            return
        if type(value) is list:  # it lists its items itself
            self.lists.append((value, list(value)))
        elif not isinstance(value, tuple):
            inside = Inside(value)
            self.lists.append((inside, list(inside)))
        for item in plain_contents(value):
            self.contents(item, depth + 1)

    def frozen(self, value: Any) -> Any:
        """Return what the forward could see of an object now, and does not set itself."""
        return frozen(value, own=self.own)

    def doubtful(self) -> str:
        """Return the names of the attributes that are not what they were, for a message."""
        pairs = zip(self.places, self.right, strict=True)
        names = [
            str(name)
            for (mapping, name), right in pairs
            if not any(equal(mapping.get(name, ABSENT), one) for one in right)
        ]
        names += [
            name for item, name, one in self.asked if not equal(getattr(item, name, ABSENT), one)
        ]
        names += [
            name
            for own, name, right in self.set
            if not equal(value := own.get(name, ABSENT), right)
            and not self.left.are(own, name, value)
        ]
        return ", ".join(dict.fromkeys(names)) or "its attributes"

    def hold(self) -> bool:
        """Return whether all values are those that the program is right for."""
        if self.stale:
            return False
        if not self.dictionaries.same() and not self.others():
            return False
        for mapping, key, seen, right in self.mappings:
            value = mapping.get(key, ABSENT)
            if value is not seen and not any(equal(value, one) for one in right):
                return False
        for holder, parts in self.fixed:
            if not all(map(_SAME, holder, parts)) and not equal(list(holder), parts):
                return False
        for container, contents in self.lists:
            same = len(container) == len(contents) and all(map(_SAME, container, contents))
            if not same and not equal(list(container), contents):
                return False
        for own, name, right in self.set:
            value = own.get(name, ABSENT)
            as_before = value is right or self.left.are(own, name, value)
            if not as_before and not equal(value, right):
                return False
        if any(not equal(self.frozen(value), before) for value, before in self.kept):
            return False
        return all(equal(getattr(item, name, ABSENT), one) for item, name, one in self.asked)

    def others(self) -> bool:
        """Return whether values that are other objects than before are right as well."""
        if not self.dictionaries.absent():
            return False
        for index, value in enumerate(self.dictionaries.now()):
            if value is not self.dictionaries.seen[index]:
                if not any(equal(value, one) for one in self.accepted[index]):
                    return False
                # Another container with equal contents must be watched in its turn.
                if not isinstance(value, (list, dict)):
                    self.dictionaries.see(index, value)
        return True


def _reached(module: nn.Module, read: AttributeRead) -> Any:
    """Return the object of which an attribute was read, as it is in the module now."""
    item: Any = module.get_submodule(read.path)
    for kind, step in read.route:
        if kind in ("global", "cell"):
            item = sys.modules[step] if kind == "global" else step
            item = item.mapping if isinstance(item, Namespace) else item
            item = item.value if isinstance(item, Held) else item
            continue
        if kind == "class":
            kinds = (item if isinstance(item, type) else type(item)).__mro__
            item = next(base for base in reversed(kinds) if name_of(base) == step)
        elif step in ("_parameters", "_buffers") and kind == "attribute":
            item = HeldTensor(held_by(item) if step == "_parameters" else vars(item)[step])
        else:
            own = vars if isinstance(item, type) else own_attributes
            item = own(item)[step] if kind == "attribute" else item[step]
    return item


def _owned(module: nn.Module, writes: Iterable[AttributeWrite]) -> Iterator[Any]:
    """Yield the places that a program sets: the identity of a container, and the step into it."""
    for write in writes:
        with contextlib.suppress(AttributeError, KeyError, IndexError, TypeError):
            owner, (kind, key) = write.owner(module), write.route[-1]
            yield id(owner), (ALL if kind == "content" else (kind, key))
