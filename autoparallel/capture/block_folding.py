"""Trace one of many equal blocks, and put an opaque call in the place of the others.

While the model is traced, the first and the last block of a group run as ever, between two marks
in the program. The others are hidden: their forward becomes one call of `autoparallel::block`
whose results look like the first one's, and their parameters are not seen by the tracer. The
importer then copies the marked region to each opaque call. Whatever could make the blocks differ
raises Unfoldable, and the caller traces the whole model instead. So does a hidden block that is
entered otherwise than by its call, or not at all: the tracer would take its weights for constants.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoparallel.capture.equal_blocks import Group, state_of, token_of
from autoparallel.support.pytree import Skeleton, flatten, rebuild
from autoparallel.support.torch_private import expression_of, storage_key

__all__ = ["Folding", "Traced", "Unfoldable"]


class Unfoldable(Exception):  # noqa: N818 - not an error: the full trace is the answer
    """Blocks are not provably the same. paths: of blocks that must be traced for themselves."""

    def __init__(self, reason: str, paths: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.reason, self.paths = reason, paths


_library = torch.library.Library("autoparallel", "DEF")
_library.define("block(Tensor[] inputs, int key) -> Tensor[]")
_library.define("enter(Tensor[] inputs, int key) -> ()")
_library.define("leave(Tensor[] outputs, int key) -> ()")
_library.define("again(Tensor input) -> Tensor")
_results: dict[int, tuple[torch.Tensor, ...]] = {}
_keys = itertools.count()


@torch.library.register_fake("autoparallel::block")
def _block(inputs: list[torch.Tensor], key: int) -> list[torch.Tensor]:
    return [
        torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        for like in _results[key]
    ]


@torch.library.register_fake("autoparallel::enter")
def _enter(inputs: list[torch.Tensor], key: int) -> None:
    return None


@torch.library.register_fake("autoparallel::leave")
def _leave(outputs: list[torch.Tensor], key: int) -> None:
    return None


@torch.library.register_fake("autoparallel::again")
def _again(input: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input)


@dataclass(frozen=True)
class Traced:
    """One call of a block that ran. key: of its marks. path: of the block.

    tensors, skeleton: what it was called with. result: skeleton of what it returned, and for each
    tensor in it its index among those made, or ~index of the input that was passed on.
    """

    key: int
    path: str
    tensors: tuple[torch.Tensor, ...]
    constants: Any
    result: Skeleton
    origins: tuple[int, ...]
    made: tuple[torch.Tensor, ...]


class Folding:
    """One attempt to trace a model with some of its blocks hidden.

    apart: paths of blocks that are traced besides the first and the last of their group.
    After the trace, `calls` gives the block's path and the traced call of every opaque call, and
    `twins` the traced calls that must turn out like an earlier one.
    """

    def __init__(self, groups: tuple[Group, ...], apart: frozenset[str]) -> None:
        self.groups, self.apart = groups, apart
        self.running = False
        self.failure: Unfoldable | None = None
        self.siblings: dict[str, tuple[str, ...]] = {}
        self.hidden: dict[str, nn.Module] = {}
        self.traced: dict[int, list[Traced]] = {}
        self.blocks: dict[int, tuple[str, nn.Module]] = {}
        self.calls: dict[int, tuple[str, Traced]] = {}
        self.twins: dict[int, Traced] = {}
        self.marks: dict[int, str] = {}
        self._inside = False

    def fail(self, reason: str, *paths: str) -> Unfoldable:
        """The exception to raise; remembered, as the model may catch it."""
        self.failure = self.failure or Unfoldable(reason, paths)
        return self.failure

    def entered(self, reason: str, path: str) -> Unfoldable:
        """The same where something in a hidden block is reached without calling the block.

        Its equals will be used alike: all of them are traced for themselves.
        """
        return self.fail(reason, *self.siblings.get(self.block_of(path) or path, (path,)))

    def block_of(self, path: str) -> str | None:
        """The hidden block that is at `path`, or has in it what is there."""
        names = path.split(".")
        above = (".".join(names[:end]) for end in range(1, len(names) + 1))
        return next((block for block in above if block in self.hidden), None)

    def require_called(self) -> None:
        """Raises Unfoldable where a hidden block was never called."""
        called = {path for path, _ in self.calls.values()}
        missed = tuple(path for path in self.hidden if path not in called)
        if missed:
            raise self.fail(f"{missed[0]} is never called", *missed)

    def repeats(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the blocks that are one block's copies, for every block that was copied."""
        copies: dict[int, list[str]] = {}
        for path, traced in self.calls.values():
            found = copies.setdefault(traced.key, [traced.path])
            if path not in found:
                found.append(path)
        return tuple(map(tuple, copies.values()))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Blocks behave as described above; in the end all is as it was."""
        changed: list[tuple[nn.Module, type]] = []

        def become(module: nn.Module, made: type) -> None:
            changed.append((module, type(module)))
            module.__class__ = made

        try:
            for number, group in enumerate(self.groups):
                kinds: dict[Any, type] = {}
                last = len(group.members) - 1
                for index, (path, block) in enumerate(group.members):
                    shown = index in (0, last) or path in self.apart
                    watched: dict[str, list[str]] = {}
                    for inner, attribute in group.positions if shown else ():
                        watched.setdefault(inner, []).append(attribute)
                    watched.setdefault("", [])
                    for inner, attributes in watched.items():
                        module = block.get_submodule(inner)
                        mode = "inner" if inner else "shown" if shown else "hidden"
                        key = (type(module), mode, tuple(attributes))
                        if key not in kinds:
                            kinds[key] = self._kind(number, *key)
                        become(module, kinds[key])
                    self.blocks[id(vars(block))] = (path, block)
                    if not shown:
                        self.hidden[path] = block
                concealed = tuple(path for path, _ in group.members if path in self.hidden)
                self.siblings.update(dict.fromkeys(concealed, concealed))
            yield
        finally:
            for module, kind in reversed(changed):
                module.__class__ = kind
            for number in self.calls:
                _results.pop(number, None)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The model's forward runs: what is hidden must not be looked at."""
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def _nothing(self, module: nn.Module) -> dict[str, torch.Tensor]:
        if self.running:
            path, _ = self.blocks[id(vars(module))]
            raise self.entered("the model looks at the parameters of a block", path)
        return {}

    def _children(self, module: nn.Module) -> Any:
        if self.running:
            path, _ = self.blocks[id(vars(module))]
            raise self.entered("the model looks at the modules in a block", path)
        return vars(module)["_modules"]

    def _kind(self, group: int, base: type, mode: str, watched: tuple[str, ...]) -> type:
        """A subclass for a block that runs, one that is hidden, or a module inside of one."""
        folding = self
        body: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}

        def watch(name: str) -> property:
            def read(module: Any) -> Any:
                if folding._inside:
                    raise folding.fail(f"the forward reads {name}, which numbers the blocks")
                return vars(module)[name]

            return property(read, lambda module, value: vars(module).__setitem__(name, value))

        for name in watched:
            body[name] = watch(name)

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            path, block = folding.blocks[id(vars(module))]
            if folding._inside:
                raise folding.fail("a block is called by another block")
            if mode == "hidden":
                return folding._call(group, path, args, kwargs)
            folding._inside = True
            try:
                run = functools.partial(base.forward, module)  # type: ignore[attr-defined]
                return folding._trace(group, path, block, run, args, kwargs)
            finally:
                folding._inside = False

        def hide(name: str) -> Any:
            original = getattr(base, name)

            def method(module: Any, *args: Any, **kwargs: Any) -> Any:
                if folding.running:
                    path, _ = folding.blocks[id(vars(module))]
                    raise folding.entered(f"the model looks into a block by {name}", path)
                return original(module, *args, **kwargs)

            return method

        if mode != "inner":
            body["forward"] = forward
        if mode == "hidden":
            body["named_children"] = hide("named_children")
            body["named_modules"] = _only_itself(folding)
            body["_parameters"] = body["_buffers"] = property(folding._nothing)
            body["_modules"] = property(folding._children)
            body["state_dict"] = lambda module, *args, destination=None, **kwargs: destination
            original: Any = nn.Module.__getattr__

            def look(module: Any, name: str) -> Any:
                inner = ("_parameters", "_buffers", "_modules")
                if folding.running and any(name in vars(module)[kind] for kind in inner):
                    path, _ = folding.blocks[id(vars(module))]
                    raise folding.entered(f"the model reads {name} of a block", path)
                return original(module, name)

            body["__getattr__"] = look
        return type(base)(base.__name__, (base,), body)

    def _trace(
        self, group: int, path: str, block: nn.Module, run: Any, args: Any, kwargs: Any
    ) -> Any:
        """Run a block that is traced, with a mark before and one behind."""
        tensors, skeleton = flatten((args, kwargs))
        constants = _constants(skeleton)
        versions = [tensor._version for tensor in tensors]
        held = (state_of(block), token_of((args, kwargs), {}, depth=2))
        twin = self._find(group, tensors, constants)
        key = next(_keys)
        self.marks[key] = path
        torch.ops.autoparallel.enter(tensors, key)
        result = run(*args, **kwargs)
        now = (state_of(block), token_of((args, kwargs), {}, depth=2))
        if now != held or [tensor._version for tensor in tensors] != versions:
            raise self.fail(f"{path} changes what it is called with or what it holds")
        outputs, shape = flatten(result)
        known = {id(tensor): index for index, tensor in enumerate(tensors)}
        made = tuple(tensor for tensor in outputs if id(tensor) not in known)
        storages = {storage_key(tensor) for tensor in tensors}
        if any(storage_key(tensor) in storages for tensor in made):
            raise self.fail(f"{path} returns a view of what it is called with")
        if _objects(shape) & _objects(skeleton):
            raise self.fail(f"{path} returns an object that it is called with")
        torch.ops.autoparallel.leave(made, key)
        count = itertools.count()
        origins = tuple(
            ~known[id(tensor)] if id(tensor) in known else next(count) for tensor in outputs
        )
        call = Traced(key, path, tuple(tensors), constants, shape, origins, made)
        if twin is None:
            self.traced.setdefault(group, []).append(call)
        else:
            if (str(shape), origins) != (str(twin.result), twin.origins):
                raise self.fail(f"{path} returns something else than {twin.path}")
            self.twins[key] = twin
        return result

    def _call(self, group: int, path: str, args: Any, kwargs: Any) -> Any:
        """An opaque call in the place of a hidden block."""
        tensors, skeleton = flatten((args, kwargs))
        traced = self._find(group, tensors, _constants(skeleton))
        if traced is None:
            raise self.fail(f"{path} is called as no block before it", path)
        key = next(_keys)
        _results[key] = traced.made
        self.calls[key] = (path, traced)
        made = torch.ops.autoparallel.block(tensors, key)
        return rebuild(traced.result, [tensors[~o] if o < 0 else made[o] for o in traced.origins])

    def _find(self, group: int, tensors: list[torch.Tensor], constants: Any) -> Traced | None:
        for call in self.traced.get(group, ()):
            if call.constants == constants and _alike(call.tensors, tensors):
                return call
        return None


def _only_itself(folding: Folding) -> Any:
    def named_modules(
        module: nn.Module,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """The block without what it holds, which is how the tracer does not see it."""
        if folding.running:
            path, _ = folding.blocks[id(vars(module))]
            raise folding.entered("the model walks through its modules", path)
        yield prefix, module

    return named_modules


def _alike(first: tuple[torch.Tensor, ...], second: list[torch.Tensor]) -> bool:
    """Same kinds of tensors, and the same ones given twice. Sizes are compared as expressions."""
    if len(first) != len(second):
        return False
    ids = ([id(tensor) for tensor in first], [id(tensor) for tensor in second])
    return all(
        _looks(a) == _looks(b) and ids[0].index(id(a)) == ids[1].index(id(b))
        for a, b in zip(first, second, strict=True)
    )


def _looks(tensor: torch.Tensor) -> Any:
    sizes = [_expression(size) for size in (*tensor.shape, *tensor.stride())]
    return (type(tensor), tensor.dtype, tensor.device, tensor.layout, sizes)


def _expression(size: Any) -> Any:
    return expression_of(size) if isinstance(size, torch.SymInt) else size


def _constants(skeleton: Skeleton) -> Any:
    """Hashable: the containers and constants of a call, and the modes it happens in."""
    modes = (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
    return (modes, _token(skeleton))


def _token(skeleton: Skeleton) -> Any:
    if skeleton.kind == "constant":
        return token_of(skeleton.sample, {})
    keys = tuple(token_of(key, {}) for key in skeleton.keys)
    return (skeleton.kind, type(skeleton.sample), keys, *map(_token, skeleton.children))


def _objects(skeleton: Skeleton) -> set[int]:
    """The containers that a block could write to, by id."""
    own = set() if skeleton.kind in ("tensor", "constant", "namedtuple") else {id(skeleton.sample)}
    if isinstance(skeleton.sample, tuple):
        own = set()
    return own.union(*map(_objects, skeleton.children))
