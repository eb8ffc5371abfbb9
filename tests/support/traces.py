"""Traces that many tests of a file begin with are made once, and so are plans of equal programs."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel.api
from autoparallel.graph.captured import Surroundings
from autoparallel.plan import Plan
from autoparallel.planning import replan
from autoparallel.planning.kept_plans import key_of
from autoparallel.planning.plan_graphs import with_graphs
from autoparallel.rules.strategies import strategies
from autoparallel.strategy import build_network
from autoparallel.support.pytree import flatten

__all__ = ["planned_once", "sharing", "trace_ahead", "traced_once"]

# So many traces, and so many plans, are kept, those that were made last.
MOST = 32
# The functions that find a plan, and the modules that call them.
_PLANNERS = (
    (autoparallel.api, "fastest_plan"),
    (replan, "search"),
    (replan, "pipeline_plan"),
)
# Arguments of these of which no text tells all.
_NOT_IN_WORDS = ("start", "judge", "eased", "step", "estimator")
# The arguments `again` of those that last, the innermost last.
_lasting: list[bool] = []


def sharing() -> bool | None:
    """Return `again` of the innermost `traced_once` that lasts, None outside of all.

    Ranks that are started within one share traces like the test does, each its own.
    """
    return _lasting[-1] if _lasting else None


@contextmanager
def traced_once(again: bool = True) -> Iterator[None]:
    """While this lasts, equal models are traced once for inputs of equal shapes and kinds.

    Models are equal that have one class, print alike, have parameters and buffers of the same
    shapes and kinds, an equal config, equal numbers, texts and the like in attributes, and the same
    functions there and as hooks. It is for tests of what is planned of a graph, and not for models
    that go by values of their inputs or by other objects. again: also where a split module traces
    its model anew, as it does when something about it has changed.
    """
    # With each trace its model: a function that a key names by its number is that function as long
    # as somebody holds it.
    traces: dict[Any, tuple[Any, nn.Module]] = {}
    trace, trace_again = autoparallel.api.trace_model, replan.trace_whole

    def kept(key: Any, model: Any, make: Callable[[], Any]) -> Any:
        if key not in traces:
            traces[key] = make(), model
            if len(traces) > MOST:
                del traces[next(iter(traces))]
        return traces[key][0]

    def remembered(model: Any, args: Any, kwargs: Mapping[str, Any], options: Any) -> Any:
        key = "whole", options.strict_capture, _call_of(model, args, kwargs)
        return kept(key, model, lambda: trace(model, args, kwargs, options))

    def remembered_again(model: Any, args: Any, kwargs: Mapping[str, Any], ways: Any) -> Any:
        key = "again", repr(ways), _call_of(model, args, kwargs)
        return kept(key, model, lambda: trace_again(model, args, kwargs, ways))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoparallel.api, "trace_model", remembered)
        if again:
            patch.setattr(replan, "trace_whole", remembered_again)
        _lasting.append(again)
        try:
            yield
        finally:
            _lasting.pop()


@contextmanager
def planned_once(folder: Path | None = None) -> Iterator[None]:
    """While this lasts, equal programs are planned once for what is asked alike.

    They are equal as for plans that are kept on disk. It is for tests of what becomes of split
    modules, whose ranks would all search for the same plan. folder: where ranks that are processes
    find what one of them has planned; ranks of one process need none. What is planned with kernels
    that a test asks for is planned each time.
    """
    plans: dict[str, Plan] = {}

    def once(make: Callable[..., Plan]) -> Callable[..., Plan]:
        parameters = signature(make)

        @wraps(make)
        def planned(*args: Any, **kwargs: Any) -> Plan:
            asked = parameters.bind(*args, **kwargs).arguments
            (traced,) = (asked.pop(name) for name in ("captured", "traced") if name in asked)
            named = isinstance(asked["model"], str)
            model, options = nn.Module() if named else asked.pop("model"), asked.pop("options")
            key = None
            forced = build_network.strategies is not strategies
            if not forced and not any(map(asked.get, _NOT_IN_WORDS)):
                key = key_of(model, traced, options, (make.__name__, asked))
            if key is None:
                return make(*args, **kwargs)
            if key not in plans:
                here = partial(make, *args, **kwargs)
                plans[key] = here() if folder is None else _first_of(folder / key[:32], here)
                if len(plans) > MOST:
                    del plans[next(iter(plans))]
            return with_graphs(plans[key], traced).checked()

        return planned

    with pytest.MonkeyPatch.context() as patch:
        for module, name in _PLANNERS:
            patch.setattr(module, name, once(getattr(module, name)))
        yield


def _first_of(path: Path, make: Callable[[], Plan]) -> Plan:
    """Return the plan in a file, which the process that comes first makes: the others wait."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if text:
            return Plan.from_json(text)
        plan = make()
        file.write(plan.to_json())
        return plan


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
    settings = tuple(tuple(_settings_of(module)) for module in model.modules())
    return type(model), repr(model), repr(getattr(model, "config", None)), settings, rows


def _settings_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Values of attributes, and functions by their numbers."""
    for name, value in vars(module).items():
        if _is_plain(value):
            yield name, repr(value)
        elif isinstance(value, (FunctionType, BuiltinFunctionType, MethodType)):
            yield name, (id(value), id(getattr(value, "__func__", None)))
        elif name.endswith("_hooks") and value:
            yield name, tuple(map(id, value.values()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
