"""A split model in Lightning: configure_model splits it, and ModelParallelStrategy does the rest.

    python examples/with_lightning.py out/with_lightning
    torchrun --nproc-per-node 2 examples/with_lightning.py out/with_lightning --steps 80

The second command goes on from the first one's checkpoint, which is in parts and fits any number of
ranks. It needs `pip install lightning`.
"""

from __future__ import annotations

import os
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
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
from torch.utils.data import DataLoader, Subset

import autoparallel
from autoparallel.parallel.seeds import rng_state, set_rng_state


class Llama(lightning.LightningModule):
    """The model as Lightning trains it."""

    def __init__(self, passes: int = 1) -> None:
        super().__init__()
        self.model: Any = None
        self.passes = passes

    def configure_model(self) -> None:
        """Split the model; Lightning calls it when the processes know each other."""
        if self.model is None:
            world_size = self.trainer.world_size
            self.model = autoparallel.autoparallelize(
                llama(), world_size, example_inputs=example_batch()
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the rows of an epoch, from where the run is: it may go on within one."""
        rows = Rows()
        begin = self.trainer.global_step * BATCH % (len(rows) // BATCH * BATCH)
        rest = Subset(rows, range(begin, len(rows)))
        return DataLoader(rest, BATCH // self.passes, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out rows."""
        return DataLoader(Rows(held_out=True), BATCH)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Return the loss."""
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Tell the loss of held-out rows."""
        self.log("held_out_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer of the split parameters that decays matrices alone."""
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LEARNING_RATE)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the norm of all gradients together."""
        autoparallel.clip_grad_norm_(self.model.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the random numbers of the split model are."""
        checkpoint["split_rng"] = rng_state(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        set_rng_state(self.model, checkpoint["split_rng"])


def main() -> float:
    """Train; say and return the held-out loss."""
    chosen = options(__doc__)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    saved = ModelCheckpoint(chosen.folder, every_n_train_steps=chosen.save_every, save_last=True)
    trainer = lightning.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=world_size,
        # All ranks are of one model, and read the same rows.
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world_size),
        max_steps=chosen.steps,
        accumulate_grad_batches=chosen.passes,
        gradient_clip_val=CLIP_NORM,
        callbacks=[saved],
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        default_root_dir=chosen.folder,
        enable_progress_bar=False,
    )
    module = Llama(chosen.passes)
    last = chosen.folder / "last.ckpt"
    trainer.fit(module, ckpt_path=last if last.exists() else None)
    loss = held_out_loss(module.model)
    if trainer.is_global_zero:
        print(f"held-out loss {loss!r}")
    return loss


if __name__ == "__main__":
    main()
