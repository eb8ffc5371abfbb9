"""What is alive when: the tensors that are kept for the backward pass, and the worst moment."""

from __future__ import annotations

import numpy as np

from autoparallel.cost.walk import Walk

__all__ = ["Peak"]


class Peak:
    """Lifetimes of a walk's storages, forward and backward.

    kept: storages (by number) of activations that wait for the backward pass. activations: their
    bytes. temporary: bytes beyond them at the worst moment.
    """

    def __init__(self, walk: Walk) -> None:
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
        worst = max(self._forward(), self._backward())
        self.temporary = max(worst - self.activations, 0)

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

    def _forward(self) -> int:
        """Most bytes of activations at one moment of the forward pass."""
        walk = self.walk
        count = len(walk.moments)
        change = np.zeros(count + 2, dtype=np.int64)
        kept = set(self.kept)
        for number, storage in enumerate(walk.storages):
            if storage.kind == "activation":
                last = count if number in kept else max(storage.read, storage.born)
                change[storage.born] += storage.nbytes
                change[min(last, count) + 1] -= storage.nbytes
        return self._highest(change)

    def _backward(self) -> int:
        """Most bytes of activations and of their gradients at one moment of the backward pass."""
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
        given = set(walk.returned)
        for index, moment in enumerate(walk.moments):
            for number in moment.makes:
                last = count if number in given else max(self.readers[number], default=-1)
                if last >= 0:
                    alive(index, last, walk.locals[number].gradient)
        return self._highest(change)

    def _highest(self, change: np.ndarray) -> int:
        alive = np.cumsum(change)[:-1]
        alive[:-1] += np.array([moment.buffer for moment in self.walk.moments], dtype=np.int64)
        return int(alive.max(initial=0))
