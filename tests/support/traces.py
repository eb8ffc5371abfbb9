"""Traces that many tests of a file begin with are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import autoparallel.api
from autoparallel.support.pytree import flatten

__all__ = ["traced_once"]


@contextmanager
def traced_once(name_of: Callable[[torch.nn.Module], Any]) -> Iterator[None]:
    """While this lasts, models of one name are traced once for inputs of equal shapes and kinds.

    name_of: two models of one name have one graph, such as their class and their sizes. For tests
    of what is planned of a graph; a model that is changed between its plans must not be remembered.
    """
    traces: dict[Any, Any] = {}
    trace = autoparallel.api.trace_model

    def remembered(model: Any, args: Any, kwargs: Mapping[str, Any], options: Any) -> Any:
        tensors, skeleton = flatten((args, dict(kwargs)))
        inputs = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        key = name_of(model), str(skeleton), inputs, model.training, options.strict_capture
        if key not in traces:
            traces[key] = trace(model, args, kwargs, options)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoparallel.api, "trace_model", remembered)
        yield
