"""The plain model on one process, and this project's split of it, eager and compiled."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from contenders.contender import AbsentError, Contender, Trained
from contenders.workloads import Workload

__all__ = ["OURS"]

ALL = ("gpt", "bert", "llama")


def plain(workload: Workload, compiled: bool = False) -> Trained:
    """Return the user's own model."""
    model, inputs = workload.model(), workload.inputs()
    runs = torch.compile(model, fullgraph=True) if compiled else model
    return Trained(tuple(model.parameters()), lambda: runs(**inputs).loss, clip_grad_norm_)


def ours(
    workload: Workload, ranks: int, sequence_parallel: bool = True, compiled: bool = False
) -> Trained:
    """Return the model as this project splits it."""
    import autoparallel

    inputs = workload.inputs()
    model = autoparallel.autoparallelize(
        workload.model(),
        ranks,
        example_inputs=inputs,
        sequence_parallel=sequence_parallel,
        # Ranks that do not run send nothing that could be compared.
        check_inputs=0 if "ALONE" in os.environ else 2,
        # One link of a node of GPUs: the plan is that for large models, whatever these sizes are.
        hardware="auto",
    )
    clip = getattr(autoparallel, "clip_grad_norm_", clip_grad_norm_)
    runs: Any = model
    if compiled:
        runs = torch.compile(model, fullgraph=True)
        try:
            runs(**inputs).loss.backward()
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            raise AbsentError(
                f"torch.compile(fullgraph=True): {type(error).__name__}: {first}"
            ) from error
        model.zero_grad()
    return Trained(tuple(model.parameters()), lambda: runs(**inputs).loss, clip)


OURS = (
    Contender("plain", "plain model, 1 rank", 1, ALL, plain),
    Contender("ours-1", "ours, 1 rank", 1, ALL, partial(ours, ranks=1)),
    Contender(
        "plain-compiled", "plain model compiled, 1 rank", 1, ALL, partial(plain, compiled=True)
    ),
    Contender(
        "ours-1-compiled", "ours compiled, 1 rank", 1, ALL, partial(ours, ranks=1, compiled=True)
    ),
    Contender("ours-tp", "ours", 2, ALL, partial(ours, ranks=2, sequence_parallel=False)),
    Contender("ours-sp", "ours, sequence parallel", 2, ALL, partial(ours, ranks=2)),
    Contender(
        "ours-tp-compiled",
        "ours compiled",
        2,
        ALL,
        partial(ours, ranks=2, sequence_parallel=False, compiled=True),
    ),
    Contender(
        "ours-sp-compiled",
        "ours compiled, sequence parallel",
        2,
        ALL,
        partial(ours, ranks=2, compiled=True),
    ),
)
