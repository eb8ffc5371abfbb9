"""Differences between releases of torch that the project acts on: decided here, nowhere else."""

from __future__ import annotations

import torch

__all__ = ["ATTENTION_NEEDS_HEADS", "KEEPS_WHAT_IS_SENT", "RELEASE"]

# The release without its last number, as in (2, 13).
RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])

# Fused attention on a CPU divides by the number of heads: with none, the process ends by SIGFPE,
# which nobody can catch. Later releases return a result without elements.
ATTENTION_NEEDS_HEADS = RELEASE < (2, 13)

# Stages of a pipeline keep what they have sent on until its backward pass begins there. Later ones
# let go of it when it has arrived, and begin at the edge of autograd's graph that led to it.
KEEPS_WHAT_IS_SENT = RELEASE < (2, 15)
