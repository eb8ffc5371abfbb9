"""Calls of blocks in a program: the ops that mark them or stand for them, and which are alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoparallel.capture.equal_blocks import state_of, token_of
from autoparallel.support.pytree import Skeleton, flatten
from autoparallel.support.rng_state import python_numbers
from autoparallel.support.torch_private import expression_of, storage_key

__all__ = ["AGAIN", "KEYS", "MARKS", "OPAQUE", "RESULTS", "Traced"]
__all__ += ["constants_of", "effects_of", "same_tensors"]

# The names of the ops below: the marks before and behind a block that is traced, the opaque call in
# the place of one that is not, and the stand-in of an input in a second call of the model.
MARKS = ("autoparallel.enter.default", "autoparallel.leave.default")
OPAQUE = "autoparallel.block.default"
AGAIN = "autoparallel.again.default"

_library = torch.library.Library("autoparallel", "DEF")
_library.define("block(Tensor[] inputs, int key) -> Tensor[]")
_library.define("enter(Tensor[] inputs, int key) -> ()")
_library.define("leave(Tensor[] outputs, int key) -> ()")
_library.define("again(Tensor input) -> Tensor")
# For the key of an opaque call: the tensors that its results look like. An op has no other way to
# know, as torch runs it with tensors and numbers alone.
RESULTS: dict[int, tuple[torch.Tensor, ...]] = {}
# Every mark and every opaque call has another number.
KEYS = itertools.count()


@torch.library.register_fake("autoparallel::block")
def _block(inputs: list[torch.Tensor], key: int) -> list[torch.Tensor]:
    """Return results of an opaque call: new tensors like those of the block that was traced."""
    return [
        torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        for like in RESULTS[key]
    ]


@torch.library.register_fake("autoparallel::enter")
def _enter(inputs: list[torch.Tensor], key: int) -> None:
    """Mark the beginning of a block that is traced, and what it is called with."""


@torch.library.register_fake("autoparallel::leave")
def _leave(outputs: list[torch.Tensor], key: int) -> None:
    """Mark the end of a block that was traced, and what it has computed."""


@torch.library.register_fake("autoparallel::again")
def _again(input: torch.Tensor) -> torch.Tensor:
    """Return the stand-in of an input in a second call of the model (see steady_forward.py)."""
    return torch.empty_like(input)


@dataclass(frozen=True)
class Traced:
    """One call of a block that was traced.

    key: of its marks. path: of the block. tensors: those that it was called with. constants: all
    else that it was called with, and the modes of the call. result: skeleton of what it returned.
    origins: for each tensor that it returned the index among `made`, or ~index of the input that it
    passed on. made: the tensors that it has computed and returned.
    """

    key: int
    path: str
    tensors: tuple[torch.Tensor, ...]
    constants: Any
    result: Skeleton
    origins: tuple[int, ...]
    made: tuple[torch.Tensor, ...]


def same_tensors(first: tuple[torch.Tensor, ...], second: list[torch.Tensor]) -> bool:
    """Return whether two calls are given tensors that a tracer cannot tell apart.

    They must be of the same kinds, with sizes that are the same expressions, and where one call is
    given one tensor twice, so must be the other.
    """
    if len(first) != len(second):
        return False
    ids = ([id(tensor) for tensor in first], [id(tensor) for tensor in second])
    return all(
        _looks(a) == _looks(b) and ids[0].index(id(a)) == ids[1].index(id(b))
        for a, b in zip(first, second, strict=True)
    )


def effects_of(
    block: nn.Module, tensors: Sequence[torch.Tensor], skeleton: Skeleton, arguments: Any
) -> Callable[[Any], str]:
    """Return what says of a call's result, after the call, what it has done that a graph of it
    would not say; empty where the graph says it all.

    block: that is about to be called with `arguments`. tensors, skeleton: of them, see `flatten`.
    """
    # In-place writes raise the versions of inputs; all else is compared before and after.

    def held() -> tuple[Any, ...]:
        """Return what the block holds and is called with."""
        versions = [tensor._version for tensor in tensors]
        return versions, state_of(block), token_of(arguments, {}, depth=2), python_numbers()

    before = held()

    def effect(result: Any) -> str:
        """Return what the call has done."""
        if held() != before:
            return "changes what it is called with or what it holds"
        outputs, shape = flatten(result)
        given = {id(tensor) for tensor in tensors}
        storages = {storage_key(tensor) for tensor in tensors}
        if any(storage_key(one) in storages for one in outputs if id(one) not in given):
            return "returns a view of what it is called with"
        if _containers_of(shape) & _containers_of(skeleton):
            return "returns an object that it is called with"
        return ""

    return effect


def _looks(tensor: torch.Tensor) -> Any:
    """Return all of a tensor but its numbers and its memory."""
    sizes = [_expression(size) for size in (*tensor.shape, *tensor.stride())]
    return (type(tensor), tensor.dtype, tensor.device, tensor.layout, sizes)


def _expression(size: Any) -> Any:
    """Return a size as a number or an expression, comparing which assumes nothing about it."""
    return expression_of(size) if isinstance(size, torch.SymInt) else size


def constants_of(skeleton: Skeleton) -> Any:
    """Return, hashable, the containers and constants of a call, and the modes it happens in."""
    modes = (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
    )
    return (modes, _token(skeleton))


def _token(skeleton: Skeleton) -> Any:
    """Return a hashable value that is equal for equal structures with equal constants in them."""
    if skeleton.kind == "constant":
        return token_of(skeleton.sample, {})
    keys = tuple(token_of(key, {}) for key in skeleton.keys)
    return (skeleton.kind, type(skeleton.sample), keys, *map(_token, skeleton.children))


def _containers_of(skeleton: Skeleton) -> set[int]:
    """Return the ids of the containers in a structure that a block could write to."""
    fixed = skeleton.kind in ("tensor", "constant", "namedtuple")
    itself = set() if fixed or isinstance(skeleton.sample, tuple) else {id(skeleton.sample)}
    return itself.union(*map(_containers_of, skeleton.children))
