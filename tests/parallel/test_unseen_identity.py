"""Facts of tensors and functions that only their identity tells: versions, types, who is who."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from split_ranks import as_unsplit
from torch import nn
from unseen import Base, X, after_backward, follows

import autoparallel
from autoparallel.errors import AutoParallelError


class Paired(Base):
    """A forward that treats one tensor in two places in another way."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * (3.0 if x is y else 1.0) + self.a(y))


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_tensor_in_two_places(world_size: int) -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        for pair in ((X, X.clone()), (X, X), (X, X.clone())):
            yield after_backward(model, *pair)

    as_unsplit(Paired(), world_size, (X, X.clone()), script)


class Versioned(Base):
    """A forward that keeps something until its weight is written to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * (1.0 + self.a.weight._version))


def test_versions_of_parameters() -> None:
    """Alone they are the model's; a split parameter does not count what its parts are given."""

    def script(model: Any) -> Iterator[torch.Tensor]:
        yield after_backward(model)
        with torch.no_grad():
            model.a.weight.mul_(1.5)
        yield after_backward(model)

    model = Versioned()
    assert model.a.weight._version
    split = autoparallel.autoparallelize(model, 1, example_inputs=X)
    found = [loss.detach().clone() for loss in script(split)]
    expected = [loss.detach().clone() for loss in script(model)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(AutoParallelError, match=r"asks for the version of a\.weight"):
        follows(lambda: (Versioned(), script), 2)


class Typed(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * (2.0 if type(self.a.weight) is nn.Parameter else 1.0))


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_are_of_their_class(world_size: int) -> None:
    follows(lambda: (Typed(), lambda model: iter([after_backward(model)])), world_size)


class Measured(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) * (1.0 + x.untyped_storage().nbytes()))


def test_memory_around_an_input() -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        yield model(X)
        yield model(torch.cat([X, X])[:6])

    follows(lambda: (Measured(), script), 2)


class InTurn(nn.Module):
    """Layers that run in the order in which a dictionary has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Tanh()}).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x.square().mean()


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_order_of_modules(world_size: int) -> None:
    def script(model: Any) -> Iterator[torch.Tensor]:
        yield after_backward(model)
        layers = model.layers._modules
        layers["a"] = layers.pop("a")
        yield after_backward(model)

    follows(lambda: (InTurn(), script), world_size)


class Soft(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.softmax(self.a(x), -1))


def _called(monkeypatch: pytest.MonkeyPatch, patched: Any) -> None:
    split = autoparallel.autoparallelize(Soft(), 1, example_inputs=X)
    monkeypatch.setattr(nn.functional, "softmax", patched)
    split(X)


@pytest.mark.parametrize("before", [True, False])
def test_functions_that_torch_hands_on_by_name(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    softmax = nn.functional.softmax

    def patched(*args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * softmax(*args, **kwargs)

    if before:
        monkeypatch.setattr(nn.functional, "softmax", patched)
    with pytest.raises(AutoParallelError, match=r"softmax is a function of .* now"):
        _called(monkeypatch, patched)


class Layouts(Base):
    """It does something else with a sparse tensor than a program for dense ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_sparse:
            return self.out(torch.sparse.mm(x, self.a.weight.t()) * 2)
        return self.out(self.a(x).tanh())


def test_sparse_inputs_of_a_model_that_was_planned_for_dense_ones() -> None:
    def script(model: Any) -> Any:
        for x in (X, X.to_sparse(), X):
            yield after_backward(model, x)

    follows(lambda: (Layouts(), script), 2)
