"""The trainer: AdamW, warm-up and cosine, clipping, held-out evaluation, counted communication.

It knows nothing of parallelism. A model over many processes trains as one in one process does:
every process runs this loop on the same batches.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autoparallel.errors import CheckpointError
from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
from autoparallel.parallel.gradient_norms import clip_grad_norm_
from autoparallel.runtime.collective_counter import CollectiveCounter
from autoparallel.train.config import Checkpoints, TrainConfig
from autoparallel.train.data import Batches
from autoparallel.train.metrics import RunRecord, Traffic
from autoparallel.train.outputs import loss_of
from autoparallel.train.progress import progress

__all__ = ["clip_gradients", "evaluate", "make_optimizer", "train"]

_log = logging.getLogger(__name__)

FinishGradients = Callable[[nn.Module, float], Any]


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    name: str = "train",
    finish_gradients: FinishGradients | None = None,
    checkpoints: Checkpoints | None = None,
) -> RunRecord:
    """Train the model in place and return the record of the run.

    model: plain or split. batches: the same on every rank. config: options of the run. name: of the
    run. finish_gradients(model, clip_norm): called between backward and the step; the default is
    clip_grad_norm_, and hand-written parallel models need their own. checkpoints: where to
    save, and to go on from if there is one; the number of ranks may have changed since.
    In a process group every rank must call this with equal arguments; rank 0 shows progress. Raises
    TrainingError if the model returns no loss.

    Example: `train(GPT(GPTConfig()), Batches(prepare_corpus(), 8, 128), TrainConfig(steps=100))`
    """
    finish = clip_gradients if finish_gradients is None else finish_gradients
    optimizer = make_optimizer(model, config)
    device = next(model.parameters()).device
    history: dict[str, list[Any]] = {"losses": [], "seconds": [], "held_out": []}
    if checkpoints is not None:
        history = _loaded(checkpoints, model, optimizer).get("history", history)
    losses, seconds, held_out = history["losses"], history["seconds"], history["held_out"]
    begun = len(losses)
    # Not the first step, whose lazy work would count too.
    counted_step = min(begun + 1, config.steps - 1)
    counters = {phase: CollectiveCounter() for phase in ("forward", "backward", "update")}
    if not held_out:
        held_out.append((0, evaluate(model, batches, config.evaluation_batches)))

    with progress(name, config.steps, enabled=_rank() == 0) as report:
        for step in range(begun, config.steps):
            batch = {key: value.to(device) for key, value in batches.train(step).items()}
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)

            def phase(name: str, counted: bool = step == counted_step) -> AbstractContextManager:
                return counters[name] if counted else nullcontext()

            start = time.perf_counter()
            with phase("forward"):
                loss = loss_of(model(**batch))
            with phase("backward"):
                loss.backward()
            with phase("update"):
                finish(model, config.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())  # Waits for the device, so that the time is the step's.
            seconds.append(time.perf_counter() - start)

            done = step + 1
            if done % config.evaluate_every == 0 or done == config.steps:
                held_out.append((done, evaluate(model, batches, config.evaluation_batches)))
            if checkpoints and (done % checkpoints.every == 0 or done == config.steps):
                save_checkpoint(checkpoints.after(done), model, optimizer, {"history": history})
            report(done, f"loss {losses[-1]:.3f}  held out {held_out[-1][1]:.3f}")

    traffic = {
        phase: Traffic.of(counter.counts, counter.nbytes_by_kind)
        for phase, counter in counters.items()
    }
    return RunRecord(
        name=name,
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        local_parameters=sum(_local(parameter).numel() for parameter in model.parameters()),
        losses=tuple(losses),
        held_out=tuple(held_out),
        step_seconds=tuple(seconds),
        untimed_steps=config.untimed_steps,
        counted_step=counted_step,
        **traffic,
    )


def _loaded(
    checkpoints: Checkpoints, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Go on from the newest checkpoint whose files are as they were written; return its `extra`.

    It is empty where there is no checkpoint. Damaged ones are passed over with a warning. Raises
    CheckpointError where all are damaged: to begin anew would replace them.
    """
    folders = checkpoints.newest_first()
    for folder in folders:
        try:
            return load_checkpoint(folder, model, optimizer)
        except CheckpointError as error:
            if folder == folders[-1]:
                raise
            _log.warning("going on from the checkpoint before %s: %s", folder.name, error)
    return {}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return an AdamW that decays matrices and leaves vectors (biases, norms) alone.

    Source: Loshchilov & Hutter 2019; the two groups are those of Brown et al. 2020's descendants.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def clip_gradients(model: nn.Module, clip_norm: float) -> None:
    """Scale all gradients in place so that their common norm is at most clip_norm."""
    clip_grad_norm_(model.parameters(), clip_norm)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, count: int) -> float:
    """Return the mean loss over the first `count` batches of held-out text.

    The model is in evaluation mode meanwhile; afterwards its mode is as it was. No gradients.
    """
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for index in range(count):
        batch = {key: value.to(device) for key, value in batches.held_out(index).items()}
        total += loss_of(model(**batch)).item()
    model.train(training)
    return total / count


def _local(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that this rank holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0
