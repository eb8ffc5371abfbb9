"""The lifetimes of a program's tensors: saved activations, and the moment with the most bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoparallel.analysis.abstract_execution import AbstractExecution

__all__ = ["Liveness"]

Bytes = NDArray[np.int64]


class Liveness:
    """Lifetimes of a program's storages, forward and backward.

    execution: of the program. saved: numbers of the storages of activations that are saved for the
    backward pass. activations: their bytes. forward, backward: bytes of activations and of their
    gradients at every moment of the two passes; a moment of the backward pass has the number of the
    forward moment whose backward it is, and the last entry is the time between the passes.
    temporary: bytes beyond the saved ones at the moment with the most. worst: the call at whose
    backward that is, or the one that reads what is redistributed then; "" for none.

    Example: `Liveness(AbstractExecution(graph, plan)).activations`
    """

    def __init__(self, execution: AbstractExecution) -> None:
        self.execution = execution
        self.readers: list[list[int]] = [[] for _ in execution.locals]
        for index, moment in enumerate(execution.moments):
            for number in moment.reads:
                self.readers[number].append(index)
        self.region = [moment.region for moment in execution.moments]
        # The moments at whose backward each storage is needed: there all along, or recomputed then.
        self.savers: list[list[int]] = [[] for _ in execution.storages]
        self.again: list[list[int]] = [[] for _ in execution.storages]
        self._find_savers()
        self.saved = tuple(
            number
            for number, storage in enumerate(execution.storages)
            if storage.kind == "activation" and self.savers[number]
        )
        self.activations = sum(execution.storages[number].nbytes for number in self.saved)
        self.forward, self.backward = self._forward(), self._backward()
        worst = max(self.forward.max(initial=0), self.backward.max(initial=0))
        self.temporary = max(int(worst) - self.activations, 0)
        self.worst = self._worst()

    def _worst(self) -> str:
        """Return the call at whose backward the most bytes are there; "" for none."""
        if not len(self.backward) or self.backward.max() < self.forward.max(initial=0):
            return ""
        at = int(self.backward.argmax())
        names = (moment.node for moment in self.execution.moments[at:])
        return next((name for name in names if name), "")

    def _find_savers(self) -> None:
        """Fill `savers` and `again`: the moments at whose backward each storage is needed."""
        execution, region = self.execution, self.region
        starts: dict[int, int] = {}
        for index, its_region in enumerate(region):
            starts.setdefault(its_region, index)
        for number, storage in enumerate(execution.storages):
            born = region[storage.born] if storage.kind == "activation" else -1
            for saver in storage.savers:
                its_region = region[saver]
                # What a recomputed region saves of its own storages is made again; what it saves of
                # others must be there when the region starts to run again.
                inside = its_region != -1 and its_region == born
                (self.again if inside else self.savers)[number].append(
                    saver if its_region == -1 or inside else starts[its_region]
                )
        # A region that runs again reads all of its inputs once more.
        for index, moment in enumerate(execution.moments):
            its_region = region[index]
            for number in moment.reads if its_region != -1 else ():
                at = execution.locals[number].storage
                storage = execution.storages[at]
                if storage.kind != "activation" or region[storage.born] != its_region:
                    self.savers[at].append(starts[its_region])
        # A dropped copy is made again, and its sources are needed in its place. Sources come before
        # their copies, so going backwards passes the need on along chains.
        for number in reversed(range(len(execution.storages))):
            sources = execution.storages[number].remade
            if sources and self.savers[number]:
                self.again[number] += self.savers[number]
                for source in sources:
                    self.savers[source] += self.savers[number]
                self.savers[number] = []

    def _forward(self) -> Bytes:
        """Return the bytes of activations at every moment of the forward pass."""
        execution = self.execution
        count = len(execution.moments)
        change = np.zeros(count + 2, dtype=np.int64)
        saved = set(self.saved)
        for number, storage in enumerate(execution.storages):
            if storage.kind == "activation":
                last = count if number in saved else max(storage.read, storage.born)
                change[storage.born] += storage.nbytes
                change[min(last, count) + 1] -= storage.nbytes
        return _alive(change, [moment.forward for moment in execution.moments])

    def _backward(self) -> Bytes:
        """Return the bytes of activations and of their gradients at every moment of the backward
        pass.
        """
        execution = self.execution
        count = len(execution.moments)
        # Differences from one moment to the next, summed up at the end.
        change = np.zeros(count + 2, dtype=np.int64)

        def alive(first: int, last: int, nbytes: int) -> None:
            """Count bytes that are there at the moments from `first` to `last`."""
            change[first] += nbytes
            change[last + 1] -= nbytes

        ends: dict[int, int] = {}
        for index, its_region in enumerate(self.region):
            ends[its_region] = index
        returned = {execution.locals[number].storage for number in execution.returned}
        started, late = self._started(), self._late()
        for number, storage in enumerate(execution.storages):
            if storage.kind != "activation":
                continue
            # The caller holds what was returned throughout.
            if number in returned:
                alive(0, count, storage.nbytes)
            elif self.savers[number]:
                alive(min(*self.savers[number], late.get(number, count)), count, storage.nbytes)
            if self.again[number]:
                last = max(*self.again[number], started.get(number, -1))
                its_region = self.region[storage.born]
                alive(
                    min(*self.again[number], late.get(number, count)),
                    max(last, ends[its_region] if its_region != -1 else 0),
                    storage.nbytes,
                )
        in_place = self._summed_in_place()
        lasts = self._lasts(in_place)
        # The backward pass runs from the last moment to the first: a gradient is there from its
        # last reader's backward down to that of the moment that made the tensor, or of the gap that
        # the product has left it to.
        for index, moment in enumerate(execution.moments):
            first = index if moment.filled < 0 else moment.filled
            for number in moment.makes:
                last = lasts[number]
                if last >= 0 and number not in in_place:
                    alive(first, last, execution.locals[number].gradient)
        return _alive(change, [moment.backward for moment in execution.moments])

    def _late(self) -> dict[int, int]:
        """Return, for each storage that a product has left to a gap, the moment at whose backward
        that gap is.
        """
        late: dict[int, int] = {}
        for index, moment in enumerate(self.execution.moments):
            if moment.filled >= 0:
                storage = self.execution.locals[moment.reads[0]].storage
                if index in self.execution.storages[storage].savers:
                    late[storage] = min(late.get(storage, index), moment.filled)
        return late

    def _started(self) -> dict[int, int]:
        """Return, for each storage that is gathered again ahead of its use, the moment at whose
        backward that is started: where another one is taken that comes a little later.
        """
        ahead = self.execution.ahead
        taken = [max(self.again[number], default=-1) for number, _ in ahead]
        return {
            number: max(taken[at + 1 : at + 1 + distance], default=-1)
            for at, (number, distance) in enumerate(ahead)
            if taken[at] >= 0
        }

    def _summed_in_place(self) -> set[int]:
        """Return the tensors whose gradients are summed over the ranks in their own memory: those
        that only products read which fill the gap of their redistribution. They are one node of
        autograd's graph with it, and nobody else holds the gradient.
        """
        execution, in_place = self.execution, set[int]()
        for index, moment in enumerate(execution.moments):
            if not moment.node and moment.makes:
                readers = self.readers[moment.makes[0]]
                filling = all(execution.moments[reader].filled == index for reader in readers)
                # The gradients of parts and wholes differ in size: one of them is another tensor.
                read, made = (execution.locals[each[0]] for each in (moment.reads, moment.makes))
                if readers and filling and read.spec.nbytes == made.spec.nbytes:
                    in_place.add(moment.makes[0])
        return in_place

    def _lasts(self, in_place: set[int]) -> list[int]:
        """Return, for each tensor, the moment at whose backward its gradient first exists; -1 for
        none.

        in_place: tensors whose gradients become that of what they were moved from. The gradient of
        a view is that of its base, seen otherwise, and that of a tensor whose gradient does not
        move is that of what it was moved from. Gradients come from the caller for the loss or,
        where none is returned, for all that is returned.
        """
        execution = self.execution
        lasts = [max(readers, default=-1) for readers in self.readers]
        returned = [(number, execution.locals[number].spec) for number in execution.returned]
        losses = [number for number, spec in returned if spec.requires_grad and not spec.shape]
        for number in losses or execution.returned:
            lasts[number] = len(execution.moments)
        # A base's gradient exists as soon as that of any of its views.
        for moment in reversed(execution.moments):
            for result in moment.makes:
                if result in in_place:
                    lasts[moment.reads[0]] = max(lasts[moment.reads[0]], lasts[result])
                elif execution.locals[result].gradient == 0:
                    for operand in moment.reads:
                        storages = {execution.locals[each].storage for each in (operand, result)}
                        if not moment.node or len(storages) == 1:
                            lasts[operand] = max(lasts[operand], lasts[result])
        return lasts


def _alive(change: Bytes, besides: list[int]) -> Bytes:
    """Return the bytes at every moment.

    change: bytes that begin less those that ended, per moment. besides: bytes that are there at one
    moment only.
    """
    alive = np.cumsum(change)[:-1]
    alive[:-1] += np.array(besides, dtype=np.int64)
    return alive
