"""Traces that many tests of a file begin with are made once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel.api
from autoparallel.support.pytree import flatten

__all__ = ["traced_once"]


@contextmanager
def traced_once() -> Iterator[None]:
    """While this lasts, equal models are traced once for inputs of equal shapes and kinds.

    Models are equal that have one class, print alike, and have parameters and buffers of the same
    shapes and kinds and an equal config. It is for tests of what is planned of a graph, and not for
    models that go by values of their inputs or by other attributes.
    """
    traces: dict[Any, Any] = {}
    trace = autoparallel.api.trace_model

    def remembered(model: Any, args: Any, kwargs: Mapping[str, Any], options: Any) -> Any:
        tensors, skeleton = flatten((args, dict(kwargs)))
        inputs = tuple(map(_kind_of, tensors))
        kind = torch.get_default_dtype(), options.strict_capture
        key = _looks_of(model), str(skeleton), inputs, kind
        if key not in traces:
            traces[key] = trace(model, args, kwargs, options)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoparallel.api, "trace_model", remembered)
        yield


def _kind_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _looks_of(model: nn.Module) -> tuple[Any, ...]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    places: dict[int, int] = {}
    rows = tuple(
        (path, places.setdefault(id(tensor), len(places)), _kind_of(tensor))
        for path, tensor in tensors
    )
    modes = tuple(module.training for module in model.modules())
    return type(model), repr(model), repr(getattr(model, "config", None)), modes, rows
