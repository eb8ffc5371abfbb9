"""Tensors without data, made so that this process can be forked as before."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from autoparallel.support.torch_private import FakeTensorMode

__all__ = ["fake_mode", "start_autograd"]


def fake_mode(**options: Any) -> FakeTensorMode:
    """Return a new FakeTensorMode. options: those of FakeTensorMode.

    >>> with fake_mode():
    ...     torch.ones(2, 3).shape
    torch.Size([2, 3])
    """
    start_autograd()
    return FakeTensorMode(**options)


@cache
def start_autograd() -> None:
    """Start autograd's engine, once, before the first tensor without data is there.

    In torch built for CUDA, on a machine without a GPU, fake tensors pretend that there is one. An
    engine that starts after that keeps a thread for it, and then no fork of this process can run a
    backward pass: neither ours, which try the user's ops, nor the user's. An engine that has
    started before keeps none.

    >>> start_autograd()
    """
    with torch.enable_grad():
        torch.ones(1, requires_grad=True).sum().backward()
