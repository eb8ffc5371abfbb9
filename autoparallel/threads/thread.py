"""The values of this package: threads, the places where they lie, and what calls do with them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from autoparallel.graph.graph import Dim
from autoparallel.placement import Collective

__all__ = ["Birth", "Passage", "Place", "Thread", "Treatment"]


class Treatment(Enum):
    """A Treatment says what a call does with a loop, and so what a split of it takes there.

    FREE: the results have it, and each rank can compute its part alone. SUMMED: the results do not
    have it; the parts' results are terms of a sum, which must be synchronized. KERNEL: a part needs
    what the other ranks have, and a kernel that communicates gets it: a softmax, a maximum, a look-
    up. WHOLE: the call needs all of it at once, as a layer norm does, and no rank can go without.
    """

    FREE = "free"
    SUMMED = "summed"
    KERNEL = "kernel"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A Place is where a thread lies: in a dim of a value.

    inner: the number of threads that lie outside of it in the same dim; where heads and head size
    are merged into one dim, heads are at 0 and the head size at 1.
    """

    value: str
    dim: int
    inner: int = 0


@dataclass(frozen=True, slots=True)
class Birth:
    """A Birth is where a thread begins: a dim of something that no call has made, or of a call that
    brings it in, as `arange` does.

    kind: "input", "parameter", "buffer", "constant" or "call". name: of the node. path: of the
    parameter or buffer in the model; of an input or a call its name. dim: of its value.
    """

    kind: str
    name: str
    path: str
    dim: int


@dataclass(frozen=True, slots=True)
class Passage:
    """A Passage is what one call does with one of its loops.

    call: the node's name. loop: in the words of the call's rule; "" for a dim that has none, which
    the call needs whole. threads: the loop's threads, outermost first, by number. treatment: of a
    split in the forward pass. operands, results: pairs of the position of a tensor and of the dim
    that has the loop. gradients: the values read whose gradients are sums over the loop, so that a
    split of it must be synchronized in the backward pass (the dual of SUMMED). is_pending: where
    the loop is split, results without it are pending sums. kernel: its name. collectives: those
    that it makes, of both passes. reason: why the loop stays whole, where the rule says it.
    """

    call: str
    loop: str
    threads: tuple[int, ...]
    treatment: Treatment
    operands: tuple[tuple[int, int], ...]
    results: tuple[tuple[int, int], ...]
    gradients: tuple[str, ...] = ()
    is_pending: bool = False
    kernel: str = ""
    collectives: tuple[Collective, ...] = ()
    reason: str = ""

    @property
    def is_end(self) -> bool:
        """True if the call has the loop in what it reads, and not in what it makes."""
        return bool(self.operands) and not self.results


@dataclass(frozen=True, slots=True)
class Thread:
    """A Thread is a dim, followed through the dataflow: all dims, and factors of merged dims, that
    are connected by the loops of calls.

    number: its place in `Threads.threads`. name: what it is to the model ("batch", "heads"). size:
    of it. where: the path of the innermost module that all calls with it are in. births: where it
    begins. places: where it lies. passages: what calls do with it, in execution order.
    """

    number: int
    name: str
    size: Dim
    where: str
    births: tuple[Birth, ...]
    places: tuple[Place, ...]
    passages: tuple[Passage, ...]

    def treated(self, treatment: Treatment) -> tuple[Passage, ...]:
        """Return the passages in which it is treated so."""
        return tuple(passage for passage in self.passages if passage.treatment is treatment)

    @property
    def is_free(self) -> bool:
        """True if no call needs all of it or a kernel for it: splitting it takes sums alone."""
        return all(
            passage.treatment in (Treatment.FREE, Treatment.SUMMED) for passage in self.passages
        )

    def __str__(self) -> str:
        return f"{self.name} [{self.size}]" + (f" in {self.where}" if self.where else "")
