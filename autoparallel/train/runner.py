"""One training run, from its configuration to its last checkpoint: the loop, and what is around it.

    config -> rows -> plain model -> plan -> split module -> steps

The plain model and the loop know nothing of ranks. `make_plan` and `apply_plan` split the model,
`Rows` lets each data-parallel rank read its own part of a batch, and everything that ranks must do
alike (to stop, to save, to skip a step) is decided by numbers that all of them have.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autoparallel.support.cache_files import write_whole
from autoparallel.support.units import seconds_text
from autoparallel.train.config import TrainingError
from autoparallel.train.config_text import config_to_toml
from autoparallel.train.preflight import join_processes, rank_and_world
from autoparallel.train.prepared_run import Run
from autoparallel.train.run_checkpoints import Position
from autoparallel.train.run_config import RunConfig
from autoparallel.train.run_log import RunLog

__all__ = ["Result", "StoppedError", "run_training"]


_SAME_SIGNAL_SECONDS = 3.0


class StoppedError(TrainingError):
    """A run that has ended by itself before its last step."""


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a run.

    steps: that are done. losses: of the steps of this process's part of the run. held_out: the last
    held-out loss, None where there was no evaluation. signal: the number of the signal that ended
    it, 0 for none. skipped: steps whose numbers were not finite. median_seconds: of a step.
    """

    steps: int
    losses: tuple[float, ...]
    held_out: float | None
    signal: int
    skipped: int
    median_seconds: float


def run_training(config: RunConfig) -> Result:
    """Train as a configuration says, and return the end of the run.

    Under torchrun every process calls it, and they train one model together. Raises TrainingError,
    CorpusError and the errors of make_plan before the first step where the run cannot be as it is
    asked for, StoppedError where it cannot go on, and CheckpointError where its end is not saved.

    Example: `run_training(read_config("gpt-tiny", ["--training.steps=20"])).losses`
    """
    device = join_processes(config.parallel.timeout_seconds)
    log = RunLog(config.log, Path(config.folder), enabled=rank_and_world()[0] == 0)
    run = Run(config, log, device)
    if log.enabled:
        write_whole(run.folder / "config.toml", config_to_toml(config).encode())
        write_whole(run.folder / "plan.json", run.plan.to_json().encode())
    log.open(run.position.step)
    log.header(run.header())
    try:
        with _signals() as received, log.bar(run.position.step, config.training.steps):
            result = _steps(run, received)
    finally:
        log.close()
    if log.enabled and not result.signal:
        _say_end(run, result)
    return result


def _steps(run: Run, received: list[int]) -> Result:
    """Run the steps that are left."""
    config, position = run.config, run.position
    losses: list[float] = []
    seconds: list[float] = []
    skipped, in_a_row, held_out = 0, 0, None
    if config.evaluation.every and position.step == 0:
        held_out = _evaluated(run)
    while position.step < config.training.steps:
        stop = _agreed_signal(run, received)
        if stop:
            run.checkpoints.save(run.module, run.optimizers, position, last=True)
            return Result(position.step, tuple(losses), held_out, stop, skipped, _median(seconds))
        start = time.perf_counter()
        batch = position.next_batch()
        loss_value = float(run.gradients(batch))
        norm = run.norm()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            skipped, in_a_row = skipped + 1, in_a_row + 1
            run.clear()
            position = run.position = _not_finite(run, batch, loss_value, norm, in_a_row)
            continue
        in_a_row = 0
        rate = run.update(position.step)
        seconds.append(time.perf_counter() - start)
        losses.append(loss_value)
        position.step += 1
        position.tokens += run.tokens_of_a_step
        run.log.step(
            {
                "step": position.step,
                "loss": loss_value,
                "gradient_norm": norm,
                "learning_rate": rate,
                "tokens_per_second": run.tokens_of_a_step / seconds[-1],
                "seconds": seconds[-1],
                "memory_gib": _memory_nbytes(run.device) / 2**30,
                "tokens": position.tokens,
                "time": time.time(),
                **run.speed(seconds[-1]),
            },
            config.training.steps,
        )
        done = position.step == config.training.steps
        if config.evaluation.every and (position.step % config.evaluation.every == 0 or done):
            held_out = _evaluated(run)
        if run.checkpoints.is_due(position.step) and not done:
            run.checkpoints.save(run.module, run.optimizers, position)
    run.checkpoints.save(run.module, run.optimizers, position, last=True)
    return Result(position.step, tuple(losses), held_out, 0, skipped, _median(seconds))


def _not_finite(run: Run, batch: int, loss: float, norm: float, in_a_row: int) -> Position:
    """Do what the policy says after a step whose numbers are not finite; return the place after it.

    All ranks have the same loss and the same norm, and so do the same.
    """
    training, position = run.config.training, run.position
    what = f"step {position.step + 1}: the loss is {loss}, the norm of the gradients {norm}"
    if training.nonfinite == "stop" or in_a_row > training.most_skipped:
        raise StoppedError(
            what,
            why="nothing was updated by it; training.nonfinite = "
            f"{training.nonfinite!r}, {in_a_row} in a row",
            fix="lower the learning rate, see the rows of batch "
            f'{batch}, or training.nonfinite = "skip" or "rollback"; a new start goes on from the '
            "last checkpoint",
        )
    if training.nonfinite == "skip":
        run.log.say(f"{what}; the step is skipped")
        # A step of the schedule, but not of the optimizer.
        position.step += 1
        return position
    earlier = run.checkpoints.again(run.module, run.optimizers)
    if earlier is None:
        run.log.say(f"{what}; there is no checkpoint yet, and its rows are left out")
        position.left_out.append(batch)
        return position
    run.log.say(f"{what}; back to step {earlier.step}, without the rows of batch {batch}")
    return replace(earlier, left_out=[*position.left_out, batch])


def _evaluated(run: Run) -> float:
    """Evaluate, tell it, and return the loss."""
    loss = run.evaluate()
    run.log.evaluated({"step": run.position.step, "held_out_loss": loss})
    return loss


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note SIGTERM and SIGINT in a list, in place of ending; a second one ends at once.

    One that follows within seconds is the same: a terminal and torchrun both pass Ctrl-C on.
    """
    received: list[int] = []
    before: dict[int, Any] = {}
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if received and time.monotonic() - first > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        received.append(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    # Not in the main thread: then whoever runs it sees to signals.
    except ValueError:
        pass
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _agreed_signal(run: Run, received: list[int]) -> int:
    """Return the number of a signal that some rank has received, the same on all; 0 for none."""
    own = received[0] if received else 0
    if run.world_size == 1:
        return own
    number = torch.tensor(own, device=run.device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def _memory_nbytes(device: torch.device) -> int:
    """Return the memory that this process has: of the device, or of the host if that is it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096


def _median(values: list[float]) -> float:
    """Return the median of the steps' seconds, without the first ones, which allocate."""
    rest = sorted(values[5:] or values)
    return rest[len(rest) // 2] if rest else 0.0


def _say_end(run: Run, result: Result) -> None:
    """Say what was predicted and measured, and where the results are."""
    rows = {"ended": f"after {result.steps} steps"}
    if result.held_out is not None:
        rows["ended"] += f", held-out loss {result.held_out:.4f}"
    if result.skipped:
        rows["skipped"] = f"{result.skipped} steps whose numbers were not finite"
    if result.median_seconds and run.predicted_seconds:
        rows["step"] = (
            f"{seconds_text(run.predicted_seconds)} predicted for {run.plan.hardware}, "
            f"{seconds_text(result.median_seconds)} measured (median)"
        )
    picture = run.log.draw()
    rows["written"] = f"{run.folder}" + (f", with {picture.name}" if picture else "")
    run.log.header(rows)
