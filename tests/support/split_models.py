"""Compare split models with the unsplit ones: the loss and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import autoparallel
from autoparallel.parallel.simulate import Simulation

__all__ = ["split_as_whole"]


def split_as_whole(
    model: nn.Module, world_size: int, *inputs: torch.Tensor, atol: float = 1e-12, **options: Any
) -> Simulation:
    """Return a simulated step of a model that returns its loss, compared with a plain step.

    atol: of gradients. options: of `simulate`.
    """
    whole = copy.deepcopy(model)
    loss = whole(*inputs)
    loss.backward()
    made = autoparallel.simulate(model, world_size, example_inputs=inputs, **options)
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-12, atol=0)
    for path, parameter in whole.named_parameters():
        if parameter.grad is None:
            assert made.gradients.get(path) is None, path
            continue
        found = {path: made.gradients[path]}
        torch.testing.assert_close(found, {path: parameter.grad}, rtol=1e-10, atol=atol)
    return made
