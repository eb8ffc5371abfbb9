"""Facts of tensors that a forward reads in Python, and tensors of its own that a model returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broad_cases import share_of
from processes import run_processes
from torch import nn
from unseen import Base, Case, X, after_backward, follows

import autoparallel
from autoparallel.errors import AutoParallelError


def need_of_a_parameter() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * (1.0 if self.a.weight.requires_grad else 2.0))

    def script(model: Any) -> Any:
        for trained in (True, False, True):
            model.a.weight.requires_grad_(trained)
            yield after_backward(model)

    return Model(), script


def need_of_an_input() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * (3.0 if x.requires_grad and x.is_leaf else 1.0))

    def script(model: Any) -> Any:
        leaf = X.clone().requires_grad_()
        for x in (X, leaf, leaf * 2, X):
            yield after_backward(model, x)

    return Model(), script


def need_of_what_it_computes() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x)
            return self.out(hidden * (3.0 if hidden.requires_grad else 1.0))

    def script(model: Any) -> Any:
        yield after_backward(model)
        with torch.no_grad():
            yield model(X)
        model.a.requires_grad_(False)
        yield model(X)

    return Model(), script


def gradient_of_a_parameter() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.a.weight
            known = weight.is_leaf and weight.grad_fn is None and not weight.retains_grad
            scale = 1.0 if weight.grad is None else 1 + weight.grad.norm()
            return self.out(self.a(x) * scale * (1.0 if known else 5.0))

    def script(model: Any) -> Any:
        yield after_backward(model)
        yield model(X)
        model(X).backward()
        yield model(X)

    return Model(), script


def inference_mode() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = 2.0 if torch.is_inference_mode_enabled() else 1.0
            return self.out(self.a(x) * scale * (3.0 if x.is_inference() else 1.0))

    def script(model: Any) -> Any:
        yield model(X)
        with torch.inference_mode():
            yield model(X)
            yield model(X.clone())
        yield model(X)

    return Model(), script


def number_on_an_input() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * getattr(x, "scale", 1.0))

    def script(model: Any) -> Any:
        yield model(X)
        x: Any = X.clone()
        for scale in (3.0, 4.0):
            x.scale = scale
            yield model(x)
        yield model(X)

    return Model(), script


def mask_on_an_input() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x)
            return self.out(hidden * x.mask if hasattr(x, "mask") else hidden)

    def script(model: Any) -> Any:
        yield after_backward(model)
        x: Any = X.clone()
        x.mask = torch.arange(12, dtype=torch.float64)
        yield after_backward(model, x)

    return Model(), script


def marks_that_are_left() -> Case:
    class Model(Base):
        def forward(self, x: Any) -> torch.Tensor:
            loss: Any = self.out(self.a(x))
            loss.info, x.seen = 2.0, 5.0
            return loss

    def script(model: Any) -> Any:
        x: Any = X.clone()
        loss = model(x)
        yield loss, loss.info, x.seen

    return Model(), script


class Marking(nn.Module):
    """A layer that hands something on in attributes of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Any) -> torch.Tensor:
        y: Any = self.linear(x)
        y.loss, y.depth = y.square().mean(), getattr(x, "depth", 0) + 1
        return y


def marks_from_block_to_block() -> Case:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Marking() for _ in range(4)).double()

        def forward(self, x: Any) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.out(self.a(x)) + x.loss * x.depth

    return Model(), lambda model: iter([after_backward(model)])


def number_on_a_parameter() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * getattr(self.a.weight, "scale", 1.0))

    def script(model: Any) -> Any:
        yield model(X)
        for scale in (2.0, 3.0):
            model.a.weight.scale = scale
            yield model(X)

    return Model(), script


def count_on_a_parameter() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight: Any = self.a.weight
            weight.count = getattr(weight, "count", 0) + 1
            return self.out(self.a(x) * weight.count)

    def script(model: Any) -> Any:
        for _ in range(2):
            yield after_backward(model)
        yield model.a.weight.count

    return Model(), script


class Stateful(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(3, 4, dtype=torch.float64))


def buffer_that_is_returned() -> Case:
    class Model(Stateful):
        def forward(self, x: torch.Tensor) -> Any:
            return self.out(self.a(x) + self.state.view(12)), self.state

    def script(model: Any) -> Any:
        _, state = model(X)
        state.add_(5)
        yield model(X)

    return Model(), script


def buffer_that_both_write_to() -> Case:
    class Model(Stateful):
        def forward(self, x: torch.Tensor) -> Any:
            self.state += 1
            return self.out(self.a(x) + self.state.view(12)), self.state

    def script(model: Any) -> Any:
        _, state = model(X)
        state.add_(5)
        yield model(X)
        yield state

    return Model(), script


def view_of_a_buffer() -> Case:
    class Model(Stateful):
        def forward(self, x: torch.Tensor) -> Any:
            self.state += 1
            return self.out(self.a(x) + self.state.view(12)), self.state.view(12)[3:]

    def script(model: Any) -> Any:
        _, view = model(X)
        view.add_(5)
        yield model(X)

    return Model(), script


CASES = [
    *(need_of_a_parameter, need_of_an_input, need_of_what_it_computes, gradient_of_a_parameter),
    *(inference_mode, number_on_an_input, mask_on_an_input, marks_that_are_left),
    *(marks_from_block_to_block, number_on_a_parameter, count_on_a_parameter),
    *(buffer_that_is_returned, buffer_that_both_write_to, view_of_a_buffer),
]


@pytest.mark.parametrize("case", share_of(CASES, 3))
def test_facts_are_true(case: Any) -> None:
    follows(case, 2)


@pytest.mark.parametrize("case", [gradient_of_a_parameter, buffer_that_both_write_to])
def test_facts_are_true_on_three(case: Any) -> None:
    follows(case, 3)


@pytest.mark.parametrize("case", [need_of_a_parameter, need_of_an_input, number_on_an_input,
                                  number_on_a_parameter, buffer_that_both_write_to])  # fmt: skip
def test_what_can_be_followed_is_split(case: Any) -> None:
    assert autoparallel.make_plan(case()[0], 2, example_inputs=X).breaks == ()


def test_planning_leaves_no_marks_on_tensors() -> None:
    model: Any = count_on_a_parameter()[0]
    autoparallel.make_plan(model, 2, example_inputs=X)
    assert vars(model.a.weight) == {}


class Returning(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.a(x)), self.a.weight


def test_a_parameter_that_is_returned_and_written_to() -> None:
    """Alone, the caller has the parameter itself."""

    def script(model: Any) -> Any:
        loss, weight = model(X)
        (loss + weight.square().sum()).backward()
        yield loss
        with torch.no_grad():
            weight.mul_(2)
        yield model(X)

    follows(lambda: (Returning(), script), 1)


def test_a_gradient_that_python_writes_to_is_refused() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.a.weight.grad is not None:
                self.a.weight.grad.zero_()
            return self.out(self.a(x))

    def script(model: Any) -> Any:
        yield after_backward(model)
        yield model(X)

    with pytest.raises(AutoParallelError, match="its gradient is written to"):
        follows(lambda: (Model(), script), 2)


def _lends(rank: int) -> str:
    model = autoparallel.autoparallelize(Returning(), 2, example_inputs=X)
    _, weight = model(X)
    with torch.no_grad():
        weight.mul_(2)
    try:
        model(X)
    except AutoParallelError as error:
        return str(error)
    torch.testing.assert_close(weight, model.a.weight)
    return ""


def test_a_copy_of_a_parameter_that_is_written_to() -> None:
    """It is no parameter: either the parameter follows, or the next call says so."""
    for text in run_processes(_lends, 2):
        assert not text or "a.weight was returned by the model, and then written to" in text
