"""A dry run tells what a run would do, without devices, text or weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoparallel.analysis.timeline import timeline
from autoparallel.plan import Plan
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.train.built_models import build_model
from autoparallel.train.config_text import config_to_toml
from autoparallel.train.preflight import rank_and_world
from autoparallel.train.prepared_run import plan_of_run
from autoparallel.train.row_sources import stand_in_rows
from autoparallel.train.run_config import RunConfig
from autoparallel.view.report import plan_text

__all__ = ["DryRun", "dry_run"]

# The entries of a row of metrics.jsonl.
LOGGED = (
    "step loss gradient_norm learning_rate tokens_per_second seconds memory_gib tokens time "
    "tflops_per_second mfu"
)


@dataclass(frozen=True, slots=True)
class DryRun:
    """The expectations of a run.

    config: resolved. plan: of the first ranks. parameters: of the whole model. seconds: of a step.
    tokens: of a step. nbytes: on the rank that needs most. mfu: of the step.
    """

    config: RunConfig
    plan: Plan
    parameters: int
    seconds: float
    tokens: int
    nbytes: int
    mfu: float

    def to_rows(self) -> dict[str, Any]:
        """Return the figures and the plan as JSON has them."""
        return {
            "config": config_to_toml(self.config),
            "parameters": self.parameters,
            "predicted_seconds": self.seconds,
            "tokens_of_a_step": self.tokens,
            "predicted_nbytes": self.nbytes,
            "predicted_mfu": self.mfu,
            "logged": LOGGED.split(),
            "plan": json.loads(self.plan.to_json()),
        }

    def __str__(self) -> str:
        hours = self.seconds * self.config.training.steps / 3600
        each = self.tokens / self.seconds if self.seconds else 0.0
        return "\n".join([
            config_to_toml(self.config),
            plan_text(self.plan),
            f"parameters   {self.parameters:,}",
            f"step         {seconds_text(self.seconds)} predicted for {self.plan.hardware}, "
            f"{self.tokens:,} tokens, {each:,.0f} tokens/s, MFU {self.mfu:.1%}",
            f"run          {self.config.training.steps:,} steps, {hours:,.2f} hours predicted",
            f"memory       {bytes_text(self.nbytes)} on the rank that needs most",
            f"logged       {LOGGED} (metrics.jsonl)",
        ])  # fmt: skip


def dry_run(config: RunConfig, ranks: int | None = None) -> DryRun:
    """Return what a run would do on so many ranks.

    ranks: by default those that torchrun started, or that parallel.mesh names, or one. The text is
    not read: the tokenizer is taken to have data.vocabulary tokens. Raises the errors of
    run_training that come before the first step, as far as they need neither text nor devices.

    Example: `print(dry_run(read_config("gpt2-8.3b"), 512))`
    """
    world_size = ranks or max(rank_and_world()[1], _of_mesh(config.parallel.mesh))
    source = stand_in_rows(config)
    meta = replace(config, model=replace(config.model, meta=True))
    model = build_model(meta, source.vocabulary)
    example = source.rows("train", 0, 0, config.rows_of_a_pass)
    plan = plan_of_run(config, model, example, world_size, torch.device("cpu"))
    tokens = config.training.batch * max(value[0].numel() for value in example.values())
    seconds, mfu = plan.seconds * config.training.accumulate, 0.0
    if plan.is_traced and plan.pipeline is None:
        step = timeline(plan)
        seconds = step.seconds * tokens / (step.tokens or tokens)
        mfu = step.mfu
    return DryRun(
        config,
        plan,
        sum(parameter.numel() for parameter in model.parameters()),
        seconds,
        tokens,
        sum(nbytes for _, nbytes in plan.memory),
        mfu,
    )


def _of_mesh(text: str) -> int:
    """Return the ranks that the sizes in `parallel.mesh` make."""
    count = 1
    for part in text.split(","):
        count *= int(part.partition("=")[2] or 1)
    return count
