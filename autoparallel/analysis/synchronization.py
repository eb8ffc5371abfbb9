"""The values of thread_splits.py: cuts of threads, and what must be synchronized for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from autoparallel.graph.graph import hint
from autoparallel.placement import Collective, Invariant, Partial, Replicate, Shard
from autoparallel.plan import Plan
from autoparallel.threads import Passage, Thread, Threads

__all__ = ["Cause", "Cut", "State", "Synchronization", "ThreadSplits"]


class Cause(Enum):
    """A Cause says why the ranks must talk.

    SUM: a split thread ends in a sum, and each rank has a term of it. WHOLE: the next op, or the
    caller, needs all of a thread that is split. CONFLICT: the next op splits another thread on the
    same axis. KERNEL: an op needs, for its part of a split thread, what the others have, and asks
    them itself. SHARED: each rank uses a value for its part of a thread that the value does not
    have, so that the value's gradient is a sum over the ranks.
    """

    SUM = "a split thread ends in a sum"
    WHOLE = "all of a split thread is needed"
    CONFLICT = "two threads want the same axis"
    KERNEL = "an op needs the other parts of a split thread"
    SHARED = "each rank uses it for its part of a thread that it does not have"


@dataclass(frozen=True, slots=True)
class Cut:
    """A Cut is the split of one thread on one mesh axis, as a value has it.

    dim: of the value. thread: its number. blocks, unit: of the thread alone, as of `LoopSplit`; -1
    as the unit stands for a plain cut that does not heed the thread's own bounds. shard: the split
    of the whole dim, where it has blocks of several sizes, or several ranks hold one part.
    """

    dim: int
    thread: int
    blocks: int = 1
    unit: int = 1
    shard: Shard | None = None


# How a value lies on one axis: a split thread, or I, R or P.
State = Cut | Invariant | Replicate | Partial


@dataclass(frozen=True, slots=True)
class Synchronization:
    """A Synchronization is a collective that the split threads make necessary.

    value: what is moved; in the backward pass its gradient, which goes from readers to the maker.
    axis: number of the mesh axis. phase: "forward", "backward", or "update" for parameters that the
    optimizer updated in parts; "kernel" for what an op does inside, in both passes.
    collective: what moves it. cause: why. carried: the number of the thread that is split before
    it, or whose split left the sum; None where there is none. wanted: of the one that is split
    after it. maker: the op that makes the value, "" for what no op makes. readers: ops that need
    it so, or "return". together: it can go with others of its axis, in one call at the end of the
    backward pass.
    """

    value: str
    axis: int
    phase: str
    collective: Collective
    cause: Cause
    carried: int | None
    wanted: int | None
    maker: str
    readers: tuple[str, ...]
    together: bool = False


@dataclass(frozen=True)
class ThreadSplits:
    """The ThreadSplits of a plan.

    plan, threads: of which they are. made: for each value and axis how its maker leaves it.
    read: for each op and axis how it needs each operand. passages: for each op and axis the
    loop that it splits, if it does. synchronizations: what follows, in the plan's order.
    """

    plan: Plan
    threads: Threads
    made: Mapping[str, tuple[State, ...]]
    read: Mapping[str, tuple[tuple[State, ...], ...]]
    passages: Mapping[str, tuple[Passage | None, ...]]
    synchronizations: tuple[Synchronization, ...]

    def split(self, op: str, axis: int) -> Thread | None:
        """Return the thread that an op splits on an axis; None where it splits none."""
        states = [state[axis] for state in self.read[op]]
        made = [self.made[value][axis] for value in self._results[op]]
        cut = next((state for state in (*states, *made) if isinstance(state, Cut)), None)
        return self.threads.threads[cut.thread] if cut is not None else None

    @cached_property
    def _results(self) -> Mapping[str, tuple[str, ...]]:
        return {op.name: op.makes for op in self.plan.ops}

    def named(self, row: Sequence[int], shard: Shard) -> str:
        """Return the name of the thread of a merged dim that a shard cuts.

        row: the numbers of the dim's threads, outermost first.
        """
        if not isinstance(shard.blocks, int):
            return self.threads.threads[row[0]].name
        before = 1
        for number in row[:-1]:
            before *= hint(self.threads.threads[number].size)
            if shard.blocks < before:
                return self.threads.threads[number].name
        return self.threads.threads[row[-1]].name

    def sentence(self, one: Synchronization) -> str:
        """Say in one sentence why a synchronization is there."""
        threads = self.threads.threads
        carried = threads[one.carried].name if one.carried is not None else ""
        wanted = threads[one.wanted].name if one.wanted is not None else ""
        what = f"the gradient of {one.value}" if one.phase == "backward" else one.value
        collective = one.collective.value.replace("_", "-")
        if one.cause is Cause.SUM:
            why = f"{carried or 'a split thread'} ends in a sum, of which each rank has a term"
        elif one.cause is Cause.SHARED:
            why = f"each rank has used it for its part of {carried or 'the work'} alone"
        elif one.cause is Cause.KERNEL:
            why = f"{carried} is split, and {one.maker} needs all of it"
        elif one.cause is Cause.CONFLICT:
            why = f"{carried} is split, and behind it {wanted} on the same axis"
        else:
            why = f"{carried or wanted} is split, and all of it is needed"
        return f"{collective} of {what}: {why}"
