"""A split model in the training loops of others: Hugging Face's Trainer and accelerate."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from processes import run_processes
from small_classifier import plain, rows
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import autoparallel
from autoparallel.plan import Plan

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SIZES))


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (24, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


class Logged(TrainerCallback):
    """Keeps losses and gradient norms as the Trainer logs them."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.rows.append((logs["loss"], logs["grad_norm"]))


def trained(model: Any, folder: Path) -> list[tuple[float, float]]:
    """Four steps of Hugging Face's Trainer, as a script has them."""
    logged = Logged()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=texts(), callbacks=[logged]).train()
    return logged.rows


@cache
def plan_llama(world_size: int) -> Plan:
    batch = {name: torch.stack([row[name] for row in texts()[:4]]) for name in texts()[0]}
    return autoparallel.make_plan(llama(), world_size, example_inputs=batch)


def split_llama(world_size: int) -> Any:
    return autoparallel.apply_plan(llama(), plan_llama(world_size))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_hugging_face_trainer_of_one_process(tmp_path: Path) -> None:
    """It reads the signature of forward to choose the columns of the dataset."""
    split = trained(split_llama(1), tmp_path)
    torch.testing.assert_close(torch.tensor(split), torch.tensor(trained(llama(), tmp_path)))


def as_launched(rank: int) -> None:
    """Tell the process what torchrun would, of two processes."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="localhost", MASTER_PORT="29500")


def trained_in_processes(rank: int, folder: str) -> list[tuple[float, float]]:
    as_launched(rank)
    split = split_llama(2)
    # Every process is to train for itself, all on the same batches: it does so when it finds no
    # trace of a launcher. The process group is there already.
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        del os.environ[name]
    return trained(split, Path(folder) / str(rank))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_hugging_face_trainer_of_two_processes(tmp_path: Path) -> None:
    expected = torch.tensor(trained(llama(), tmp_path))
    before = partial(plan_llama, 2)
    for losses in run_processes(trained_in_processes, 2, str(tmp_path), before=before):
        torch.testing.assert_close(torch.tensor(losses), expected)


def accelerated(rank: int) -> tuple[list[float], list[float]]:
    """Every process has its share of each batch, as accelerate's loaders give it; the loss is that
    of all of them.
    """
    as_launched(rank)
    data = TensorDataset(*rows(16, 0))
    accelerator = Accelerator(cpu=True)
    model: Any = autoparallel.autoparallelize(
        plain(), 2, mesh=autoparallel.Mesh(tp=2), example_inputs=data[:4], local_inputs="tp"
    )
    # evaluation_mode: it is not wrapped in DistributedDataParallel.
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer, loader = accelerator.prepare(optimizer, DataLoader(data, batch_size=4))
    losses = []
    for x, labels in loader:
        loss = model(x, labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    reference = plain()
    optimizer, expected = torch.optim.AdamW(reference.parameters(), lr=1e-2), []
    for x, labels in DataLoader(data, batch_size=8):
        loss = reference(x, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    return losses, expected


def test_accelerate() -> None:
    for losses, expected in run_processes(accelerated, 2):
        assert len(losses) == 2
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
