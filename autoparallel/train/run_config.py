"""The configuration of a training run: every key, its type, its default, and its meaning.

It is a tree of frozen dataclasses, one for each section of the TOML file. `config_text.py` reads
and writes it. A value that is out of range is refused here, by the name that the user wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoparallel.options import SCHEDULES
from autoparallel.train.config import TrainingError

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "key",
]

# The bundled models; others are named by where they come from.
BUNDLED = ("gpt", "bert")
_MESH = re.compile(r"auto|[A-Za-z_]\w*(=\d+)?(,[A-Za-z_]\w*(=\d+)?)*")


def key(default: Any, meaning: str, *, among: tuple[str, ...] = (), **bounds: float) -> Any:
    """Return a field of a section. meaning: for --help. among: the only texts that are allowed.

    bounds: `least` and `most` that a number may be, or `above`, which it must exceed.
    """
    metadata = {"meaning": meaning, "among": among, **bounds}
    if isinstance(default, dict | list):
        made = tuple(default) if isinstance(default, list) else default
        return field(default_factory=lambda: made, metadata=metadata)
    return field(default=default, metadata=metadata)


class _Section:
    """Checks the values of a section against what its fields allow."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, each in self.__dataclass_fields__.items():  # type: ignore[attr-defined]
            value, allowed = getattr(self, name), each.metadata
            if allowed.get("among") and value not in allowed["among"]:
                raise TrainingError(
                    f"{name} = {value!r}",
                    why="there is no such choice",
                    fix=f"choose one of {', '.join(allowed['among'])}",
                )
            for word, wrong in (
                ("least", lambda bound, value=value: value < bound),
                ("most", lambda bound, value=value: value > bound),
                ("above", lambda bound, value=value: value <= bound),
            ):
                # A number that is not a number compares false with everything.
                if word in allowed and (value != value or wrong(allowed[word])):
                    words = {"least": "at least", "most": "at most", "above": "above"}[word]
                    raise TrainingError(
                        f"{name} = {value!r}",
                        why=f"it must be {words} {allowed[word]:g}",
                        fix=f"give a number {words} {allowed[word]:g}",
                    )


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The model; `model = "gpt"` is short for `model.kind = "gpt"`."""

    kind: str = key(
        "gpt",
        'gpt, bert, "hf:CLASS" of transformers, "hf:PATH/config.json", or "module:function", '
        "which returns any nn.Module",
    )
    layers: int = key(4, "blocks of a bundled model", least=1)
    hidden: int = key(256, "width of a bundled model", least=1)
    heads: int = key(8, "attention heads of a bundled model; they divide the width", least=1)
    dropout: float = key(0.1, "of a bundled model", least=0, most=0.999)
    norm: str = key(
        "pre", "layer norms of a bert: before each branch or after it", among=("pre", "post")
    )
    sentence_order: bool = key(False, "a bert also learns which of two segments came first")
    vocabulary: int = key(
        0, "rows of the embedding; 0 for as many as the tokenizer has tokens", least=0
    )
    meta: bool = key(
        False, "draw the weights part by part, so that no rank ever holds the whole model"
    )
    weights: str = key(
        "",
        "a folder of safetensors to begin with, under the model's own names; where "
        'data.objective = "choices", heads may be others',
    )
    options: Mapping[str, Any] = key({}, "a table of arguments for hf: and module: models")

    @property
    def is_bundled(self) -> bool:
        """True for the models that come with the project."""
        return self.kind in BUNDLED

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if not self.is_bundled and not re.fullmatch(r"hf:\S.*|[\w.]+:\w+", self.kind):
            raise TrainingError(
                f"kind = {self.kind!r}",
                why="there is no such model",
                fix="choose one of gpt, bert, hf:CLASS, hf:PATH/config.json, module:function",
            )
        if self.is_bundled and self.hidden % self.heads:
            raise TrainingError(
                f"hidden = {self.hidden} is no multiple of heads = {self.heads}",
                why="each head has an equal share of the width",
                fix="choose a width that the heads divide",
            )
        if self.is_bundled and self.options:
            raise TrainingError(
                f"options = {dict(self.options)!r} for {self.kind}",
                why="a bundled model has keys of its own",
                fix="set layers, hidden, heads and the like",
            )
        if self.kind != "bert" and (self.norm != "pre" or self.sentence_order):
            raise TrainingError(
                f"norm and sentence_order are of a bert, and kind = {self.kind!r}",
                fix='leave them out, or choose kind = "bert"',
            )


@dataclass(frozen=True)
class DataConfig(_Section):
    """The text, how it becomes tokens, and how tokens become rows."""

    source: str = key(
        "python",
        '"python" for the sources of the standard library, a file, a folder, a .jsonl file, '
        '"hf:NAME" of the library datasets, or "module:function", called with ("train" or '
        '"held_out", number of the batch, first row, rows), which returns arguments of forward',
    )
    field: str = key("text", "the field of the text, in .jsonl and hf: sources")
    subset: str = key("", "the configuration of an hf: source")
    split: str = key("train", "the split of an hf: source")
    limit_bytes: int = key(
        8_000_000, "text that is read at most; 0 for all; questions are all read", least=0
    )
    tokenizer: str = key("bpe", '"bpe", "wordpiece", or the path of a tokenizer.json')
    vocabulary: int = key(4096, "tokens of a tokenizer that is trained", least=1)
    sequence: int = key(128, "tokens of a row", least=2)
    held_out_every: int = key(20, "one document in so many is held out", least=2)
    objective: str = key(
        "auto",
        "of the labels: the next token, the same tokens (a model that shifts them itself, as those "
        "of transformers), masked tokens, the right answers of questions in RACE's format, or what "
        "fits the model",
        among=("auto", "next", "same", "masked", "choices"),
    )
    masked_fraction: float = key(0.15, "tokens that a masked model predicts", above=0, most=1)
    cache: str = key("", "folder of the token files; by default the user's cache")


@dataclass(frozen=True)
class TrainingConfig(_Section):
    """The length of the run, its batches, its precision."""

    steps: int = key(200, "optimizer steps", least=1)
    batch: int = key(16, "rows of one step, of all ranks together", least=1)
    accumulate: int = key(1, "forward passes that share one step's rows; they divide it", least=1)
    precision: str = key(
        "float32",
        "of the products; bf16 keeps weights, gradients and their sums in float32",
        among=("float32", "bf16", "float64"),
    )
    clip_norm: float = key(1.0, "largest norm of all gradients together; 0 for none", least=0)
    seed: int = key(1234, "of the weights, the order of the rows, and dropout", least=0)
    nonfinite: str = key(
        "stop",
        "where loss or gradients are not finite: stop the run, skip the step, or roll back to the "
        "last checkpoint and leave out the rows",
        among=("stop", "skip", "rollback"),
    )
    most_skipped: int = key(20, "steps in a row that may be skipped or rolled back", least=1)

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if self.batch % self.accumulate:
            raise TrainingError(
                f"batch = {self.batch} is no multiple of accumulate = {self.accumulate}",
                why="each forward pass has an equal share of the rows",
                fix="choose a batch that it divides",
            )


@dataclass(frozen=True)
class OptimizerConfig(_Section):
    """The optimizer. Norms, biases and other vectors are never decayed."""

    kind: str = key(
        "adamw",
        "adamw, or muon: Muon on the matrices inside the model, AdamW on all else",
        among=("adamw", "muon"),
    )
    learning_rate: float = key(1e-3, "the highest of AdamW", above=0)
    beta1: float = key(0.9, "decay of the mean of gradients", least=0, most=0.99999)
    beta2: float = key(0.95, "decay of the mean of squares", least=0, most=0.99999999)
    epsilon: float = key(1e-8, "added to the root of the mean of squares", above=0)
    weight_decay: float = key(0.1, "decoupled, on matrices alone", least=0)
    muon_learning_rate: float = key(0.02, "the highest of Muon", above=0)
    muon_momentum: float = key(0.95, "of Muon, with Nesterov's", least=0, most=0.99999)


@dataclass(frozen=True)
class ScheduleConfig(_Section):
    """The learning rate over the steps: a linear rise, and then a fall."""

    kind: str = key("cosine", "of the fall", among=("cosine", "linear", "constant"))
    warmup: int = key(20, "steps of the rise", least=0)
    decay_steps: int = key(0, "steps until the fall has ended; 0 for all steps of the run", least=0)
    final_fraction: float = key(0.1, "share of the highest rate at its end", least=0, most=1)


@dataclass(frozen=True)
class ParallelConfig(_Section):
    """The arrangement of the ranks, and demands on their work. The planner does the rest."""

    mesh: str = key(
        "tp",
        'axes of the ranks, outermost first: "tp", "dp=2,tp", "pp=2,tp" (an axis without a size '
        'takes the rest), or "auto" for the fastest; along dp each rank reads rows of its own, '
        "along pp it has a stage of the model",
    )
    microbatches: int = key(
        0, "of the stages of pp, in a pass; by default as many as suit it", least=0
    )
    schedule: str = key(
        "",
        'of the stages of pp; by default 1f1b, or what suits mesh "auto"',
        among=("", *SCHEDULES),
    )
    stages_per_rank: int = key(
        0, 'of pp; by default one, or with mesh "auto" as many as suit it', least=0
    )
    hardware: str = key("auto", "a preset, or a file of `autoparallel calibrate`")
    memory_limit: str = key("", 'memory of a rank, such as "40GiB"; by default not limited')
    recompute: str = key(
        "",
        "what is computed again in the backward pass; by default what the model asks for, or under "
        "a memory limit what is best",
        among=("", "model", "auto", "none", "selective", "full"),
    )
    sequence_parallel: bool = key(True, "activations may be split along the sequence")
    constraints: tuple[str, ...] = key([], "demands on the plan, as sentences")
    layout: str = key("", 'the dims that axes split, and no others, as "batch:dp, heads:tp"')
    plan: str = key("", "a plan's JSON to be followed, in place of planning")
    timeout_seconds: float = key(600.0, "after which a rank that waits gives up", above=0)
    check_inputs: int = key(2, "first calls in which ranks compare all of their inputs", least=0)

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        free = [axis for axis in self.mesh.split(",") if "=" not in axis]
        if not _MESH.fullmatch(self.mesh) or len(free) > 1:
            raise TrainingError(
                f"mesh = {self.mesh!r}",
                why="it is a list of axes, one of which may be without a size",
                fix='write "tp", "dp=2,tp=4", "dp,tp=4" or "auto"',
            )
        if self.microbatches and "pp" not in re.split("[=,]", self.mesh) and self.mesh != "auto":
            raise TrainingError(
                f"microbatches = {self.microbatches} with mesh = {self.mesh!r}",
                why="they are what stages work at, one after the other, and there are none",
                fix='give the mesh an axis pp, as "pp=2,tp", or leave microbatches out; '
                "training.accumulate has several passes in a step on any mesh",
            )


@dataclass(frozen=True)
class CheckpointConfig(_Section):
    """When the run is saved, and from where it goes on."""

    every: int = key(100, "steps between two; the last step is saved too; 0 for none", least=0)
    keep: int = key(3, "the newest that are kept; 0 for all", least=0)
    asynchronous: bool = key(True, "write while training goes on")
    resume: str = key(
        "auto",
        '"auto" goes on from the newest whole one of the folder, "never" begins anew in an empty '
        "folder, or the path of a checkpoint",
    )


@dataclass(frozen=True)
class EvaluationConfig(_Section):
    """The loss on text that training never sees."""

    every: int = key(100, "steps between two; 0 for none", least=0)
    batches: int = key(4, "batches of held-out rows", least=1)


@dataclass(frozen=True)
class LogConfig(_Section):
    """The lines, files and pictures that a run writes on the way."""

    every: int = key(1, "steps between two lines", least=1)
    tensorboard: bool = key(False, "write TensorBoard's files, too (pip install tensorboard)")
    picture: bool = key(True, "draw the losses at the end")
    quiet: bool = key(False, "say no more than warnings and errors")


@dataclass(frozen=True)
class RunConfig(_Section):
    """A whole run.

    >>> RunConfig().rows_of_a_pass
    16
    """

    folder: str = key("out/train", "of the run: its configuration, logs and checkpoints")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if not self.folder:
            raise TrainingError("folder is empty", fix='name one: folder = "out/my-run"')
        if self.data.objective == "choices" and self.model.kind == "gpt":
            raise TrainingError(
                'data.objective = "choices" for a gpt',
                why="the bundled one has no head that scores a text",
                fix='model = "bert", "hf:BertForMultipleChoice" or the like',
            )
        if self.model.kind == "bert" and self.data.sequence < 8:
            raise TrainingError(
                f"data.sequence = {self.data.sequence} for a bert",
                why="a row has the marks of its segments, and tokens between them",
                fix="give at least 8 tokens",
            )

    @property
    def rows_of_a_pass(self) -> int:
        """The rows of one forward pass, of all ranks together."""
        return self.training.batch // self.training.accumulate
