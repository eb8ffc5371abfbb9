"""What is alive when: the tensors that are kept for the backward pass, and the worst moment."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.abstract_execution import AbstractExecution

__all__ = ["Liveness"]

Bytes = NDArray[np.int64]


class Liveness:
    """Lifetimes of a walk's storages, forward and backward.

    kept: storages (by number) of activations that wait for the backward pass. activations: their
    bytes. forward, backward: bytes of activations and of their gradients at every moment of the two
    passes. temporary: bytes beyond those kept at the worst moment.
    """

    def __init__(self, walk: AbstractExecution) -> None:
        self.walk = walk
        self.readers: list[list[int]] = [[] for _ in walk.locals]
        for index, moment in enumerate(walk.moments):
            for number in moment.reads:
                self.readers[number].append(index)
        self.region = [moment.region for moment in walk.moments]
        # Moments at whose backward each storage is needed: kept all along, or made again by then.
        self.savers: list[list[int]] = [[] for _ in walk.storages]
        self.again: list[list[int]] = [[] for _ in walk.storages]
        self._find_savers()
        self.kept = tuple(
            number
            for number, storage in enumerate(walk.storages)
            if storage.kind == "activation" and self.savers[number]
        )
        self.activations = sum(walk.storages[number].nbytes for number in self.kept)
        self.forward, self.backward = self._forward(), self._backward()
        worst = max(self.forward.max(initial=0), self.backward.max(initial=0))
        self.temporary = max(int(worst) - self.activations, 0)

    def _find_savers(self) -> None:
        walk, region = self.walk, self.region
        starts: dict[int, int] = {}
        for index, own in enumerate(region):
            starts.setdefault(own, index)
        for number, storage in enumerate(walk.storages):
            born = region[storage.born] if storage.kind == "activation" else -1
            for saver in storage.savers:
                own = region[saver]
                inside = own != -1 and own == born
                (self.again if inside else self.savers)[number].append(
                    saver if own == -1 or inside else starts[own]
                )
        for index, moment in enumerate(walk.moments):
            own = region[index]
            for number in moment.reads if own != -1 else ():
                at = walk.locals[number].storage
                storage = walk.storages[at]
                if storage.kind != "activation" or region[storage.born] != own:
                    self.savers[at].append(starts[own])
        for number in reversed(range(len(walk.storages))):
            source = walk.storages[number].remade
            if source != number and self.savers[number]:
                self.again[number] += self.savers[number]
                self.savers[source] += self.savers[number]
                self.savers[number] = []

    def _forward(self) -> Bytes:
        """Bytes of activations at every moment of the forward pass."""
        walk = self.walk
        count = len(walk.moments)
        change = np.zeros(count + 2, dtype=np.int64)
        kept = set(self.kept)
        for number, storage in enumerate(walk.storages):
            if storage.kind == "activation":
                last = count if number in kept else max(storage.read, storage.born)
                change[storage.born] += storage.nbytes
                change[min(last, count) + 1] -= storage.nbytes
        return _alive(change, [moment.forward for moment in walk.moments])

    def _backward(self) -> Bytes:
        """Bytes of activations and of their gradients at every moment of the backward pass."""
        walk = self.walk
        count = len(walk.moments)
        change = np.zeros(count + 2, dtype=np.int64)

        def alive(first: int, last: int, nbytes: int) -> None:
            change[first] += nbytes
            change[last + 1] -= nbytes

        ends: dict[int, int] = {}
        for index, own in enumerate(self.region):
            ends[own] = index
        returned = {walk.locals[number].storage for number in walk.returned}
        for number, storage in enumerate(walk.storages):
            if storage.kind != "activation":
                continue
            if number in returned:
                alive(0, count, storage.nbytes)
            elif self.savers[number]:
                alive(min(self.savers[number]), count, storage.nbytes)
            if self.again[number]:
                last = max(self.again[number])
                own = self.region[storage.born]
                alive(
                    min(self.again[number]),
                    max(last, ends[own] if own != -1 else 0),
                    storage.nbytes,
                )
        lasts = self._lasts()
        for index, moment in enumerate(walk.moments):
            for number in moment.makes:
                last = lasts[number]
                if last >= 0:
                    alive(index, last, walk.locals[number].gradient)
        return _alive(change, [moment.backward for moment in walk.moments])

    def _lasts(self) -> list[int]:
        """Of each tensor, the moment at whose backward its gradient begins to be; -1 for none.

        The gradient of a view is that of what it is a view of, seen otherwise. Gradients come from
        the caller for the loss or, where none is returned, for all that is returned.
        """
        walk = self.walk
        found = [max(readers, default=-1) for readers in self.readers]
        stands = [(number, walk.locals[number].stand) for number in walk.returned]
        losses = [number for number, own in stands if own.requires_grad and not own.shape]
        for number in losses or walk.returned:
            found[number] = len(walk.moments)
        for moment in reversed(walk.moments):
            for made in moment.makes:
                if walk.locals[made].gradient == 0:
                    for read in moment.reads:
                        if walk.locals[read].storage == walk.locals[made].storage:
                            found[read] = max(found[read], found[made])
        return found


def _alive(change: Bytes, besides: list[int]) -> Bytes:
    """From what begins and ends at every moment, and what there is besides for that moment only."""
    alive = np.cumsum(change)[:-1]
    alive[:-1] += np.array(besides, dtype=np.int64)
    return alive
