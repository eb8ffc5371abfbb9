"""A split model in a loop as torchtitan has it: mesh, rows of each rank, passes, checkpoints.

    python examples/with_own_loop.py out/with_own_loop
    torchrun --nproc-per-node 4 examples/with_own_loop.py out/with_own_loop --steps 80 --dp 2

The second command goes on from the first one's checkpoint on four processes, in two groups that
read different rows and share the model by tensor parallelism. The checkpoints are those of
torch.distributed.checkpoint. --passes 2 takes the rows of a step through the model in two passes.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_llama import (
    BATCH,
    CLIP_NORM,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Rows,
    example_batch,
    held_out_loss,
    llama,
    options,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import autoparallel
from autoparallel.parallel.accumulation import no_sync
from autoparallel.parallel.seeds import rng_state, set_rng_state


class TrainState(Stateful):
    """What a run goes on from, as torch.distributed.checkpoint asks for it."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the state."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model, "optimizer": optimizer, "step": self.step,
            "rng": rng_state(self.model),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the parts that this rank has now."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        set_rng_state(self.model, state["rng"])
        self.step = state["step"]


def rows_of(step: int, rows: Tensor, part: int, chosen: Any) -> Tensor:
    """Return the rows of a step that a group of ranks reads, those of each pass by themselves."""
    numbers = (step * BATCH + torch.arange(BATCH)) % len(rows)
    return rows[numbers].view(chosen.passes, chosen.dp, -1, rows.shape[1])[:, part]


def train(model: Any, chosen: Any, part: int) -> None:
    """Run the steps that are left; `part` is which of the groups of ranks this one is in."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    state = TrainState(model, torch.optim.AdamW(groups, lr=LEARNING_RATE))
    last = max(chosen.folder.glob("step-*"), default=None, key=step_of)
    if last is not None:
        dcp.load({"app": state}, checkpoint_id=last, no_dist=not dist.is_initialized())
    rows = Rows().rows
    while state.step < chosen.steps:
        passes = rows_of(state.step, rows, part, chosen)
        total = 0.0
        for number, batch in enumerate(passes, 1):
            # Gradients of all passes are summed over the ranks once, with the last one.
            with nullcontext() if number == chosen.passes else no_sync(model):
                loss = model(input_ids=batch, labels=batch).loss / chosen.passes
                loss.backward()
            total += float(loss.detach())
        norm = autoparallel.clip_grad_norm_(parameters, CLIP_NORM)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        if rank() == 0 and state.step % 10 == 0:
            print(f"step {state.step}  loss {total:.4f}  norm {float(norm):.3f}", file=sys.stderr)
        if state.step % chosen.save_every == 0 or state.step == chosen.steps:
            folder = chosen.folder / f"step-{state.step}"
            dcp.save({"app": state}, checkpoint_id=folder, no_dist=not dist.is_initialized())


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(folder.name.removeprefix("step-"))


def rank() -> int:
    """Return this process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def main() -> float:
    """Train; say and return the held-out loss."""
    chosen = options(__doc__, in_groups=True)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group()
    shares = world_size // chosen.dp
    plan = autoparallel.make_plan(
        llama(),
        mesh=autoparallel.Mesh(dp=chosen.dp, tp=shares),
        example_inputs=example_batch(),
    )
    model = autoparallel.apply_plan(llama(), plan, local_inputs="dp" if chosen.dp > 1 else None)
    train(model, chosen, part=rank() // shares)
    loss = held_out_loss(model)
    if rank() == 0:
        print(f"held-out loss {loss!r}")
    return loss


if __name__ == "__main__":
    main()
