"""The user's choices that change a plan; nothing that is not here, nor in the model, changes it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

from autoparallel.errors import PlanError

__all__ = ["SCHEDULES", "Options", "Schedule", "rank_of_stage"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """An order in which the ranks of a pipeline compute, by the classes of torch that run it.

    alone, several: the names of the classes in torch.distributed.pipelining for one stage on each
    rank, and for several of them; "" where there is none. folded: whether ranks take the stages
    forth and back, so that the first rank has the first and the last one (two on each rank);
    otherwise in turn. per_stage: whether it takes no fewer micro-batches than there are stages.
    """

    alone: str = ""
    several: str = ""
    folded: bool = False
    per_stage: bool = False


SCHEDULES = {
    "gpipe": Schedule("ScheduleGPipe", "ScheduleLoopedBFS"),
    "1f1b": Schedule("Schedule1F1B", "ScheduleInterleaved1F1B"),
    "zero_bubble": Schedule("ScheduleInterleavedZeroBubble", "ScheduleInterleavedZeroBubble"),
    "zbv": Schedule("", "ScheduleZBVZeroBubble", folded=True),
    "dualpipev": Schedule("", "ScheduleDualPipeV", folded=True, per_stage=True),
}

_KNOWN = {
    "unknown_ops": ("discover", "replicate", "error"),
    "rng": ("counter", "fast"),
    "recompute": ("model", "auto", "none", "selective", "full"),
    "optimizer": ("sgd", "momentum", "adam", "mixed_adam"),
    "schedule": tuple(SCHEDULES),
}


def rank_of_stage(stage: int, ranks: int, schedule: str) -> int:
    """Return the place, among the ranks that share out the stages, of the one that computes a
    stage. ranks: their number. schedule: see SCHEDULES.

    >>> [rank_of_stage(stage, 3, "1f1b") for stage in range(6)]
    [0, 1, 2, 0, 1, 2]
    >>> [rank_of_stage(stage, 3, "zbv") for stage in range(6)]
    [0, 1, 2, 2, 1, 0]
    """
    turn, place = divmod(stage, ranks)
    return ranks - 1 - place if SCHEDULES[schedule].folded and turn % 2 else place


@dataclass(frozen=True, slots=True)
class Options:
    """The user's choices. A plan stores them, and is the same for the same model, mesh and options.

    sequence_parallel: activations between the split products may be split along dims whose size
    comes from the inputs (the sequence, the batch), with reduce-scatter and all-gather in place of
    all-reduce (arXiv:2205.05198).

    data_parallel: products may be split along such dims too; without it a weight matrix is used
    just as it is stored.

    hardware: the name of a preset, or the path of a file that `autoparallel calibrate` has written.

    unknown_ops: what happens to an op that has no rule. "discover" finds one by running the op on
    small tensors; where that fails, every rank runs the op on whole tensors, and the plan says why.
    "replicate" keeps its tensors whole without trying, "error" refuses the model. Ops that draw
    random numbers, write to their operands or communicate are refused in any case.

    tokens: the plan is made as for inputs of at least this many elements, however small the example
    inputs are.

    rng: "counter" draws the same random numbers under every plan; "fast" draws from torch's
    generators, one stream per shard.

    strict_capture: a model that cannot be traced whole is refused. Otherwise its traceable parts
    are split.

    optimizer: the optimizer whose state is counted and whose update is priced: "sgd", "momentum",
    "adam", or "mixed_adam" (parameters of 16 bits with a master copy and moments in float32).

    memory_limit: bytes that a rank may use; None for no limit.

    recompute: what is recomputed in the backward pass, to save fewer activations: "model" for what
    the model itself checkpoints; of repeated blocks, whatever the model does, "none", "selective"
    (what lies between products of activations or, where these are fused, cheap ops one by one),
    "full", or "auto" for each block's best.

    gap: under a memory limit, the search ends once it is proven that no plan saves more than this
    share of the seconds of the one found; 0 goes on for the best, as far as it can be proven.

    seconds: how long the search for a plan goes on, None for as long as it takes; then the best so
    far is the plan, with what is proven of it. The steps of the search are counted, and not a
    clock's, so that every rank and every run comes to the same plan: what each step takes is that
    of one core of the present day. At least one plan is looked at, whatever that takes.

    overlap: collectives of the backward pass run while gradients of weights are computed; otherwise
    each is waited for at once.

    microbatches: the parts of a batch that the stages of a pipeline work at one after the other;
    None for as many as suit it. schedule: the order in which they do, "gpipe" (all forward passes,
    then all backward), "1f1b" (backward as soon as it can, which holds fewer activations),
    "zero_bubble" (as 1f1b; gradients of weights are computed where the stage would wait, if it has
    one rank: arXiv:2401.10241), and with two stages on each rank, the first and the last on the
    first one, "zbv" (of the same paper) and "dualpipev" (arXiv:2412.19437, folded).
    stages_per_rank: more than one lets ranks begin sooner, and send more often (interleaving).
    Where these two are None, the planner chooses them together with the mesh, if it chooses that;
    on a mesh that is given, they are "1f1b" and 1.

    constraints: sentences such as "blocks.*.weight on dp is whole"; strategy/constraints.py has the
    grammar.

    Raises PlanError for a value that is none of those named here.

    >>> Options(recompute="auto").optimizer
    'adam'
    """

    sequence_parallel: bool = True
    data_parallel: bool = False
    hardware: str = "auto"
    unknown_ops: str = "discover"
    tokens: int = 8192
    rng: str = "counter"
    strict_capture: bool = False
    optimizer: str = "adam"
    memory_limit: int | None = None
    recompute: str = "model"
    constraints: tuple[str, ...] = ()
    gap: float = 0.01
    seconds: float | None = None
    overlap: bool = True
    microbatches: int | None = None
    schedule: str | None = None
    stages_per_rank: int | None = None

    def __post_init__(self) -> None:
        # Lists become tuples: options are compared and hashed by content.
        object.__setattr__(self, "constraints", _texts(self.constraints))
        object.__setattr__(self, "hardware", _named(self.hardware))
        # True is a number for isinstance, and NaN compares false with everything.
        number = isinstance(self.gap, int | float) and not isinstance(self.gap, bool)
        if not number or not 0 <= self.gap < 1:
            raise PlanError(
                f"gap={self.gap!r}", why="it is a share of the seconds", fix="give 0.01, for 1%"
            )
        object.__setattr__(self, "gap", float(self.gap))
        object.__setattr__(self, "seconds", _seconds(self.seconds))
        count = self.microbatches
        if count is not None and (type(count) is not int or count < 1):
            raise PlanError(
                f"microbatches={count!r}",
                why="a batch is cut into that many parts",
                fix="give a positive whole number, or leave it out",
            )
        each = self.stages_per_rank
        if each is not None and (type(each) is not int or each < 1):
            raise PlanError(
                f"stages_per_rank={self.stages_per_rank!r}",
                why="a rank computes that many stages of a pipeline",
                fix="give a positive whole number, or leave it out",
            )
        folded = [name for name, each in SCHEDULES.items() if each.folded]
        if self.schedule in folded and each is None:
            object.__setattr__(self, "stages_per_rank", 2)  # there is no other choice
        elif self.schedule in folded and each != 2:
            raise PlanError(
                f"schedule={self.schedule!r} with stages_per_rank={self.stages_per_rank}",
                why="it gives every rank two stages, the first rank the first and the last one",
                fix="pass stages_per_rank=2, or another schedule",
            )
        for name in ("sequence_parallel", "data_parallel", "strict_capture", "overlap"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise PlanError(
                    f"{name}={value!r}", why="it is on or off", fix="choose True or False"
                )
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known and (value is not None or name != "schedule"):
                raise PlanError(
                    f"{name}={value!r}",
                    why="there is no such choice",
                    fix=f"choose one of {', '.join(known)}",
                )

    @property
    def order(self) -> str:
        """The schedule of a pipeline: what it is where none was chosen.

        >>> Options().order, Options(schedule="zbv").order
        ('1f1b', 'zbv')
        """
        return self.schedule or "1f1b"

    @property
    def each_rank(self) -> int:
        """The stages of a pipeline on each rank: one where no number was chosen.

        >>> Options().each_rank, Options(stages_per_rank=2).each_rank
        (1, 2)
        """
        return self.stages_per_rank or 1


def _named(hardware: Any) -> str:
    """Return the hardware as a plan keeps it: a preset's name, or a file's path as a text.

    Raises PlanError for anything else, hardware itself included, which a plan could not be asked
    for again.
    """
    if isinstance(hardware, str | PathLike):
        return str(hardware)
    raise PlanError(
        f"hardware={hardware!r}",
        why="a plan keeps the name of a preset or the path of a file, from which it is read again",
        fix='choose one of the presets ("dgx-a100", "cpu", ..), "auto", or the path of a .json '
        "file, which autoparallel.cost.hardware.write_hardware(hardware, path) writes",
    )


def _seconds(seconds: Any) -> float | None:
    """Return the seconds as a float, or None. Raises PlanError for what is no length of time."""
    if seconds is None:
        return None
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < float("inf"):
        raise PlanError(
            f"seconds={seconds!r}",
            why="the search for a plan goes on for so long",
            fix="give a positive number, or leave it out",
        )
    return float(seconds)


def _sentences(text: str) -> list[str]:
    """Return the sentences that somebody wrote as one text, with commas between them.

    >>> _sentences("batch on dp, heads, vocabulary on tp")
    ['batch on dp', 'heads, vocabulary on tp']
    """
    parts = re.findall(r"[^,].*? on \w+[^,]*", text)
    return [part.strip() for part in parts] or [text]


def _texts(constraints: Any) -> tuple[str, ...]:
    """Return the constraints as a tuple of texts.

    Raises PlanError for a single text, whose letters would each be taken for a constraint, and for
    anything that is no text.
    """
    if isinstance(constraints, str):
        raise PlanError(
            f"constraints={constraints!r}",
            why="constraints are a list of sentences, and this is a single one",
            fix=f"give a list: {_sentences(constraints)!r}",
        )
    if constraints is not None and not isinstance(constraints, Iterable):
        raise PlanError(
            f"constraints={constraints!r}",
            why="constraints are a list of sentences",
            fix='give a list: ["* is whole"]',
        )
    texts = tuple(constraints or ())
    for text in texts:
        if not isinstance(text, str):
            raise PlanError(
                f"constraint {text!r} is no text",
                why="a constraint is a sentence",
                fix='write "blocks.*.weight is whole"',
            )
    return texts
