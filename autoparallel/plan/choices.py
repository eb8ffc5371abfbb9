"""The values that a plan consists of: choices for ops, parameters, redistributions and inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoparallel.options import rank_of_stage
from autoparallel.placement import Layout, Movement, Step

__all__ = ["Break", "Conversion", "OpChoice", "ParameterChoice", "Pipeline", "PlannedInput"]

# The names of the fields are the keys of a plan's JSON: to rename one needs a new version there.


@dataclass(frozen=True, slots=True)
class OpChoice:
    """An OpChoice says how one op runs, and what that is predicted to take.

    name, target, where, line: of the op's node in the graph: its name, its operator
    ("aten.mm.default"), the path of its module, its line in the user's source. reads, makes: names
    of the values that it reads and makes. operands, results: the layouts of these values, in the
    same order. kernels: per mesh axis, the communicating kernel that the op needs to be split on
    it, or ""; empty where it needs none at all.
    seconds: predicted time of the forward and the backward pass together. forward_seconds: of the
    forward pass alone; an op that is recomputed in the backward pass counts it twice in seconds.
    flops: floating-point operations of a matrix product, forward, on the busiest rank; whole_flops:
    those of the unsplit product. discovered: the op's rule as text, where the rule was found by
    trial. reason: why a matrix product is left whole; empty if it is split or no product. added:
    seconds by which the best plan that splits it would cost more; 0 where none does.
    """

    name: str
    target: str
    where: str
    line: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    kernels: tuple[str, ...] = ()
    seconds: float = 0.0
    forward_seconds: float = 0.0
    flops: float = 0.0
    whole_flops: float = 0.0
    discovered: str = ""
    reason: str = ""
    added: float = 0.0

    def kernel(self, axis: int) -> str:
        """Return the kernel that the op needs to be split on a mesh axis, or ""."""
        return self.kernels[axis] if self.kernels else ""


@dataclass(frozen=True, slots=True)
class ParameterChoice:
    """A ParameterChoice says how one parameter, its gradient and its optimizer state are stored.

    name: of its node in the graph. path: in the model, as named_parameters() gives it. shape,
    nbytes: of the unsharded parameter. storage: its layout between optimizer steps (ZeRO-3 shards
    it). state: the layout of the part that the optimizer updates, and of the optimizer state; the
    user sees the parameter so. Where state is split and storage is not, the updated parts are
    gathered before the next step. gradient: the layout in which the gradient is held until the
    update: on an axis where it is not split as the state is, it is reduced at the end of the
    backward pass only.
    ZeRO's stages (arXiv:1910.02054) on an axis are (storage, gradient, state) = (I, I, S) for the
    first, (I, S, S) for the second and (S, S, S) for the third.
    reason: why the parameter is left whole; empty if it is split. added: seconds by which the best
    plan that splits it would cost more; 0 where it is split, and where no plan does.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    nbytes: int
    storage: Layout
    gradient: Layout
    state: Layout
    reason: str = ""
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversion:
    """A Conversion redistributes one value, step by step, once for all of its `readers`.

    value: its name. source: the layout in which it is made (or stored, for a parameter). target:
    the layout in which the readers use it. steps: the changes on single mesh axes between the two,
    in the order in which they run. readers: names of ops, or "return" for what the caller gets.
    shape: of the whole value for the sizes planned for, as text ("s0, s1, 768"). nbytes: bytes of
    the whole value. requires_grad: whether a gradient goes back on the same way.
    seconds: predicted time of both passes. together: the value is a parameter whose gradient is
    reduced at the end of the backward pass, in one collective with other gradients (one gradient
    bucket). again: the redistributed copy is dropped after the forward pass and recomputed in the
    backward pass. begins: the op before which the last collective of the steps is started, which is
    waited for where the copy is first read; backward, the gradient's is started where it is there,
    and waited for after that op. "" where each is waited for at once. distance: of a dropped copy;
    it is gathered again when the backward pass takes another such copy that is read at most so many
    later, 0 for where it is read.
    """

    value: str
    source: Layout
    target: Layout
    steps: tuple[Step, ...]
    readers: tuple[str, ...]
    shape: str
    nbytes: int
    requires_grad: bool
    seconds: float = 0.0
    together: bool = False
    again: bool = False
    begins: str = ""
    distance: int = 0

    @property
    def moves(self) -> tuple[tuple[int, Movement, Movement], ...]:
        """Return per step the mesh axis, the movement of the value and that of its gradient.

        The gradient's is Movement.NONE where none is needed. Steps are in the forward order; the
        backward pass runs them from the last to the first.

        >>> from autoparallel.placement import Invariant, Replicate
        >>> one, other = Invariant(), Replicate()
        >>> steps = (Step(0, one, other),)
        >>> copy = Conversion("x", (one,), (other,), steps, ("mm",), "4, 8", 128, True)
        >>> [(axis, value.value, gradient.value) for axis, value, gradient in copy.moves]
        [(0, 'none', 'all_reduce')]
        """
        return tuple(
            (step.axis, step.forward, step.backward if self.requires_grad else Movement.NONE)
            for step in self.steps
        )


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """A PlannedInput is one tensor that goes into the model.

    name: of its node in the graph. path: the caller's name of it ("input_ids"). dims: its sizes as
    the shapes of conversions write them ("s95", "768"). given: its sizes in the example inputs.
    planned: its sizes in what was planned for. is_integer: whether its elements are whole numbers,
    as tokens are. Raises ValueError for another number of sizes than of dims.
    """

    name: str
    path: str
    dims: tuple[str, ...]
    given: tuple[int, ...]
    planned: tuple[int, ...]
    is_integer: bool = False

    def __post_init__(self) -> None:
        if not len(self.dims) == len(self.given) == len(self.planned):
            raise ValueError(
                f"input {self.name} has {len(self.dims)} dims, sizes {self.given} in the example "
                f"inputs, and sizes {self.planned} planned for"
            )


@dataclass(frozen=True, slots=True)
class Break:
    """A Break is a module whose forward stays the user's Python, which all ranks run alike.

    path: in the model, empty for the model itself. line: of the source, empty if unknown. reason:
    why the forward cannot be traced. flops: the share of the model's matrix products that the
    forward computes itself, in FLOPs of an example run, from 0 to 1.

    >>> print(Break("head", "model.py:41", "a branch on a value"))
    head: a branch on a value (model.py:41)
    """

    path: str
    line: str
    reason: str
    flops: float = 0.0

    def __str__(self) -> str:
        """Return the module, the reason and the line as one text."""
        line = f" ({self.line})" if self.line else ""
        return f"{self.path or 'the model itself'}: {self.reason}{line}"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A Pipeline says how a model's ops are cut into stages, each of which some ranks compute.

    stages: their number. ranks: that of the ranks that share them out, see `rank_of`.
    microbatches: the parts of a batch that go through them one after the other; they are the places
    of the plan's mesh axis "microbatch". schedule: the order in which stages compute them, one of
    options.SCHEDULES. starts: the name of each stage's first op.
    seconds: predicted, of one micro-batch on each stage, forward and backward. nbytes: that a rank
    of each stage sends to the next one for a micro-batch, forward. bubble: the share of the passes'
    time in which the stages wait, from 0 to 1.
    forward_seconds: of the forward pass alone. weight_seconds: of what only gradients of weights
    take, which some schedules put off. once_seconds: after all micro-batches of a step: reducing
    gradients, and the update. back_nbytes: that a rank of each stage sends to the one before it for
    a micro-batch, backward. in_flight: of each stage, the micro-batches that went forward and not
    yet back, at most. memory: of each of the ranks, its bytes at the worst moment. These are empty
    where nobody has told them.

    >>> print(Pipeline(2, 2, 8, "1f1b", ("a", "b"), (0.1, 0.1), (64, 0), 0.125))
    2 stages, 8 micro-batches, 1f1b, which wait 12.5% of the time
    """

    stages: int
    ranks: int
    microbatches: int
    schedule: str
    starts: tuple[str, ...]
    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]
    bubble: float
    forward_seconds: tuple[float, ...] = ()
    weight_seconds: tuple[float, ...] = ()
    once_seconds: tuple[float, ...] = ()
    back_nbytes: tuple[int, ...] = ()
    in_flight: tuple[int, ...] = ()
    memory: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return numbers and schedule as one line."""
        parts = f"{self.microbatches} micro-batch{'es' if self.microbatches > 1 else ''}"
        wait = f"which wait {self.bubble:.1%} of the time"
        if self.enough <= self.ranks / 2:
            wait += f", most for one that takes longest: pp={self.enough} would be about as fast"
        each = self.stages // self.ranks
        shared = f" ({each} on each rank)" if each > 1 else ""
        return f"{self.stages} stages{shared}, {parts}, {self.schedule}, {wait}"

    @property
    def enough(self) -> int:
        """The number of ranks that would do as much, if stages were cut evenly among them: with
        many micro-batches, all wait for the rank that works longest.

        >>> Pipeline(4, 4, 8, "1f1b", ("a", "b", "c", "d"), (1.0, 9.0, 1.0, 4.0), (), 0.7).enough
        2
        """
        works = [sum(self.seconds[stage] for stage in self.of_rank(r)) for r in range(self.ranks)]
        return math.ceil(sum(works) / max(works)) if any(works) else self.ranks

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """Return the stages that a rank computes, in order. rank: its place on the axis pp."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == rank)

    def rank_of(self, stage: int) -> int:
        """Return the place on the axis pp of the rank that computes a stage.

        >>> pipeline = Pipeline(4, 2, 8, "zbv", ("a", "b", "c", "d"), (), (), 0.0)
        >>> [pipeline.rank_of(stage) for stage in range(4)]
        [0, 1, 1, 0]
        """
        return rank_of_stage(stage, self.ranks, self.schedule)
