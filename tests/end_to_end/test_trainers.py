"""A split model in the training loops of others: accelerate, and the examples of three trainers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from broad_cases import broad
from processes import run_processes
from small_classifier import plain, rows
from torch.utils.data import DataLoader, TensorDataset
from traces import trace_ahead
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import autoparallel

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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_hugging_face_trainer_of_one_process(tmp_path: Path) -> None:
    """It reads the signature of forward to choose the columns of the dataset."""
    batch = {name: torch.stack([row[name] for row in texts()[:4]]) for name in texts()[0]}
    split = trained(autoparallel.autoparallelize(llama(), 1, example_inputs=batch), tmp_path)
    torch.testing.assert_close(torch.tensor(split), torch.tensor(trained(llama(), tmp_path)))


def as_launched(rank: int) -> None:
    """Tell the process what torchrun would, of two processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), 2)
    os.environ.update({name: str(number) for name, number in {**place, **sizes}.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def import_example(name: str) -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def begun(name: str) -> None:
    """Import an example, and trace its model as each rank would in training and evaluation."""
    import_example(name)
    small = import_example("small_llama")
    batch = small.example_batch()
    small.held_out_loss(autoparallel.autoparallelize(small.llama(), 1, example_inputs=batch))


def run_example(rank: int, name: str, folder: str) -> list[float]:
    """The held-out loss after two steps, and after two more from the checkpoint."""
    losses = []
    for steps in (2, 4):
        as_launched(rank)  # Lightning takes some of it away as it ends
        sys.argv = [name, folder, f"--steps={steps}", "--save-every=2"]
        if name == "with_own_loop":
            sys.argv += ["--dp=2", "--passes=2"]
        losses.append(import_example(name).main())
    return losses


@cache
def bare_losses() -> list[float]:
    """The same of the plain model, in a loop of its own."""
    small = import_example("small_llama")
    model, rows, losses = small.llama(), small.Rows().rows, []
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for batch in rows.split(8)[:4]:
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(small.held_out_loss(model))
    return losses[1::2]


@pytest.mark.parametrize("name", ["with_own_loop", *broad("with_hugging_face", "with_lightning")])
def test_example(name: str, tmp_path: Path) -> None:
    """One recipe in three trainers on two processes, which go on from their own checkpoints."""
    if name == "with_lightning" and importlib.util.find_spec("lightning") is None:
        pytest.skip("Lightning is not installed")
    before = partial(trace_ahead, begun, name)
    for losses in run_processes(run_example, 2, name, str(tmp_path / "run"), before=before):
        # The loss of a model of transformers is of float32, whatever its weights are.
        assert losses == pytest.approx(bare_losses(), rel=1e-6)
        assert losses[1] < losses[0] < 5.5


@pytest.mark.broad
@pytest.mark.parametrize("name", ["with_own_loop", "with_hugging_face", "with_lightning"])
def test_example_as_it_is_started(name: str, tmp_path: Path) -> None:
    """Two steps under torchrun, two more in one process, each with its rows in two passes."""
    if name == "with_lightning" and importlib.util.find_spec("lightning") is None:
        pytest.skip("Lightning is not installed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for steps, before in ((2, launcher), (4, [])):
        command = [
            sys.executable, *before, str(EXAMPLES / f"{name}.py"), str(tmp_path / "run"),
            f"--steps={steps}", "--save-every=2", "--passes=2",
        ]  # fmt: skip
        paths = os.pathsep.join(path for path in sys.path if path)
        ended = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not ended.returncode, ended.stderr[-3000:]
    loss = re.search(r"held-out loss ([\d.]+)", ended.stdout)
    assert loss is not None
    assert float(loss[1]) == pytest.approx(bare_losses()[-1], rel=1e-6)


def accelerated(rank: int, folder: str) -> tuple[list[float], list[float]]:
    """Every process has its share of each batch, as accelerate's loaders give it; the loss is that
    of all of them. A step is of two batches, and the second one is of a run that goes on from the
    first one's checkpoint.
    """
    as_launched(rank)
    data = TensorDataset(*rows(16, 0))
    losses: list[float] = []
    for first in (0, 8):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model: Any = autoparallel.autoparallelize(
            plain(), 2, mesh=autoparallel.Mesh(tp=2), example_inputs=data[:2], local_inputs="tp"
        )
        # evaluation_mode: it is not wrapped in DistributedDataParallel.
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = TensorDataset(*data[first : first + 8])
        optimizer, loader = accelerator.prepare(optimizer, DataLoader(step, batch_size=2))
        if first:
            autoparallel.load_checkpoint(folder, model, optimizer.optimizer)
        for x, labels in loader:
            with accelerator.accumulate(model):
                loss = model(x, labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        autoparallel.save_checkpoint(folder, model, optimizer.optimizer)
    reference = plain()
    optimizer, expected = torch.optim.AdamW(reference.parameters(), lr=1e-2), []
    for number, (x, labels) in enumerate(DataLoader(data, batch_size=4)):
        loss = reference(x, labels)
        (loss / 2).backward()
        expected.append(loss.item())
        if number % 2:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    return losses, expected


def test_accelerate(tmp_path: Path) -> None:
    for losses, expected in run_processes(accelerated, 2, str(tmp_path / "checkpoint")):
        assert len(losses) == 4
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
