"""Habits with libraries around torch: Hugging Face's, Lightning, and others."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import autoparallel

from .case import Case
from .models import plain, rows
from .registry import in_group

habit = in_group("Libraries")

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
HUGGING_FACE = ("transformers",)


def llama(**options: Any) -> Any:
    """Return a tiny Llama in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, eos_token_id=None, **_SIZES, **options)
    return LlamaForCausalLM(config).double()


def batch(seed: int = 0, count: int = 4, length: int = 8) -> dict[str, torch.Tensor]:
    """Return a batch for language models."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (count, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def step(model: Any, seed: int = 0) -> torch.Tensor:
    """Return the loss of a batch, after its backward pass."""
    loss = model(**batch(seed)).loss
    loss.backward()
    return loss


def compare(case: Case, script: Any, build: Any = llama, **options: Any) -> None:
    """Compare as a Case does, with all casts to float32 that these models make made to float64."""
    from families import Float64

    with Float64():
        case.compare(script, build, batch(), **options)


def is_split(model: Any) -> bool:
    """Return whether it is the split model that a script is given."""
    return "_autoparallel" in vars(model)


@habit("transformers: loss, logits and gradients of a causal model", needs=HUGGING_FACE)
def causal(case: Case) -> None:
    def script(model: Any) -> Any:
        output = model(**batch())
        output.loss.backward()
        return output.loss, output.logits, type(output).__name__

    compare(case, script)


def gpt(**options: Any) -> Any:
    """Return a tiny GPT-2 in float64, which makes no cast that a checkpoint would not repeat."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=16, **off)
    return GPT2LMHeadModel(config).double().train()


def scored(model: Any, seed: int = 0) -> torch.Tensor:
    """Return a loss on the scores of a batch, after its backward pass."""
    loss = model(batch(seed)["input_ids"], use_cache=False).logits.square().mean()
    loss.backward()
    return loss


def checkpointed(case: Case, script: Any, before: Any = lambda model: None) -> None:
    """Compare steps of a model whose layers are checkpointed."""
    example = {"input_ids": batch()["input_ids"], "use_cache": False}
    case.compare(script, gpt, example, before=before)


@habit("transformers: gradient_checkpointing_enable() before splitting", needs=HUGGING_FACE)
def checkpointing(case: Case) -> None:
    checkpointed(case, scored, lambda model: model.gradient_checkpointing_enable())


@habit(
    "transformers: gradient_checkpointing_enable with use_reentrant=True, before splitting",
    needs=HUGGING_FACE,
)
def checkpointing_reentrant(case: Case) -> None:
    def before(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()

    checkpointed(case, scored, before)


@habit("transformers: gradient_checkpointing_enable() after splitting", needs=HUGGING_FACE)
def checkpointing_late(case: Case) -> None:
    def script(model: Any) -> Any:
        first = scored(model)
        model.gradient_checkpointing_enable()
        return first, scored(model, 1)

    checkpointed(case, script)


@habit("transformers: gradient_checkpointing_disable() after splitting", needs=HUGGING_FACE)
def checkpointing_off(case: Case) -> None:
    def script(model: Any) -> Any:
        first = scored(model)
        model.gradient_checkpointing_disable()
        return first, scored(model, 1)

    checkpointed(case, script, lambda model: model.gradient_checkpointing_enable())


@habit("transformers: generate(), greedy, with its cache", needs=HUGGING_FACE)
def generate(case: Case) -> None:
    def script(model: Any) -> Any:
        model.eval()
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        return model.generate(batch()["input_ids"][:1], **options)

    compare(case, script)


@habit("transformers: generate() by sampling, from one seed", needs=HUGGING_FACE)
def sample(case: Case) -> None:
    def script(model: Any) -> Any:
        model.eval()
        torch.manual_seed(5)
        options = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
        return model.generate(batch()["input_ids"][:1], **options)

    compare(case, script)


@habit("transformers: output_hidden_states=True", needs=HUGGING_FACE)
def hidden_states(case: Case) -> None:
    def script(model: Any) -> Any:
        return model(**batch(), output_hidden_states=True).hidden_states

    compare(case, script)


@habit("transformers: an attention mask with padding, in some batches", needs=HUGGING_FACE)
def attention_mask(case: Case) -> None:
    def script(model: Any) -> Any:
        mask = torch.ones(4, 8, dtype=torch.long)
        mask[0, 5:] = 0
        losses = [model(**batch()).loss, model(**batch(), attention_mask=mask).loss]
        torch.stack(losses).sum().backward()
        return losses

    compare(case, script)


@habit("transformers: tied embeddings", needs=HUGGING_FACE)
def tied(case: Case) -> None:
    def build() -> Any:
        return llama(tie_word_embeddings=True)

    def script(model: Any) -> Any:
        loss = step(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return loss, step(model, 1), len(list(model.parameters()))

    compare(case, script, build)


@habit("transformers: resize_token_embeddings after splitting", needs=HUGGING_FACE)
def resized(case: Case) -> None:
    def script(model: Any) -> Any:
        step(model)
        torch.manual_seed(1)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model(**batch()).logits.shape

    compare(case, script)


@habit("transformers: save_pretrained of the split model, from_pretrained", needs=HUGGING_FACE)
def save_pretrained(case: Case) -> None:
    def script(model: Any) -> Any:
        folder = case.folder / str(is_split(model))
        model.save_pretrained(folder)
        case.meet()  # rank 0 alone writes
        loaded = type(llama()).from_pretrained(folder, dtype=torch.float64)
        return loaded(**batch()).loss

    compare(case, script)


@habit("transformers: save_pretrained(state_dict=full_state_dict(model))", needs=HUGGING_FACE)
def save_full(case: Case) -> None:
    def script(model: Any) -> Any:
        folder = case.folder / str(is_split(model))
        weights = autoparallel.full_state_dict(model) if is_split(model) else model.state_dict()
        model.save_pretrained(folder, state_dict=weights)
        case.meet()
        loaded = type(llama()).from_pretrained(folder, dtype=torch.float64)
        return loaded(**batch()).loss

    compare(case, script)


def trained_by_trainer(case: Case, model: Any) -> Any:
    """Return what Hugging Face's Trainer logs in three steps."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    kept: list[Any] = []

    class Logged(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                kept.append((logs["loss"], logs["grad_norm"]))

    data = [
        dict(zip(batch(), row, strict=True)) for row in zip(*batch(3, 12).values(), strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(case.folder / str(case.rank)),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[Logged()]).train()
    return kept


@contextmanager
def no_launcher() -> Iterator[None]:
    """Hide the launcher's variables: every process trains by itself, on the same batches."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@habit("transformers: Trainer, with clipping and logs", needs=("transformers", "accelerate"))
def trainer(case: Case) -> None:
    with no_launcher():
        compare(case, lambda model: trained_by_trainer(case, model))


@habit("accelerate: prepare_model(evaluation_mode=True), backward", needs=("accelerate",))
def accelerated(case: Case) -> None:
    from accelerate import Accelerator

    def script(model: Any) -> Any:
        accelerator = Accelerator(cpu=True)
        if is_split(model):
            model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.1))
        losses = []
        for seed in range(2):
            loss = model(*rows(6, seed))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        return losses

    with no_launcher():
        case.compare(script)


@habit("peft: LoRA before splitting", needs=("peft", "transformers"))
def lora(case: Case) -> None:
    from peft import LoraConfig, get_peft_model

    def build() -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        return get_peft_model(llama(), config).double()

    def script(model: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        losses = []
        for seed in range(2):
            losses.append(step(model, seed))
            optimizer.step()
            optimizer.zero_grad()
        return losses, len(trained)

    compare(case, script, build)


@habit("peft: LoRA after splitting", needs=("peft", "transformers"))
def lora_late(case: Case) -> None:
    from peft import LoraConfig, get_peft_model

    def script(model: Any) -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        torch.manual_seed(1)
        adapted = get_peft_model(model, config)
        return step(adapted)

    compare(case, script)


@habit(
    "pytorch_lightning: a LightningModule's training_step, by hand", needs=("pytorch_lightning",)
)
def lightning_step(case: Case) -> None:
    import pytorch_lightning

    class Lit(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.model(x, labels)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self(*batch)

    def script(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for seed in range(2):
            loss = model.training_step(rows(6, seed), seed)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        return losses

    case.compare(script, Lit)


@habit(
    "pytorch_lightning: a split model inside of a LightningModule, with Trainer.fit",
    needs=("pytorch_lightning",),
)
def lightning_fit(case: Case) -> None:
    import pytorch_lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Lit(pytorch_lightning.LightningModule):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model
            self.losses: list[torch.Tensor] = []

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = self.model(*batch)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def script(model: Any) -> Any:
        lit = Lit(model)
        trainer = pytorch_lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=case.folder / str(case.rank),
        )
        trainer.fit(lit, DataLoader(TensorDataset(*rows(12, 1)), batch_size=4))
        return lit.losses

    with no_launcher():
        case.compare(script)


@habit("diffusers: a small UNet2DModel", needs=("diffusers", "requests"))
def diffusion(case: Case) -> None:
    from diffusers import UNet2DModel

    def build() -> Any:
        torch.manual_seed(2)
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ).double()

    def noisy(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
        return x, torch.tensor([3, 7])

    def script(model: Any) -> Any:
        y = model(*noisy(1)).sample
        y.square().mean().backward()
        return y

    case.compare(script, build, noisy(0))


@habit("safetensors: save_file of full_state_dict(model), load_file", needs=("safetensors",))
def safe(case: Case) -> None:
    from safetensors.torch import load_file, save_file

    def script(model: Any) -> Any:
        weights = autoparallel.full_state_dict(model) if is_split(model) else model.state_dict()
        path = case.folder / f"{is_split(model)}_{case.rank}.safetensors"
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
        values = {name: value * 2 for name, value in load_file(path).items()}
        model.load_state_dict(values)
        return model(*rows(6, 0))

    case.compare(script)


@habit("safetensors: save_file(model.state_dict())", needs=("safetensors",))
def safe_state(case: Case) -> None:
    from safetensors.torch import load_file, save_file

    def script(model: Any) -> Any:
        path = case.folder / f"{is_split(model)}_{case.rank}.safetensors"
        save_file(copy.copy(dict(model.state_dict())), path)
        twin = plain()
        twin.load_state_dict(load_file(path))
        return twin(*rows(6, 0))

    case.compare(script)
