"""The learning rate over the steps, as a share of the highest."""

from __future__ import annotations

import math

from autoparallel.train.run_config import ScheduleConfig

__all__ = ["rate_factor"]


def rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the share of the highest learning rate at a step, counted from 0.

    A linear rise, then a fall to `final_fraction`. steps: of the whole run.
    Source: Loshchilov & Hutter 2017 for the cosine, without restarts.

    >>> config = ScheduleConfig(kind="linear", warmup=2, final_fraction=0.0)
    >>> [rate_factor(config, step, 6) for step in (0, 1, 2, 4, 6)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < config.warmup:
        # Counted from 1, so that the first step trains too.
        return (step + 1) / config.warmup
    if config.kind == "constant":
        return 1.0
    last = config.decay_steps or steps
    progress = min(1.0, (step - config.warmup) / max(1, last - config.warmup))
    left = 1 - progress if config.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_fraction + (1 - config.final_fraction) * left
