"""What a training run is told: length, learning rate, when to evaluate."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Checkpoints", "TrainConfig"]

_STEP = re.compile(r"step_(\d+)(\.replaced)?")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where checkpoints go and how often. folder: of all. every: in steps; the last is kept too.

    A run goes on from the newest in the folder.
    """

    folder: Path
    every: int = 50

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")

    def after(self, steps: int) -> Path:
        """The checkpoint made when that many steps were done."""
        return self.folder / f"step_{steps:08}"

    def newest(self) -> Path | None:
        """The one of the most steps. Whatever has this name is whole: see save_checkpoint."""
        found = [_STEP.fullmatch(path.name) for path in sorted(self.folder.glob("step_*"))]
        steps = [int(match[1]) for match in found if match is not None]
        return self.after(max(steps)) if steps else None


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Options of one run. Raises ValueError for counts below what makes sense.

    steps: optimizer steps. warmup_steps: of a linear rise to learning_rate, then a cosine falls to
    final_fraction of it. weight_decay: on matrices alone. clip_norm: largest norm of the gradient.
    evaluate_every, evaluation_batches: in steps; batches of held-out text per evaluation.
    untimed_steps: first steps that the median step time leaves out.
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
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "untimed_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError(
                f"learning_rate and clip_norm must be positive, got {self.learning_rate} "
                f"and {self.clip_norm}"
            )

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: warm-up, then a cosine to the end.

        Source: Loshchilov & Hutter 2017, without restarts.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)
