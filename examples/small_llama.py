"""The model and the rows that the examples of other trainers have in common.

A Llama of two blocks reads bytes of the standard library's sources. All of the examples train it by
the same recipe, so that their losses are equal: with_own_loop.py, with_hugging_face.py,
with_lightning.py.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, SEQUENCE = 8, 32
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-2, 0.1, 1.0
HELD_OUT_ROWS = 16


def llama() -> LlamaForCausalLM:
    """Return the model, with the same weights in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=SEQUENCE,
    )
    return LlamaForCausalLM(config).double()


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of text, a byte a token. The last ones are held out."""

    def __init__(self, *, held_out: bool = False) -> None:
        text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
        count = len(text) // SEQUENCE
        tokens = torch.tensor(list(text[: count * SEQUENCE])).view(count, SEQUENCE)
        self.rows = tokens[-HELD_OUT_ROWS:] if held_out else tokens[:-HELD_OUT_ROWS]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # A model of transformers moves the labels by one position itself.
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def example_batch() -> dict[str, Tensor]:
    """Return a batch of the shapes that the model is planned for."""
    return dict.fromkeys(("input_ids", "labels"), torch.zeros(BATCH, SEQUENCE, dtype=torch.long))


@torch.no_grad()
def held_out_loss(model: Any) -> float:
    """Return the mean loss of the held-out rows; all ranks call it."""
    was, rows = model.training, Rows(held_out=True).rows
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) for part in rows.split(BATCH)]
    model.train(was)
    return sum(losses) / len(losses)


def options(about: str | None, *, in_groups: bool = False) -> Any:
    """Return what the command line says: the folder of the run, and its steps.

    in_groups: it may also say in how many groups, which read different rows, the ranks are.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the checkpoints; a run goes on from the last")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument(
        "--passes", type=int, default=1, help="in which the rows of a step are read"
    )
    if in_groups:
        parser.add_argument("--dp", type=int, default=1, help="groups with rows of their own")
    return parser.parse_args()
