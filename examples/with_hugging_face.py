"""A split model in Hugging Face's Trainer: one class, and the rest is as it is for a plain model.

    python examples/with_hugging_face.py out/with_hugging_face
    torchrun --nproc-per-node 2 examples/with_hugging_face.py out/with_hugging_face --steps 80

The second command goes on from the first one's checkpoint. Rows, accumulation, schedules, logs and
callbacks are the Trainer's own.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
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
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import autoparallel


class SplitTrainer(Trainer):
    """A Trainer of one model that all processes compute together.

    The library takes a process for one more copy of the model, with rows of its own and gradients
    that are averaged. Here all ranks read the same rows, and there is nothing to average.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Leave the model as it is, with no DDP around it, and give every rank all rows."""
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
        accelerator.prepare_data_loader = lambda loader, *_, **__: prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        # All ranks have the losses and the outputs of all rows.
        accelerator.gather_for_metrics = lambda values, *_, **__: values

    def get_tp_size(self) -> int:
        """Return how many ranks have the same rows, by which the library counts their tokens."""
        return int(self.args.world_size)

    def prediction_step(self, *arguments: Any, **options: Any) -> tuple[Any, Any, Any]:
        """Return the loss, the whole logits and the labels: large outputs come split."""
        loss, logits, labels = super().prediction_step(*arguments, **options)
        return loss, _whole(logits), labels

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write whole weights, as from_pretrained reads them. Putting them together takes all."""
        whole = autoparallel.full_state_dict(self.model) if state_dict is None else state_dict
        if self.args.should_save:
            super()._save(output_dir, whole)
        else:  # what the library asks the model meanwhile takes all ranks, too
            self.model.save_pretrained(output_dir, state_dict=whole, is_main_process=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write what a run goes on from, each rank its parts, for any number of ranks."""
        extra = {"scheduler": self.lr_scheduler.state_dict()}
        autoparallel.save_checkpoint(
            Path(output_dir, "split"), self.model, self.optimizer.optimizer, extra
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Leave it to the next method, which reads weights and optimizer at once."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read them, on any number of ranks."""
        if checkpoint is not None:
            extra = autoparallel.load_checkpoint(
                Path(checkpoint, "split"), self.model, self.optimizer.optimizer
            )
            self.lr_scheduler.load_state_dict(extra["scheduler"])


def _whole(values: Any) -> Any:
    """Return a tensor, or tensors in tuples and dicts, put together."""
    if isinstance(values, tuple | list):
        return type(values)(map(_whole, values))
    if isinstance(values, dict):
        return {name: _whole(value) for name, value in values.items()}
    return values.full_tensor() if isinstance(values, DTensor) else values


def main() -> float:
    """Train; say and return the held-out loss."""
    chosen = options(__doc__)
    arguments = TrainingArguments(
        output_dir=str(chosen.folder),
        max_steps=chosen.steps,
        per_device_train_batch_size=BATCH // chosen.passes,
        gradient_accumulation_steps=chosen.passes,
        per_device_eval_batch_size=BATCH,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_steps=chosen.save_every,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model = autoparallel.autoparallelize(llama(), world_size, example_inputs=example_batch())
    trainer = SplitTrainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(held_out=True))
    last = get_last_checkpoint(str(chosen.folder)) if chosen.folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    evaluated = trainer.evaluate()["eval_loss"]
    loss = held_out_loss(model)
    if trainer.is_world_process_zero():
        print(f"held-out loss {loss!r}; the Trainer's own: {evaluated:.4f}")
    return loss


if __name__ == "__main__":
    main()
