"""Calls that are like earlier ones are taken apart as these were, and others are not."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.errors import CaptureError
from autoparallel.parallel.flat_calls import FlatCalls
from autoparallel.support.pytree import flatten

ONE, TWO = torch.ones(1), torch.ones(2)


class Plain(nn.Module):
    def forward(self, x: Any, scale: Any = None, mask: Any = None) -> Any:
        return x


class Open(nn.Module):
    def forward(self, x: Any, *more: Any, **named: Any) -> Any:
        return x


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((ONE,), {}),
    ((ONE, TWO), {}),
    ((ONE, None, TWO), {}),
    ((ONE,), {"mask": TWO}),
    ((), {"mask": TWO, "x": ONE}),
    ((), {"x": ONE, "mask": TWO}),
    ((ONE, ONE), {"mask": ONE}),
    ((ONE, True), {}),
    ((ONE, 1), {}),
    ((ONE, 0.0), {}),
    ((ONE, -0.0), {}),
    ((ONE, [TWO]), {}),
    (({"a": ONE, "b": [TWO]},), {}),
    ((nn.Parameter(ONE),), {}),
]


@pytest.mark.parametrize("kind", [Plain, Open])
def test_what_is_remembered_is_what_would_be_found(kind: Any) -> None:
    """Each call twice, after all others: by one object that remembers them."""
    calls, model = FlatCalls(), kind()
    for args, kwargs in CALLS * 2:
        arguments = bind_inputs(model, args, kwargs).arguments
        inputs, skeleton = flatten(dict(arguments))
        names, found, structure = calls.flattened(model, args, kwargs)
        assert names == list(arguments)
        assert list(map(id, found)) == list(map(id, inputs))
        assert str(structure) == str(skeleton)


def test_a_forward_that_takes_other_arguments_is_noticed(monkeypatch: Any) -> None:
    """Functions that wrap others, too, have the signatures of those."""
    calls, model = FlatCalls(), Plain()
    assert calls.flattened(model, (ONE, TWO), {})[0] == ["x", "scale"]
    monkeypatch.setattr(Plain, "forward", lambda self, left, right: left)
    assert calls.flattened(model, (ONE, TWO), {})[0] == ["left", "right"]

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return args

    wrapper.__wrapped__ = lambda self, up, down: up  # type: ignore[attr-defined]
    monkeypatch.setattr(Plain, "forward", wrapper)
    assert calls.flattened(model, (ONE, TWO), {})[0] == ["up", "down"]
    wrapper.__wrapped__ = lambda self, a, b: a  # type: ignore[attr-defined]
    assert calls.flattened(model, (ONE, TWO), {})[0] == ["a", "b"]
    with pytest.raises(CaptureError, match="do not fit"):
        calls.flattened(model, (ONE, TWO, TWO), {})


class Around(nn.Module):
    """A forward that stays Python, with two modules that are planned by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        inside = self.first(x).sin()
        if float(inside.detach().sum()) > 1e3:
            inside = inside * 2
        return self.second(inside).sum()


@pytest.mark.parametrize("kind", [Around, lambda: nn.Linear(4, 4)], ids=["parts", "whole"])
def test_nothing_that_a_call_was_given_outlives_it(kind: Any, monkeypatch: Any) -> None:
    """Not the batch, nor what modules inside were given, with all that autograd has recorded."""
    given: list[Any] = []
    take_apart = FlatCalls.flattened

    def noted(calls: FlatCalls, model: Any, args: Any, kwargs: Any) -> Any:
        given.extend(map(weakref.ref, args))
        return take_apart(calls, model, args, kwargs)

    module = autoparallel.autoparallelize(kind(), 1, example_inputs=(torch.ones(2, 4),))
    monkeypatch.setattr(FlatCalls, "flattened", noted)
    for rows in (2, 2, 3):
        x = torch.ones(rows, 4, requires_grad=True)
        module(x).sum().backward()
        del x
    gc.collect()  # what the planning of the first call has left
    assert len(given) >= (6 if isinstance(module, Around) else 3)
    assert [each() for each in given] == [None] * len(given)
