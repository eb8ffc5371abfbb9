"""Calls that are like earlier ones are taken apart as these were, and others are not."""

from typing import Any

import pytest
import torch
from torch import nn

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
