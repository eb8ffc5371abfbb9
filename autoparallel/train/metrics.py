"""What a training run tells: losses, step times, and the communication that was counted."""

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
    autoparallel.runtime.collective_counter defines them.
    """

    calls: tuple[tuple[str, int], ...] = ()
    nbytes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, calls: dict[str, int], nbytes: dict[str, int]) -> "Traffic":
        """From a counter's dicts."""
        return cls(tuple(sorted(calls.items())), tuple(sorted(nbytes.items())))

    @property
    def total_calls(self) -> int:
        """Calls of every kind."""
        return sum(number for _, number in self.calls)

    @property
    def total_nbytes(self) -> int:
        """Bytes of every kind."""
        return sum(number for _, number in self.nbytes)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(_added(self.calls, other.calls), _added(self.nbytes, other.nbytes))

    def __str__(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in self.calls) or "none"


def _added(
    first: tuple[tuple[str, int], ...], second: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, int], ...]:
    total = dict(first)
    for kind, number in second:
        total[kind] = total.get(kind, 0) + number
    return tuple(sorted(total.items()))


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as rank 0 saw it.

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
        """Median of the steps after the untimed ones and without the counted one."""
        timed = [
            seconds
            for step, seconds in enumerate(self.step_seconds)
            if step >= self.untimed_steps and step != self.counted_step
        ]
        return statistics.median(timed or self.step_seconds)

    def to_json(self) -> str:
        """As text that from_json reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """The record that to_json wrote. Raises TypeError or KeyError if it is none."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("forward", "backward", "update"):
            fields[name] = Traffic(
                _pairs(fields[name]["calls"]),
                _pairs(fields[name]["nbytes"]),
            )
        fields["losses"] = tuple(fields["losses"])
        fields["step_seconds"] = tuple(fields["step_seconds"])
        fields["held_out"] = _pairs(fields["held_out"])
        return cls(**fields)


def _pairs(value: Sequence[Sequence[Any]]) -> tuple[tuple[Any, Any], ...]:
    return tuple((first, second) for first, second in value)


def largest_difference(
    first: Sequence[float], second: Sequence[float], steps: int | None = None
) -> float:
    """Largest absolute difference of two curves, over the first `steps` points if given.

    Not a number if a point of either is none. Raises ValueError if the curves differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"curves of {len(first)} and of {len(second)} points")
    pairs = zip(first[:steps], second[:steps], strict=True)
    differences = [abs(one - other) for one, other in pairs]
    if any(math.isnan(difference) for difference in differences):
        return math.nan  # which max would pass over
    return max(differences, default=0.0)
