"""The record of a training run: losses, step times, and the communication that was counted."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RunRecord", "Traffic", "largest_difference"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives of one phase of one step on one rank, counted on the running module.

    calls, nbytes: ((kind, number), ...) sorted by kind; bytes are those of the whole tensors, as
    `autoparallel.runtime.collective_counter` defines them.

    >>> one = Traffic.of({"all_reduce": 2}, {"all_reduce": 64})
    >>> str(one + one), (one + one).total_nbytes
    ('4 all_reduce', 128)
    """

    calls: tuple[tuple[str, int], ...] = ()
    nbytes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, calls: dict[str, int], nbytes: dict[str, int]) -> "Traffic":
        """Return the traffic that a counter's dicts state, by kind of collective."""
        return cls(tuple(sorted(calls.items())), tuple(sorted(nbytes.items())))

    @property
    def total_calls(self) -> int:
        """The number of calls of all kinds."""
        return sum(number for _, number in self.calls)

    @property
    def total_nbytes(self) -> int:
        """The number of bytes of all kinds."""
        return sum(number for _, number in self.nbytes)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(_added(self.calls, other.calls), _added(self.nbytes, other.nbytes))

    def __str__(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in self.calls) or "none"


def _added(
    first: tuple[tuple[str, int], ...], second: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, int], ...]:
    """Return the sums by kind, sorted by kind."""
    total = dict(first)
    for kind, number in second:
        total[kind] = total.get(kind, 0) + number
    return tuple(sorted(total.items()))


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The record of one run, as rank 0 saw it.

    losses: training loss of every step, before its update. held_out: ((steps done, loss), ...).
    step_seconds: of every step; counted_step was slowed by the counter. forward, backward, update:
    traffic of counted_step; update is everything between backward and the next step.
    local_parameters: elements of the parameters that rank 0 holds.
    """

    name: str
    world_size: int
    local_parameters: int
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    step_seconds: tuple[float, ...]
    untimed_steps: int
    counted_step: int
    forward: Traffic
    backward: Traffic
    update: Traffic

    @property
    def median_step_seconds(self) -> float:
        """The median of the steps' seconds, without the untimed ones and the counted one."""
        timed = [
            seconds
            for step, seconds in enumerate(self.step_seconds)
            if step >= self.untimed_steps and step != self.counted_step
        ]
        # A very short run has no timed step: then all count.
        return statistics.median(timed or self.step_seconds)

    def to_json(self) -> str:
        """Return the record as text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Return the record that `to_json` wrote. Raises TypeError or KeyError if it is none."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("forward", "backward", "update"):
            fields[name] = Traffic(
                _pairs(fields[name]["calls"]),
                _pairs(fields[name]["nbytes"]),
            )
        # JSON has no tuples, and a frozen record compares by content.
        fields["losses"] = tuple(fields["losses"])
        fields["step_seconds"] = tuple(fields["step_seconds"])
        fields["held_out"] = _pairs(fields["held_out"])
        return cls(**fields)


def _pairs(value: Sequence[Sequence[Any]]) -> tuple[tuple[Any, Any], ...]:
    """Return JSON's lists of two as tuples."""
    return tuple((first, second) for first, second in value)


def largest_difference(
    first: Sequence[float], second: Sequence[float], steps: int | None = None
) -> float:
    """Return the largest absolute difference of two curves.

    first, second: of equal length. steps: how many points to look at, None for all. NaN if a point
    of either is NaN. Raises ValueError if the curves differ in length.

    >>> largest_difference([1.0, 2.0], [1.0, 2.5])
    0.5
    """
    if len(first) != len(second):
        raise ValueError(f"curves of {len(first)} and of {len(second)} points")
    pairs = zip(first[:steps], second[:steps], strict=True)
    differences = [abs(one - other) for one, other in pairs]
    if any(math.isnan(difference) for difference in differences):
        return math.nan  # max would pass over it: every comparison with it is false.
    return max(differences, default=0.0)
