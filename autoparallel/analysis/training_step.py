"""A predicted step of training: its events on two streams, its tokens per second, its MFU."""

from __future__ import annotations

from dataclasses import dataclass

from autoparallel.support.units import rate_text, seconds_text

__all__ = ["COMMUNICATION", "COMPUTE", "Event", "Timeline", "TrainingStep"]

# The two streams of a device.
COMPUTE, COMMUNICATION = "compute", "communication"


@dataclass(frozen=True, slots=True)
class Event:
    """Work of a stream between two times, in seconds since the step began.

    name: of the node; for a redistribution its collective and value. stream: COMPUTE or
    COMMUNICATION. phase: "forward", "recompute", "backward" or "update". start, end: in seconds.
    place: of the rank on the axis of stages. microbatch: that it is a pass of; -1 for none.

    >>> Event("mm", COMPUTE, "forward", 0.5, 2.0).seconds
    1.5
    """

    name: str
    stream: str
    phase: str
    start: float
    end: float
    place: int = 0
    microbatch: int = -1

    @property
    def seconds(self) -> float:
        """The seconds that it takes."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """A predicted step, and how fast that is.

    seconds: until everything is done. tokens: of the whole batch, or what else its inputs are made
    of; unit: which that is ("tokens", "images", "frames", "rows"). flops: of the model's products,
    forward and backward, unsharded and none recomputed. peak: FLOP/s of all ranks together.

    >>> step = TrainingStep(seconds=2.0, tokens=100, flops=3e12, peak=3e12)
    >>> step.tokens_per_second, step.mfu
    (50.0, 0.5)
    """

    seconds: float
    tokens: int
    flops: float
    peak: float
    unit: str = "tokens"

    @property
    def tokens_per_second(self) -> float:
        """The tokens, or images, of all ranks per second; 0 where it is not known how many a step
        has.
        """
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float:
        """The model FLOPs utilization, between 0 and 1 (arXiv:2204.02311, appendix B)."""
        return self.flops / (self.seconds * self.peak) if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Timeline(TrainingStep):
    """A predicted step, event by event.

    forward_seconds, backward_seconds: until the forward pass is done, and from then until the
    backward pass is, without what is left of the reduction of gradients.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(4096, 4096, bias=False), torch.zeros(512, 4096)
    >>> plan = autoparallel.make_plan(layer, 2, example_inputs=inputs, hardware="dgx-a100")
    >>> print(autoparallel.timeline(plan))
    step           3.23 ms, predicted, on 2 ranks
    passes         forward 1.64 ms, backward 1.46 ms, gradients and update after them 132 µs
    computing      2.89 ms
    communicating  342 µs; nothing is computed for 342 µs
    rows           8,192 a step, 2,535,000 a second
    utilization    81.8% of the peak FLOP/s (MFU)
    """

    forward_seconds: float
    backward_seconds: float
    events: tuple[Event, ...]
    ranks: int

    def __repr__(self) -> str:
        step = f"{seconds_text(self.seconds)} a step"
        return f"<Timeline: {step} on {self.ranks} ranks, {len(self.events)} events>"

    def __str__(self) -> str:
        """A few lines; `write_trace` shows every event."""
        rest = self.seconds - self.forward_seconds - self.backward_seconds
        passes = f"forward {seconds_text(self.forward_seconds)}"
        passes += f", backward {seconds_text(self.backward_seconds)}"
        exposed = seconds_text(self.exposed_seconds)
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        rows = [
            ("step", f"{seconds_text(self.seconds)}, predicted, on {ranks}"),
            ("passes", f"{passes}, gradients and update after them {seconds_text(max(rest, 0.0))}"),
            ("computing", seconds_text(self.busy(COMPUTE))),
            (
                "communicating",
                f"{seconds_text(self.busy(COMMUNICATION))}; nothing is computed for {exposed}",
            ),
            (self.unit, f"{self.tokens:,} a step, {rate_text(self.tokens_per_second)} a second"),
            ("utilization", f"{self.mfu:.1%} of the peak FLOP/s (MFU)"),
        ]
        return "\n".join(f"{name:15}{text}" for name, text in rows)

    def busy(self, stream: str, phase: str = "") -> float:
        """Return the seconds that a stream works, in all or in one phase."""
        return sum(
            event.seconds
            for event in self.events
            if event.stream == stream and phase in ("", event.phase)
        )

    @property
    def exposed_seconds(self) -> float:
        """The seconds in which nothing is computed: communication that nothing hides."""
        return max(self.seconds - self.busy(COMPUTE), 0.0)
