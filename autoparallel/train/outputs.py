"""The loss and the logits in whatever a model returns, and tensors that are split, put together."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from autoparallel.train.config import TrainingError

__all__ = ["logits_of", "loss_of", "whole"]


def loss_of(output: Any) -> Tensor:
    """Return the loss in a model's output: its `loss`, the key "loss", or its first item.

    Raises TrainingError if there is no scalar loss.

    >>> import torch
    >>> loss_of({"loss": torch.tensor(1.5)})
    tensor(1.5000)
    """
    if isinstance(output, Tensor):
        loss: Any = output
    elif isinstance(output, dict):
        loss = output.get("loss")
    else:
        loss = output.loss if hasattr(output, "loss") else output[0]
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise TrainingError(
            f"the model returned no scalar loss but {type(output).__name__}",
            why="the loss is the output itself, its `loss`, its key 'loss', or its first item",
            fix="return the mean loss in one of these places",
        )
    return loss


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output: its `logits`, the key "logits", or the tensor itself.

    Raises TrainingError if there are none.

    >>> import torch
    >>> logits_of({"logits": torch.zeros(1, 2, 3)}).shape
    torch.Size([1, 2, 3])
    """
    logits: Any = output
    if isinstance(output, dict) and "logits" in output:
        logits = output["logits"]
    elif hasattr(output, "logits"):
        logits = output.logits
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise TrainingError(
            f"the model returned no logits but {type(output).__name__}",
            why="they are the output itself, its `logits`, or its key 'logits'",
            fix="return logits of (batch, sequence, vocabulary)",
        )
    return logits


def whole(tensor: Any) -> Tensor:
    """Return the whole of a tensor that may be split. A collective call if it is."""
    put_together: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return put_together
