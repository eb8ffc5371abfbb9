"""Copies and results that are not saved: known by their memory, made again from their sources.

Copies of parameters are gathered again ahead of their use: where the backward pass takes one, it
starts gathering those that it will take next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from autoparallel.placement import Placement
from autoparallel.runtime.groups import Group, Result
from autoparallel.runtime.moves import start_move
from autoparallel.support.torch_private import (
    StorageWeakRef,
    at_end_of_backward,
    backward_pass,
    storage_key,
)

__all__ = [
    "Copies",
]


class _View:
    """A tensor that lies in the memory of a copy, by its element type, sizes, strides and
    offset.
    """

    def __init__(self, copy: _Copy | _Made, view: torch.Tensor) -> None:
        self.copy = copy
        self.dtype, self.sizes, self.strides = view.dtype, view.size(), view.stride()
        self.offset, self.conjugate = view.storage_offset(), view.is_conj()

    def of(self, recomputed_copy: torch.Tensor) -> torch.Tensor:
        """Return the same view of a copy that was recomputed."""
        view = torch.empty(0, dtype=self.dtype, device=recomputed_copy.device)
        view.set_(recomputed_copy.untyped_storage(), self.offset, self.sizes, self.strides)
        return view.conj() if self.conjugate else view


class _Copy:
    """A redistributed copy that can be recomputed from its source.

    source: what was redistributed, or its place in another copy. placements: of source and copy.
    size: of the whole along the source's split dim. wanted: the number of places in the backward
    pass that have yet to read the copy. held: the copy while it is wanted again. underway: the move
    that makes it again, and its source, from its start to its end. queue, place: where it stands
    among the copies that are made again ahead of their use, if it is.
    """

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
        self.held: torch.Tensor | None = None
        self.underway: tuple[torch.Tensor, Result] | None = None
        self.queue: _Queue | None = None
        self.place = 0

    def start(self, others: _Others) -> None:
        """Start making the copy again, if that has not begun. Raises RuntimeError where its source
        has been written to since. others: as of `again`.
        """
        if self.underway is not None:
            _require_version(self.underway[0], self.version)
            return
        source = _there(self.source, self.version, others)
        with torch.no_grad():
            wait = start_move(source, self.group, *self.placements, self.size)
        self.underway = source, wait

    def finish(self) -> torch.Tensor:
        """Return the copy that was started."""
        assert self.underway is not None
        (source, wait), self.underway = self.underway, None
        with torch.no_grad():
            moved = wait()
            # Where the move returns its source, the first copy was a clone all the same: views of
            # it are places in memory of its own.
            return moved.clone() if _same_memory(moved, source) else moved

    def again(self, others: _Others) -> torch.Tensor:
        """Return the copy, recomputed. Raises RuntimeError where its source has been written to
        since.

        others: what was made again for the same place, which is added to.
        """
        self.start(others)
        return self.finish()

    def taken(self) -> torch.Tensor:
        """Return the copy for one of the places that want it; it is held until the last of them has
        had it.
        """
        if self.held is None:
            self.start({})
            if self.queue is not None:
                self.queue.start_before(self.place)
            copy = self.finish()
        else:
            copy = self.held
        self.wanted -= 1
        self.held = copy if self.wanted > 0 else None
        return copy


class _Queue:
    """The copies of a forward pass that are made again ahead of their use, in their order.

    copies: each, while it is there, with its distance: it is started when the backward pass takes
    one that comes at most so many later in the forward pass. furthest: the largest distance.
    started: those that were, by a backward pass of this number, and may not have been taken yet.
    """

    def __init__(self) -> None:
        self.copies: list[tuple[weakref.ref[_Copy], int]] = []
        self.furthest = 0
        self.started: list[_Copy] = []
        self.number = -1

    def add(self, copy: _Copy, distance: int) -> None:
        """Add the next copy of the forward pass."""
        copy.queue, copy.place = self, len(self.copies)
        self.copies.append((weakref.ref(copy), distance))
        self.furthest = max(self.furthest, distance)

    def start_before(self, place: int) -> None:
        """Start the copies that are to be started when the one at a place is taken."""
        number = backward_pass()
        if number == -1:
            # Somebody looks at what a node has saved.
            return
        for at in range(place - 1, max(place - self.furthest, 0) - 1, -1):
            reference, distance = self.copies[at]
            copy = reference()
            if copy is None or place - at > distance or copy.wanted <= 0:
                continue
            # A source that has been written to is told of where its copy is taken.
            source = copy.source
            if isinstance(source, _View) or source._version != copy.version:
                continue
            if copy.held is None and copy.underway is None:
                if self.number != number:
                    self.number = number
                    at_end_of_backward(self.end)
                copy.start({})
                self.started.append(copy)

    def end(self) -> None:
        """Wait for what was started and, as only a part of the graph ran, not taken."""
        started, self.started = self.started, []
        for copy in started:
            if copy.underway is not None:
                copy.finish()


class _Made:
    """A result of an op that can be made again from what the op read.

    block: takes tensors, and returns a list of one. sources: what it read, or places in other
    copies. device: the type of the device that it was made on. wanted, held: as of a copy.
    """

    def __init__(
        self, block: Callable[..., Any], sources: tuple[torch.Tensor | _View, ...], device: str
    ) -> None:
        self.block, self.sources, self.device = block, sources, device
        self.versions = [
            source._version if isinstance(source, torch.Tensor) else 0 for source in sources
        ]
        self.wanted = 0
        self.held: torch.Tensor | None = None

    def again(self, others: _Others) -> torch.Tensor:
        """Return the result, made again. It is held while it is wanted, by whomever it was asked:
        what is made of it needs it, and so will its own op.

        others: what was made again for the same place, which is added to.
        """
        if self.held is not None:
            return self.held
        pairs = zip(self.sources, self.versions, strict=True)
        tensors = [_there(source, version, others) for source, version in pairs]
        # The program has its casts written out, and a backward pass may be called in autocast.
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            result: torch.Tensor
            [result] = self.block(*tensors)
        self.held = result if self.wanted > 0 else None
        return result

    def taken(self) -> torch.Tensor:
        """Return the result for one of the places that want it."""
        result = self.again({})
        self.wanted -= 1
        self.held = result if self.wanted > 0 else None
        return result


# What is made again for one place, by what it is a copy of. A graph that is walked a second time
# holds nothing: without this, what two sources of a result are both made of would be made twice,
# and along a chain of such results in 2 ** length steps.
_Others = dict["_Copy | _Made", torch.Tensor]


def _there(source: torch.Tensor | _View, version: int, others: _Others) -> torch.Tensor:
    """Return a source, itself made again where it is a place in a copy. version: as it was saved.

    others: what was made again for the same place, which is added to. Raises RuntimeError where it
    has been written to since.
    """
    if isinstance(source, _View):
        copy = source.copy
        if copy not in others:
            others[copy] = copy.again(others)
        return source.of(others[copy])
    _require_version(source, version)
    return source


def _same_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors lie in the same storage."""
    return storage_key(tensor) == storage_key(other)


def _require_version(tensor: torch.Tensor, version: int) -> None:
    """Raise RuntimeError unless a tensor is as it was saved, in the words that autograd has
    for it.
    """
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {tuple(tensor.shape)} is at version {tensor._version}; expected version "
            f"{version} instead"
        )


class Copies:
    """The copies of one forward pass, by their memory, which is not kept alive.

    known: from a storage's address to a weak reference to it, its version when the copy was made,
    and the copy. queue: of the copies that are made again ahead of their use.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[StorageWeakRef, int, _Copy | _Made]] = {}
        self.queue = _Queue()

    def add(
        self,
        tensor: torch.Tensor,
        source: torch.Tensor,
        group: Group,
        placements: tuple[Placement, Placement],
        size: int,
        distance: int = 0,
    ) -> None:
        """Note where a copy came from; one that shares the memory of its source costs nothing and
        is left.

        tensor: the copy. placements: of source and copy. size: of the whole along the split dim of
        the source. distance: of a copy that is made again ahead of its use, see `_Queue`; 0 for
        others.
        """
        if not _same_memory(tensor, source):
            copy = _Copy(self.origin(source), group, placements, size)
            if distance:
                self.queue.add(copy, distance)
            self.know(tensor, copy)

    def add_made(
        self, result: torch.Tensor, block: Callable[..., Any], inputs: tuple[torch.Tensor, ...]
    ) -> None:
        """Note what a result was made of; one that shares the memory of an input is left.

        block: makes it of the inputs.
        """
        if not any(_same_memory(result, each) for each in inputs):
            origins = tuple(map(self.origin, inputs))
            self.know(result, _Made(block, origins, result.device.type))

    def origin(self, source: torch.Tensor) -> torch.Tensor | _View:
        """Return what is kept of a source: its place in a copy, or the tensor."""
        copy = self.find(source)
        return source.detach() if copy is None else _View(copy, source)

    def know(self, tensor: torch.Tensor, copy: _Copy | _Made) -> None:
        """Note that a tensor's memory is that of a copy."""
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being given to another storage, so that `find`
        # never takes a new tensor for an old copy.
        self.known[storage_key(storage)] = (StorageWeakRef(storage), tensor._version, copy)

    def find(self, tensor: torch.Tensor) -> _Copy | _Made | None:
        """The copy in whose memory a tensor lies, if the tensor can be made again from it.

        It cannot where the copy has been written to, nor where the tensor is the negative of what
        lies there, a view that no public function makes.
        """
        entry = self.known.get(storage_key(tensor))
        if entry is None or tensor.is_neg() or tensor._version != entry[1]:
            return None
        return entry[2]

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return an object for autograd to save in place of a tensor: a view of a copy, or the
        tensor.

        The tensor is detached, and comes with its version: a result that is saved by the op that
        made it would never be freed.
        """
        copy = self.find(tensor)
        if copy is None:
            return tensor.detach(), tensor._version
        copy.wanted += 1
        return _View(copy, tensor)

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        """Return the tensor that `pack` was given."""
        if isinstance(packed, _View):
            return packed.of(packed.copy.taken())
        tensor: torch.Tensor
        tensor, version = packed
        _require_version(tensor, version)
        return tensor
