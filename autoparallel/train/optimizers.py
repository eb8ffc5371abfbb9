"""The optimizers of a run: which parameters each of them steps, and which it decays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.train.config import TrainingError
from autoparallel.train.run_config import OptimizerConfig

__all__ = ["make_optimizers", "set_rates"]


def make_optimizers(
    module: nn.Module, config: OptimizerConfig
) -> tuple[torch.optim.Optimizer, ...]:
    """Return AdamW, or Muon and AdamW, over the trained parameters of a module, split or not.

    Matrices decay; vectors (biases, norms), and all that a norm has, do not. Muon takes the
    matrices inside of the model, and leaves embeddings and the output head to AdamW.
    Raises TrainingError for a model without parameters, and where torch has no Muon.
    Source: Loshchilov & Hutter 2019; Jordan et al. 2024 for Muon's choice of parameters.

    >>> adamw, = make_optimizers(nn.Linear(2, 2), OptimizerConfig())
    >>> [group["weight_decay"] for group in adamw.param_groups]
    [0.1, 0.0]
    """
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise TrainingError(
            f"{type(module).__name__} has no parameter that is trained",
            why="there are none, or none requires a gradient",
            fix="name another model: model.kind",
        )
    never = set(_of_modules(module, _is_norm))
    muon: list[nn.Parameter] = []
    optimizers: list[torch.optim.Optimizer] = []
    if config.kind == "muon":
        outer = set(_of_modules(module, lambda each: isinstance(each, nn.Embedding)))
        outer |= set(_of_heads(module, trained))
        muon = [p for p in trained.values() if p.ndim == 2 and id(p) not in outer | never]
        kind = getattr(torch.optim, "Muon", None)
        if kind is None:
            raise TrainingError(
                "optimizer.kind = 'muon'",
                why=f"torch {torch.__version__} has no Muon",
                fix="choose adamw, or a newer torch",
            )
        if muon:
            optimizers.append(kind(
                muon, lr=config.muon_learning_rate, momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
            ))  # fmt: skip
    taken = {id(parameter) for parameter in muon}
    others = [p for p in trained.values() if id(p) not in taken]
    decayed = [p for p in others if p.ndim >= 2 and id(p) not in never]
    kept = {id(p) for p in decayed}
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in others if id(p) not in kept], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
            eps=config.epsilon,
        ))  # fmt: skip
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["highest_lr"] = group["lr"]
    return tuple(optimizers)


def set_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> float:
    """Set the learning rates to a share of their highest; return that of the last group."""
    rate = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["lr"] = group["highest_lr"] * factor
    return rate


def _of_modules(module: nn.Module, wanted: Any) -> Iterable[int]:
    """Yield the ids of the parameters of some modules."""
    for each in module.modules():
        if wanted(each):
            yield from map(id, each.parameters(recurse=False))


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes: by its class's name, as norms of libraries are many."""
    return any("norm" in kind.__name__.lower() for kind in type(module).__mro__)


def _of_heads(module: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterable[int]:
    """Yield the ids of matrices with as many rows as the largest embedding: output heads."""
    rows = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    if rows:
        yield from (id(p) for p in trained.values() if p.ndim == 2 and p.shape[0] == max(rows))
