"""Trace one of many equal blocks, and put an opaque call in the place of the others.

While the model is traced, the first and the last block of a group run as ever, between two marks
in the program. The others are hidden: their forward becomes one call of `autoparallel::block`
whose results look like the first one's, and their parameters are not seen by the tracer. The
importer then copies the marked region to each opaque call. Where a hidden block is called as none
before it, with other sizes or strides, the first block runs once more with what it is called with:
that is copied alone. Whatever could make the blocks differ raises Unfoldable, and the caller traces
the whole model instead. So does a hidden block that is entered otherwise than by its call, or not
at all: the tracer would take its weights for constants.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from autoparallel.capture.block_calls import (
    KEYS,
    RESULTS,
    Traced,
    constants_of,
    effects_of,
    same_tensors,
)
from autoparallel.capture.equal_blocks import Group, state_of, watched_class
from autoparallel.support.pytree import flatten, rebuild

__all__ = ["Folding", "Unfoldable"]


class Unfoldable(Exception):  # noqa: N818 - not an error: the full trace is the answer
    """Blocks are not provably the same, and what they were folded for must be traced again.

    reason: for the log. paths: of blocks that must be traced for themselves in the next attempt;
    without any, the model is traced without folding. branches: whether a block asks for values.
    """

    def __init__(self, reason: str, paths: tuple[str, ...] = (), branches: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.paths, self.branches = reason, paths, branches


class Folding:
    """One attempt to trace a model with some of its blocks hidden.

    groups: of equal blocks; none, and nothing is hidden. apart: paths of blocks that are traced
    besides the first and the last of their group.

    hidden: the hidden blocks, by path. siblings: for each hidden path those of its group. blocks:
    (path, block) by the id of the block's dict, by which a block is known whatever its class.
    traced: the traced calls of each group, by the group's number. After the trace, `calls` gives
    the block's path and the traced call for the key of every opaque call, `marks` the block's path
    for the key of every mark, and `twins` the traced calls that must turn out like an earlier one;
    `patterns` has the keys of marks around what is only copied.
    failure: the first reason to give up. running: whether the model's forward is at work.

    Example: `with folding.installed(), folding.forward(): model(x)`, inside of torch.export.
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
        self.patterns: dict[int, None] = {}
        self._inside = False

    def fail(self, reason: str, *paths: str) -> Unfoldable:
        """Return the exception to raise; it is remembered, as the model may catch it.

        reason: for the log. paths: see Unfoldable. The first failure is the one that counts.
        """
        self.failure = self.failure or Unfoldable(reason, paths)
        return self.failure

    def refuse_branch(self) -> None:
        """Raise Unfoldable where a block of several takes a way that depends on values.

        Blocks that are hidden take ways of their own, of which nobody would know.
        """
        if self._inside:
            self.failure = self.failure or Unfoldable("a block branches on values", branches=True)
            raise self.failure

    def entered(self, reason: str, path: str) -> Unfoldable:
        """Return the exception for something in a hidden block that is reached past its call.

        path: of what is reached. The block's equals will be used alike: all of them are traced for
        themselves in the next attempt.
        """
        return self.fail(reason, *self.siblings.get(self.block_of(path) or path, (path,)))

    def block_of(self, path: str) -> str | None:
        """Return the path of the hidden block that is at `path` or around it; None without one."""
        names = path.split(".")
        above = (".".join(names[:end]) for end in range(1, len(names) + 1))
        return next((block for block in above if block in self.hidden), None)

    def require_called(self) -> None:
        """Raise Unfoldable where a hidden block was never called: how it is entered is unknown."""
        called = {path for path, _ in self.calls.values()}
        missed = tuple(path for path in self.hidden if path not in called)
        if missed:
            raise self.fail(f"{missed[0]} is never called", *missed)

    def state(self) -> Any:
        """Return all that the hidden blocks hold, to be compared before and after a forward.

        Blocks are proven equal before the forward. What it changes in one that is hidden, by other
        ways than the block itself, is in no trace, and may make the next call another one. Objects
        are not opened: equal blocks hold the same ones, which are seen in those that are traced.
        """
        return [state_of(block, depth=0) for block in self.hidden.values()]

    def repeats(self) -> tuple[tuple[str, ...], ...]:
        """Return, for every block that was copied, its path and those of its copies; for what was
        traced to be copied alone, those of several copies.
        """
        copies: dict[int, list[str]] = {}
        for path, traced in self.calls.values():
            itself = [] if traced.key in self.patterns else [traced.path]
            paths = copies.setdefault(traced.key, itself)
            if path not in paths:
                paths.append(path)
        return tuple(tuple(paths) for paths in copies.values() if len(paths) > 1)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Have blocks behave, inside of this context, as the head of this file says.

        Blocks become instances of subclasses of their classes, so that nothing else of them
        changes; in the end they are what they were.
        """
        changed: list[tuple[nn.Module, type]] = []

        def become(module: nn.Module, kind: type) -> None:
            """Change the module's class."""
            changed.append((module, type(module)))
            module.__class__ = kind

        try:
            for number, group in enumerate(self.groups):
                kinds: dict[Any, type] = {}  # one subclass for equal modules of a group
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
                RESULTS.pop(number, None)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Have whoever looks into a hidden block, inside of this context, raise Unfoldable.

        It is installed around the model's forward alone: the tracer looks around it as well.
        """
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def _nothing(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return no parameters and no buffers, for a hidden block. Raises Unfoldable."""
        if self.running:
            path, _ = self.blocks[id(vars(module))]
            raise self.entered("the model looks at the parameters of a block", path)
        return {}

    def _children(self, module: nn.Module) -> Any:
        """Return the modules in a hidden block, to all but the model. Raises Unfoldable."""
        if self.running:
            path, _ = self.blocks[id(vars(module))]
            raise self.entered("the model looks at the modules in a block", path)
        return vars(module)["_modules"]

    def _kind(self, group: int, base: type, mode: str, watched: tuple[str, ...]) -> type:
        """Return the subclass that a module becomes an instance of.

        group: number of the block's group. base: the module's class. mode: "shown" for a block that
        is traced, "hidden", or "inner" for a module inside of a shown one. watched: attributes that
        number the blocks, which the forward must not read.
        """
        folding = self
        body: dict[str, Any] = {}

        def notice(name: str) -> None:
            """Raise Unfoldable where a block's forward reads such an attribute."""
            if folding._inside:
                raise folding.fail(f"the forward reads {name}, which numbers the blocks")

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            """Run a block that is traced, or record an opaque call for one that is hidden."""
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
            """Return a method that refuses while the model runs, and else does as ever."""
            original = getattr(base, name)

            def method(module: Any, *args: Any, **kwargs: Any) -> Any:
                """Do as ever, unless the model runs."""
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
            # Export compares the state before and after the trace: hidden tensors are in neither.
            body["state_dict"] = lambda module, *args, destination=None, **kwargs: destination
            original: Any = nn.Module.__getattr__

            def look(module: Any, name: str) -> Any:
                """Refuse to find a tensor or module of a hidden block."""
                inner = ("_parameters", "_buffers", "_modules")
                if folding.running and any(name in vars(module)[kind] for kind in inner):
                    path, _ = folding.blocks[id(vars(module))]
                    raise folding.entered(f"the model reads {name} of a block", path)
                return original(module, name)

            body["__getattr__"] = look
        return watched_class(base, watched, notice, **body)

    def _trace(
        self, group: int, path: str, block: nn.Module, run: Any, args: Any, kwargs: Any
    ) -> Any:
        """Run a block that is traced, with a mark before and one behind, and return its result.

        group: number of the block's group. run: its forward. Raises Unfoldable for a block whose
        call does more than a graph of it would say.
        """
        tensors, skeleton = flatten((args, kwargs))
        effect = effects_of(block, tensors, skeleton, (args, kwargs))
        constants = constants_of(skeleton)
        twin = self._find(group, tensors, constants)
        key = next(KEYS)
        self.marks[key] = path
        torch.ops.autoparallel.enter(tensors, key)
        result = run(*args, **kwargs)
        done = effect(result)
        if done:
            raise self.fail(f"{path} {done}")
        outputs, shape = flatten(result)
        known = {id(tensor): index for index, tensor in enumerate(tensors)}
        made = tuple(tensor for tensor in outputs if id(tensor) not in known)
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
        """Record an opaque call in the place of a hidden block, and return results for it.

        group: number of the block's group.
        """
        tensors, skeleton = flatten((args, kwargs))
        traced = self._find(group, tensors, constants_of(skeleton))
        traced = traced or self._pattern(group, args, kwargs)
        key = next(KEYS)
        RESULTS[key] = traced.made
        self.calls[key] = (path, traced)
        results = torch.ops.autoparallel.block(tensors, key)
        leaves = [tensors[~index] if index < 0 else results[index] for index in traced.origins]
        return rebuild(traced.result, leaves)

    def _pattern(self, group: int, args: Any, kwargs: Any) -> Traced:
        """Trace the first block of a group with what a hidden one is called with, as none before
        it: what becomes of that is copied to the hidden one, and is not in the graph itself.
        """
        path, block = self.groups[group].members[0]
        plain: Any = type(block).__base__
        self._inside = True
        try:
            run = functools.partial(plain.forward, block)
            self._trace(group, path, block, run, args, kwargs)
        finally:
            self._inside = False
        traced = self.traced[group][-1]
        self.patterns[traced.key] = None
        return traced

    def _find(self, group: int, tensors: list[torch.Tensor], constants: Any) -> Traced | None:
        """Return the traced call of the group that was made alike, None where there is none."""
        for call in self.traced.get(group, ()):
            if call.constants == constants and same_tensors(call.tensors, tensors):
                return call
        return None


def _only_itself(folding: Folding) -> Any:
    """Return the `named_modules` of hidden blocks."""

    def named_modules(
        module: nn.Module,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the block without the modules in it, so that the tracer does not see those."""
        if folding.running:
            path, _ = folding.blocks[id(vars(module))]
            raise folding.entered("the model walks through its modules", path)
        yield prefix, module

    return named_modules
