"""Trains a small GPT or BERT on text: split by the planner, split by hand, or whole.

    python examples/three_ways.py --method plain
    torchrun --nproc-per-node 2 examples/three_ways.py --method automatic
    torchrun --nproc-per-node 2 examples/three_ways.py --method megatron --model bert

The three methods start from the same weights and see the same batches, so their losses can be
compared; examples/demo.py does so. The planner asks one line of its user: see build_model. To train
something for real, see examples/train.py and `autoparallel train --help`.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

import autoparallel
from autoparallel.train.config import TrainConfig
from autoparallel.train.data import Batches, Objective, TokenizedCorpus, prepare_corpus
from autoparallel.train.loop import train
from autoparallel.train.metrics import RunRecord
from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig
from megatron_rules.models import ParallelBert, ParallelGPT

METHODS = ("automatic", "megatron", "plain")
MODELS = ("gpt", "bert")
VOCABULARY = 4001  # not a multiple of 2: the parts of the vocabulary are unequal
SEED = 1234
COLLECTIVE_TIMEOUT = timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that all methods share: the model's sizes and the batch's."""

    model: str
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    batch: int = 8
    sequence: int = 128
    sequence_parallel: bool = True

    def batches(self, corpus: TokenizedCorpus) -> Batches:
        """Return the same batches in every process."""
        objective = Objective.CAUSAL if self.model == "gpt" else Objective.MASKED
        return Batches(corpus, self.batch, self.sequence, objective, seed=SEED)

    def config(self, vocabulary: int) -> GPTConfig | BertConfig:
        """Return the sizes of the model; there is no dropout, so that the three methods compute the
        same.
        """
        kind = GPTConfig if self.model == "gpt" else BertConfig
        return kind(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            vocabulary=vocabulary,
            positions=self.sequence,
            dropout=0.0,
        )

    def plain_model(self, vocabulary: int) -> nn.Module:
        """Return the model that knows nothing of devices, with the same weights in every
        process.
        """
        torch.manual_seed(SEED)
        config = self.config(vocabulary)
        return GPT(config) if isinstance(config, GPTConfig) else Bert(config)


def build_model(method: str, settings: Settings, batches: Batches) -> nn.Module:
    """Return the model of a method, from the same weights for every method."""
    plain = settings.plain_model(batches.corpus.vocabulary)
    if method == "plain":
        return plain
    if method == "automatic":
        return autoparallel.autoparallelize(
            plain,
            dist.get_world_size() if dist.is_initialized() else 1,
            example_inputs=batches.train(0),
            sequence_parallel=settings.sequence_parallel,
        )
    parallel = ParallelGPT if settings.model == "gpt" else ParallelBert
    model = parallel(plain.config, sequence_parallel=settings.sequence_parallel)
    model.load_plain(plain.state_dict())
    return model


def finish_hand_written(model: nn.Module, clip_norm: float) -> None:
    """Sum and clip gradients, as hand-written parallelism asks of its user between backward and the
    step.

    Gradients of which each rank has a term are summed, and the norm that clips counts every element
    of the model once, whether its tensor is split or whole on every rank.
    """
    model.finish_gradients()
    split = {
        getattr(module, name)
        for module in model.modules()
        for name in getattr(module, "splits", ())
    }
    # [squares of whole parameters, squares of this rank's parts]: only the latter are summed over
    # ranks.
    squares = torch.zeros(2)
    for parameter in model.parameters():
        if parameter.grad is not None:
            squares[int(parameter in split)] += parameter.grad.square().sum()
    if dist.is_initialized():
        dist.all_reduce(squares[1:])
    scale = (clip_norm / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= scale


def run(
    method: str,
    settings: Settings,
    config: TrainConfig,
    data: str | None,
) -> RunRecord:
    """Train by one method, in this process or in all processes that torchrun started."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    batches = settings.batches(prepare_corpus(data, vocabulary=VOCABULARY))
    return train(
        build_model(method, settings, batches),
        batches,
        config,
        name=f"{settings.model}, {method}",
        finish_gradients=finish_hand_written if method == "megatron" else None,
    )


@record
def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says, and report on rank 0."""
    options = parse(arguments)
    settings = Settings(options.model, sequence_parallel=options.sequence_parallel)
    config = TrainConfig(steps=options.steps)
    result = run(options.method, settings, config, options.data)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"{result.name}: held-out loss {result.held_out[0][1]:.3f} -> "
            f"{result.held_out[-1][1]:.3f}, {result.median_step_seconds * 1e3:.0f} ms per step"
        )
        if options.record is not None:
            options.record.write_text(result.to_json())
    if dist.is_initialized():
        leave()


def leave() -> None:
    """End this process at once, when every rank has come here.

    gloo's threads may still hold tensors that belong to Python; when they let go of one while the
    interpreter shuts down, the process aborts ("terminate called without an active exception").
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def parse(arguments: list[str] | None) -> Any:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gpt")
    parser.add_argument("--method", choices=METHODS, default="automatic")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--data", help="a text file or a folder of text (default: Python's own)")
    parser.add_argument("--record", type=Path, help="write losses, times and traffic there (JSON)")
    parser.add_argument(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="allow splitting the activations along the sequence",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
