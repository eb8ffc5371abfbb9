"""A run in one process: its rows, its split module, its optimizers, its place; and their work.

The plain model knows nothing of ranks. `make_plan` and `apply_plan` split it, and the rows of a
batch are read by each data-parallel rank for itself.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoparallel.analysis.timeline import timeline
from autoparallel.api import apply_plan, make_plan
from autoparallel.mesh import Mesh
from autoparallel.parallel.accumulation import no_sync
from autoparallel.parallel.checkpoint_files import together
from autoparallel.parallel.gradient_norms import clip_grad_norm_
from autoparallel.parallel.seeds import manual_seed
from autoparallel.plan import Plan
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.train.built_models import build_model, objective_of, require_rows_fit
from autoparallel.train.config import TrainingError
from autoparallel.train.config_text import config_to_toml
from autoparallel.train.optimizers import make_optimizers, set_rates
from autoparallel.train.outputs import loss_of
from autoparallel.train.preflight import (
    gathered,
    mesh_of_run,
    rank_and_world,
    require_room,
    require_same_data,
    require_same_run,
)
from autoparallel.train.row_sources import open_rows
from autoparallel.train.rows import Batch, Rows
from autoparallel.train.run_checkpoints import Position, RunCheckpoints
from autoparallel.train.run_config import RunConfig
from autoparallel.train.run_log import RunLog
from autoparallel.train.schedule import rate_factor
from autoparallel.train.weights import import_weights

__all__ = ["Run", "plan_of_run", "precision_of"]

# The mesh axis along which each rank brings rows of its own.
DATA_AXIS = "dp"


def precision_of(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which the model is called.

    With bf16 parameters stay float32: they are the master copy, their gradients are float32 too,
    and so are the sums of these over ranks and passes.
    """
    if config.training.precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def plan_of_run(
    config: RunConfig, model: nn.Module, example: Batch, world_size: int, device: torch.device
) -> Plan:
    """Return the plan of a run: the one that it names, or the best one.

    example: a batch of one forward pass, of all ranks. Raises as make_plan does, and TrainingError
    for a file that cannot be read, and for a model that does not take such rows.
    """
    require_rows_fit(model, example)
    options = config.parallel
    if options.plan:
        try:
            return Plan.from_json(Path(options.plan).read_text())
        except OSError as error:
            raise TrainingError(
                f"no plan in {options.plan}",
                why=error.strerror or str(error),
                fix="name a file that Plan.to_json wrote: parallel.plan",
            ) from error
    mesh: Mesh | str | None = mesh_of_run(options.mesh, world_size) or "auto"
    # Without another axis products are split by weights alone, as tensor parallelism has it.
    if isinstance(mesh, Mesh) and [name for name, _ in mesh.axes] == ["tp"]:
        mesh = None
    if any(parameter.is_meta for parameter in model.parameters()):
        example = {name: value.to("meta") for name, value in example.items()}
    with precision_of(config, device):
        return make_plan(
            model,
            world_size,
            mesh=mesh,
            example_inputs=example,
            sequence_parallel=options.sequence_parallel,
            hardware=options.hardware,
            memory_limit=options.memory_limit or None,
            recompute=options.recompute or None,
            constraints=options.constraints,
            layout=options.layout or None,
            microbatches=options.microbatches or None,
            schedule=options.schedule or None,
            stages_per_rank=options.stages_per_rank or None,
        )


class Run:
    """A run in one process: everything that its steps need."""

    def __init__(self, config: RunConfig, log: RunLog, device: torch.device) -> None:
        self.config, self.log, self.device = config, log, device
        self.rank, self.world_size = rank_and_world()
        require_same_run(config)
        source = open_rows(config, self.log.say if self.rank == 0 else lambda text: None)
        self.rows: Rows = source.rows
        self.folder = Path(config.folder)
        require_same_data(source.digest)
        self.checkpoints = RunCheckpoints(config.checkpoint, self.folder, log.say)
        together("looking for checkpoints", self.checkpoints.require_start)
        plain = build_model(config, source.vocabulary)
        if not config.model.meta:
            plain = plain.to(device)
        self.parameters = sum(parameter.numel() for parameter in plain.parameters())
        # Weights, and two moments of each: all of them in the checkpoint.
        nbytes = sum(3 * p.numel() * p.element_size() for p in plain.parameters())
        self._everywhere(lambda: require_room(self.folder, nbytes * bool(config.checkpoint.every)))
        example = self._to_device(self.rows("train", 0, 0, config.rows_of_a_pass))
        self.plan = plan_of_run(config, plain, example, self.world_size, device)
        self.data_ranks, self.data_rank = self._place(self.plan.whole_mesh)
        # A plan that was read from a file is traced here.
        with precision_of(config, device):
            self.module = apply_plan(
                plain,
                self.plan,
                example_inputs=self._own(example),
                check_inputs=config.parallel.check_inputs,
                local_inputs=DATA_AXIS if self.data_ranks > 1 else None,
            )
        manual_seed(self.module, config.training.seed)
        if config.model.weights:
            self._import_weights(Path(config.model.weights))
        self.optimizers = make_optimizers(self.module, config.optimizer)
        self.position = self._begin(source.digest)
        self.source, self.vocabulary = source.description, source.vocabulary

    def _begin(self, digest: str) -> Position:
        """Go on from a checkpoint, or begin anew; say which."""
        position = self.checkpoints.resume(self.module, self.optimizers)
        if position is None:
            position = Position(data=digest)
        else:
            self.log.say(f"resumed from step {position.step}")
            if position.data != digest:
                self.log.say(
                    "the data is not that of the checkpoint: rows come from the new one from here"
                )
        position.data, position.config = digest, config_to_toml(self.config)
        position.plan = self.plan.to_json()
        return position

    def _import_weights(self, folder: Path) -> None:
        """Begin with the weights in a folder; say which tensors are not in both."""
        fine_tuned = objective_of(self.config) == "choices"
        missing, strange = import_weights(self.module, folder, fine_tuned=fine_tuned)
        for names, fate in ((missing, "drawn anew"), (strange, "left out")):
            if names:
                self.log.say(f"weights of {folder}: {', '.join(names)} {fate}")

    def _everywhere(self, check: Any) -> None:
        """Run a check on every rank, and raise on all of them what the first one raised."""
        failure: Exception | None = None
        try:
            check()
        except TrainingError as error:
            failure = error
        failures = [(rank, error) for rank, error in enumerate(gathered(failure)) if error]
        if failures:
            rank, first = failures[0]
            raise TrainingError(first.what, where=f"rank {rank}", why=first.why, fix=first.fix)

    def _place(self, mesh: Mesh) -> tuple[int, int]:
        """Return how many ranks bring rows of their own, and which of them this one is."""
        stride = 1
        for name, size in reversed(mesh.axes):
            if name == DATA_AXIS:
                return size, self.rank // stride % size
            stride *= size
        return 1, 0

    def _part(self, count: int) -> tuple[int, int]:
        """Return the first of `count` rows that this rank reads, and how many."""
        begin = count * self.data_rank // self.data_ranks
        return begin, count * (self.data_rank + 1) // self.data_ranks - begin

    def _own(self, batch: Batch) -> Batch:
        """Return this rank's rows of a whole batch."""
        begin, count = self._part(len(next(iter(batch.values()))))
        return {name: value[begin : begin + count] for name, value in batch.items()}

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _read(self, part: str, number: int, first: int, count: int) -> Batch:
        """Return this rank's part of some rows of a batch."""
        begin, own = self._part(count)
        return self._to_device(self.rows(part, number, first + begin, own))

    def gradients(self, number: int) -> Tensor:
        """Run the passes of a step on a batch of rows; return the mean loss of its passes."""
        passes, total = self.config.training.accumulate, None
        for index in range(passes):
            rows = self.config.rows_of_a_pass
            batch = self._read("train", number, index * rows, rows)
            last = index == passes - 1
            with nullcontext() if last else no_sync(self.module):
                with precision_of(self.config, self.device):
                    loss = loss_of(self.module(**batch)) / passes
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def update(self, step: int) -> float:
        """Step the optimizers at the rate of a step, counted from 0; return that rate."""
        training = self.config.training
        rate = set_rates(self.optimizers, rate_factor(self.config.schedule, step, training.steps))
        for optimizer in self.optimizers:
            optimizer.step()
        self.clear()
        return rate

    def clear(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def norm(self) -> float:
        """Return the norm of all gradients together, clipped if it is to be."""
        limit = self.config.training.clip_norm or math.inf
        return float(clip_grad_norm_(self.module.parameters(), limit))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss of the held-out batches, in evaluation mode."""
        rows, total = self.config.rows_of_a_pass, 0.0
        self.module.eval()
        for number in range(self.config.evaluation.batches):
            with precision_of(self.config, self.device):
                total += float(loss_of(self.module(**self._read("held_out", number, 0, rows))))
        self.module.train()
        return total / self.config.evaluation.batches

    @cached_property
    def predicted_seconds(self) -> float | None:
        """The predicted time of a step; None for a plan that was read from a file."""
        if self.plan.pipeline is not None:
            planned = (math.prod(each.planned) for each in self.plan.inputs)
            return self.plan.seconds * self.tokens_of_a_step / max(planned)
        step = self._timeline
        if step is None:
            return None
        # The plan is made as for a longer batch, where the real one is short.
        tokens = step.tokens or self.tokens_of_a_step
        return step.seconds * self.tokens_of_a_step / tokens

    @cached_property
    def _timeline(self) -> Any:
        told = self.plan.is_traced and self.plan.pipeline is None
        return timeline(self.plan) if told else None

    @cached_property
    def tokens_of_a_step(self) -> int:
        """The elements of the largest input of a step, of all ranks together."""
        batch = self.rows("train", 0, 0, 1)
        return self.config.training.batch * max(value[0].numel() for value in batch.values())

    def speed(self, seconds: float) -> dict[str, float]:
        """Return the FLOP/s of a step, as far as they are known, for its row in the log."""
        step = self._timeline
        if step is None or not step.tokens:
            return {}
        flops = step.flops * self.tokens_of_a_step / step.tokens
        row = {"tflops_per_second": flops / seconds / 1e12}
        # The peak of "cpu" is that of some machine, not of this one.
        if self.plan.hardware != "cpu" and step.peak:
            row["mfu"] = flops / seconds / step.peak
        return row

    def header(self) -> dict[str, str]:
        """Return what is said before the first step."""
        training, ranks = self.config.training, self.world_size
        local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel()
                    for p in self.module.parameters() if not p.is_meta)  # fmt: skip
        memory = sum(nbytes for _, nbytes in self.plan.memory)
        expected = self.predicted_seconds
        passes = f" in {training.accumulate} passes" if training.accumulate > 1 else ""
        return {
            "run": f"{self.folder}, seed {training.seed}, torch {torch.__version__}",
            "devices": f"{ranks} rank{'s' * (ranks > 1)} on {self.device.type}, "
            f"{self.plan.whole_mesh}",
            "model": f"{self.config.model.kind}, {self.parameters:,} parameters, {local:,} on "
            "rank 0",
            "data": f"{self.source}; {training.batch} rows a step{passes}, "
            f"{self.tokens_of_a_step:,} tokens",
            "plan": _in_few_lines(self.plan),
            "predicted": (seconds_text(expected) if expected else "unknown") + " a step, "
            + (bytes_text(memory) if memory else "unknown") + " on the rank that needs most",
        }  # fmt: skip


def _in_few_lines(plan: Plan) -> str:
    """Return what a plan does; its own figures are for its own batch, and are told as the run's."""
    told = ("mesh", "pipeline", "hardware", "split", "collectives", "recomputed", "plain")
    return "\n".join(line for line in str(plan).splitlines() if line.startswith(told))
