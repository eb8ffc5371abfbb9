"""Options of a training run: length, learning rate, evaluation, checkpoints."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from autoparallel.errors import AutoParallelError

__all__ = ["Checkpoints", "TrainConfig", "TrainingError"]

# A checkpoint that is being replaced keeps its content under the second name: see save_checkpoint.
_STEP = re.compile(r"step_(\d+)(\.replaced)?")


class TrainingError(AutoParallelError):
    """A training run that cannot start or go on: an option out of range, a model without loss."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The folder of a run's checkpoints, and how often one is saved.

    folder: of all checkpoints of the run. every: steps between two of them; the last step is saved
    too. A run goes on from the newest one in the folder. Raises TrainingError if `every` is below
    1.

    >>> Checkpoints(Path("run")).after(50).as_posix()
    'run/step_00000050'
    """

    folder: Path
    every: int = 50

    def __post_init__(self) -> None:
        if self.every < 1:
            raise TrainingError(
                f"every must be at least 1, got {self.every}",
                why="it counts the steps between two checkpoints",
                fix="give a positive number of steps, or no Checkpoints at all",
            )

    def after(self, steps: int) -> Path:
        """Return the path of the checkpoint that is saved after that many steps."""
        return self.folder / f"step_{steps:08}"

    def newest(self) -> Path | None:
        """Return the path of the checkpoint of the most steps, or None if there is none.

        Whatever has such a name is complete: see `save_checkpoint`.
        """
        return next(iter(self.newest_first()), None)

    def newest_first(self) -> list[Path]:
        """Return the paths of all checkpoints, that of the most steps first."""
        matches = [_STEP.fullmatch(path.name) for path in self.folder.glob("step_*")]
        steps = {int(match[1]) for match in matches if match is not None}
        return [self.after(count) for count in sorted(steps, reverse=True)]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Options of one training run.

    steps: optimizer steps. learning_rate: the highest. warmup_steps: of a linear rise to it, after
    which a cosine falls to final_fraction of it. weight_decay: on matrices alone. betas: of AdamW.
    clip_norm: largest norm of the gradient. evaluate_every: steps between evaluations.
    evaluation_batches: batches of held-out text per evaluation. untimed_steps: first steps that the
    median step time leaves out, because they compile and allocate.
    Raises TrainingError for numbers out of range.
    """

    steps: int = 120
    learning_rate: float = 1e-3
    warmup_steps: int = 40
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    evaluate_every: int = 50
    evaluation_batches: int = 4
    untimed_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "evaluation_batches"):
            if getattr(self, name) < 1:
                raise TrainingError(
                    f"{name} must be at least 1, got {getattr(self, name)}",
                    fix=f"give a positive {name}",
                )
        for name in ("warmup_steps", "untimed_steps"):
            if getattr(self, name) < 0:
                raise TrainingError(
                    f"{name} must not be negative, got {getattr(self, name)}",
                    fix=f"give {name}=0 or more",
                )
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise TrainingError(
                f"learning_rate and clip_norm must be positive, got {self.learning_rate} "
                f"and {self.clip_norm}",
                why="without them no step would change a weight",
                fix="give positive numbers; a large clip_norm clips nothing",
            )

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: warm-up, then a cosine to the end.

        Source: Loshchilov & Hutter 2017, without restarts.

        >>> config = TrainConfig(steps=10, learning_rate=1.0, warmup_steps=2)
        >>> [config.learning_rate_at(step) for step in (0, 1, 2)]
        [0.5, 1.0, 1.0]
        """
        if step < self.warmup_steps:
            # Counted from 1, so that the first step trains too.
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)
