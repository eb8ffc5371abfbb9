"""Trains a model of your own with the runner: on one process or many, nothing in it knows of them.

    python examples/train.py
    torchrun --nproc-per-node 2 examples/train.py --training.steps=60
    torchrun --nproc-per-node 4 examples/train.py --parallel.mesh=dp=2,tp   # goes on from there

`autoparallel train CONFIG.toml` is the same for a file; `autoparallel train --help` has all keys.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoparallel.train.config_text import read_config
from autoparallel.train.runner import run_training

VOCABULARY = 1024
CONFIG = [
    "--folder=out/example",
    "--model=train:model",  # this file, and the function below
    f"--model.vocabulary={VOCABULARY}",
    "--model.options.width=128",
    f"--data.vocabulary={VOCABULARY}",
    "--data.limit_bytes=1000000",
    "--data.sequence=64",
    "--training.steps=40",
    "--schedule.warmup=10",
    "--checkpoint.every=20",
]


class Convolutions(nn.Module):
    """A language model without attention: each layer sees a few tokens before each token."""

    def __init__(self, width: int, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.layers = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the next tokens. input_ids, labels: (b, s)."""
        x = self.embedding(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = F.pad(norm(x), (0, 0, 3, 0))
            length = x.shape[1]
            seen = torch.cat([y[:, at : at + length] for at in range(4)], dim=-1)
            x = x + F.gelu(layer(seen))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def model(width: int) -> nn.Module:
    """Return the model; [model.options] are its arguments."""
    return Convolutions(width)


if __name__ == "__main__":
    run_training(read_config(None, CONFIG + sys.argv[1:]))
