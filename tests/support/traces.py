"""Traces that many tests of a file begin with are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel.api
from autoparallel.graph.captured import Surroundings
from autoparallel.planning import replan
from autoparallel.support.pytree import flatten

__all__ = ["trace_ahead", "traced_once"]


@contextmanager
def traced_once() -> Iterator[None]:
    """While this lasts, equal models are traced once for inputs of equal shapes and kinds.

    Models are equal that have one class, print alike, have parameters and buffers of the same
    shapes and kinds, an equal config, and equal numbers, texts and the like in attributes. It is
    for tests of what is planned of a graph, and not for models that go by values of their inputs or
    by other objects.
    """
    traces: dict[Any, Any] = {}
    trace, again = autoparallel.api.trace_model, replan.trace_whole

    def remembered(model: Any, args: Any, kwargs: Mapping[str, Any], options: Any) -> Any:
        key = "whole", options.strict_capture, _call_of(model, args, kwargs)
        if key not in traces:
            traces[key] = trace(model, args, kwargs, options)
        return traces[key]

    def remembered_again(model: Any, args: Any, kwargs: Mapping[str, Any], ways: Any) -> Any:
        key = "again", repr(ways), _call_of(model, args, kwargs)
        if key not in traces:
            traces[key] = again(model, args, kwargs, ways)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoparallel.api, "trace_model", remembered)
        patch.setattr(replan, "trace_whole", remembered_again)
        yield


_for_good = ExitStack()


def trace_ahead(work: Callable[..., Any], *arguments: Any) -> None:
    """Call a function; from now on this process and its forks trace as within `traced_once`.

    It is for the argument `before` of run_processes: what one process has traced, the ranks have,
    whose traces would be the same. work: plans what they will plan, on however many ranks.
    """
    _for_good.enter_context(traced_once())
    work(*arguments)


def _call_of(model: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that tells one call of a model from others."""
    tensors, skeleton = flatten((args, dict(kwargs)))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = tuple(map(_kind_of, tensors))
    state = Surroundings.now(device), torch.is_grad_enabled()
    return _looks_of(model), str(skeleton), inputs, state


def _kind_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _looks_of(model: nn.Module) -> tuple[Any, ...]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    places: dict[int, int] = {}
    rows = tuple(
        (path, places.setdefault(id(tensor), len(places)), _kind_of(tensor))
        for path, tensor in tensors
    )
    settings = tuple(
        tuple((name, repr(value)) for name, value in vars(module).items() if _is_plain(value))
        for module in model.modules()
    )
    return type(model), repr(model), repr(getattr(model, "config", None)), settings, rows


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
