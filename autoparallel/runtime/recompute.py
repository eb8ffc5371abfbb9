"""What is not kept for the backward pass, but made again: converted copies, and whole blocks.

A copy that a conversion made is known by its memory. Wherever autograd would keep that memory, as a
whole or as a view, it keeps where the copy came from instead.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from autoparallel.placement import Movement, Placement, local_size, movement
from autoparallel.runtime.collectives import convert, move
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import drawing_from, generator
from autoparallel.support.torch_private import (
    StorageWeakRef,
    saved_tensors_hooks_are_set,
    storage_key,
)

__all__ = ["convert_again", "dropping", "recomputed"]


class _View:
    """A tensor that lies in the memory of a copy."""

    def __init__(self, copy: _Copy, view: torch.Tensor) -> None:
        self.copy = copy
        self.dtype, self.sizes, self.strides = view.dtype, view.size(), view.stride()
        self.offset, self.conjugate = view.storage_offset(), view.is_conj()

    def of(self, made: torch.Tensor) -> torch.Tensor:
        """The same view of a copy that was made again."""
        view = torch.empty(0, dtype=self.dtype, device=made.device)
        view.set_(made.untyped_storage(), self.offset, self.sizes, self.strides)
        return view.conj() if self.conjugate else view


class _Copy:
    """How a copy is made again. wanted: by how many places of the backward pass."""

    def __init__(
        self,
        source: torch.Tensor | _View,
        group: Group,
        placements: tuple[Placement, Placement],
        size: int,
    ) -> None:
        self.source, self.group, self.placements, self.size = source, group, placements, size
        self.version = source._version if isinstance(source, torch.Tensor) else 0
        self.wanted = 0
        self.made: torch.Tensor | None = None

    def again(self) -> torch.Tensor:
        """The copy. Raises RuntimeError where what it came from has been written to since."""
        source = self.source
        if isinstance(source, _View):
            source = source.of(source.copy.again())
        else:
            _require_version(source, self.version)
        with torch.no_grad():
            made = move(source, self.group, *self.placements, self.size)
            # Where the source would do, the first copy was one all the same: views of it are places
            # in memory of its own.
            return made.clone() if _same_memory(made, source) else made

    def taken(self) -> torch.Tensor:
        """The copy for one of the places that want it; kept until the last of them has had it."""
        made = self.again() if self.made is None else self.made
        self.wanted -= 1
        self.made = made if self.wanted > 0 else None
        return made


def _same_memory(one: torch.Tensor, two: torch.Tensor) -> bool:
    return storage_key(one) == storage_key(two)


def _require_version(tensor: torch.Tensor, version: int) -> None:
    """What autograd requires of what it keeps itself."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {tuple(tensor.shape)} is at version {tensor._version}; expected version "
            f"{version} instead"
        )


class _Copies:
    """The copies of one pass, by their memory, which is not kept alive."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[StorageWeakRef, int, _Copy]] = {}

    def add(
        self,
        made: torch.Tensor,
        source: torch.Tensor,
        group: Group,
        placements: tuple[Placement, Placement],
        size: int,
    ) -> None:
        """Note where a copy came from; one that shares the memory of its source costs nothing."""
        if _same_memory(made, source):
            return
        before = self.find(source)
        origin = source.detach() if before is None else _View(before, source)
        copy = _Copy(origin, group, placements, size)
        storage = made.untyped_storage()
        self.known[storage_key(storage)] = (StorageWeakRef(storage), made._version, copy)

    def find(self, tensor: torch.Tensor) -> _Copy | None:
        """The copy in whose memory a tensor lies, if the tensor can be made again from it.

        It cannot where the copy has been written to, nor where the tensor is the negative of what
        lies there, a view that no public function makes.
        """
        found = self.known.get(storage_key(tensor))
        if found is None or tensor.is_neg() or tensor._version != found[1]:
            return None
        return found[2]

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd is to keep of a tensor: a copy's view, or the tensor and its version.

        Detached, as a result that is kept by what made it would never be freed.
        """
        copy = self.find(tensor)
        if copy is None:
            return tensor.detach(), tensor._version
        copy.wanted += 1
        return _View(copy, tensor)

    @staticmethod
    def unpack(kept: Any) -> torch.Tensor:
        """The tensor of what was kept."""
        if isinstance(kept, _View):
            return kept.of(kept.copy.taken())
        tensor: torch.Tensor
        tensor, version = kept
        _require_version(tensor, version)
        return tensor


_current = threading.local()


def parts_are_alike(ranks: Ranks, *cuts: Any) -> bool:
    """Whether no rank is left with nothing or a single place of any dim where others have more.
    cuts: (size, (axis, shard), ..) each.

    An op on nothing may keep nothing, and of a dim of one place a reshape is a view that elsewhere
    is a copy: then the ranks would not make the same copies again, in the same order.
    """
    for size, *own in cuts:
        sizes = {size}
        for axis, shard in own:
            count = ranks.sizes[axis]
            sizes = {local_size(n, shard, count, rank) for n in sizes for rank in range(count)}
        if 0 in sizes or (1 in sizes and len(sizes) > 1):
            return False
    return True


def convert_again(
    x: torch.Tensor,
    group: Group,
    source: Placement,
    target: Placement,
    size: int = 0,
    drop: bool = True,
) -> torch.Tensor:
    """`convert`, of which the backward pass keeps `x` and not the result, where `drop` says so."""
    made = convert(x, group, source, target, size)
    copies: _Copies | None = getattr(_current, "copies", None)
    if copies is not None and drop:
        if movement(source, target) is Movement.KEEP_ON_FIRST and group.rank == 0:
            # The other ranks make zeros. What is a copy there is one here, or the ranks would not
            # make again the same copies, in the same order.
            made = made.clone()
        copies.add(made, x, group, (source, target), size)
    return made


def dropping(run: Callable[..., Any]) -> Callable[..., Any]:
    """The program, with what `convert_again` makes in it dropped after the forward pass.

    Inside somebody else's hooks on what autograd keeps, those decide: torch.utils.checkpoint makes
    everything again.
    """

    @functools.wraps(run)
    def wrapped(*args: Any) -> Any:
        hooked = saved_tensors_hooks_are_set()
        if hooked or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return run(*args)
        before = getattr(_current, "copies", None)
        copies = _current.copies = _Copies()
        try:
            with torch.autograd.graph.saved_tensors_hooks(copies.pack, copies.unpack):
                return run(*args)
        finally:
            _current.copies = before

    return wrapped


class _Anchor(torch.autograd.Function):
    """The end of a block: where its backward begins, the block is run again, all of it.

    On every rank: the block's last op may keep nothing where it has nothing to work on.
    """

    @staticmethod
    def forward(ctx: Any, *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        made = tuple(torch.ops.aten.alias(result) for result in results)
        ctx.save_for_backward(*made)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        _ = ctx.saved_tensors
        return grads


def _anchored(results: list[torch.Tensor]) -> list[torch.Tensor]:
    which = [index for index, result in enumerate(results) if result.requires_grad]
    made = list(results)
    if which:
        ends = _Anchor.apply(*(results[index] for index in which))
        for index, end in zip(which, ends, strict=True):
            made[index] = end
    return made


def recomputed(block: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """What a block returns; the backward pass keeps its inputs, and runs it again for the rest.

    Random ops draw again what they drew, and the ranks communicate again in the same order.
    """
    source = generator()
    states = source.stream_states()
    steps: list[int | None] = []

    def run(*tensors: torch.Tensor) -> Any:
        if steps:
            with drawing_from(source.repeated(steps[0], states)):
                return _anchored(block(*tensors))
        made = _anchored(block(*tensors))
        steps.append(source.drawing)
        return made

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
