"""What no op of a trace tells of: objects that change, contexts, caches, hooks that keep things."""

from __future__ import annotations

import array
import collections
import functools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from broad_cases import share_of
from split_ranks import as_unsplit
from torch import nn
from unseen import Base, X

import autoparallel
from autoparallel.errors import AliasError, AutoParallelError, CaptureError, WrappedModelError


class Schedule:
    value = 1.0

    def get(self) -> float:
        return self.value


def around(table: dict[str, float]) -> Callable[..., float]:
    def read(new: float | None = None) -> float:
        if new is not None:
            table["value"] = new
        return table["value"]

    return read


def bare() -> Any:
    return type("Bare", (), {})()


# What makes the object, reads a number of it, and changes that number.
KEPT: dict[str, tuple[Any, Any, Any]] = {
    "a namespace": (
        lambda: types.SimpleNamespace(value=1.0),
        lambda k: k.value,
        lambda k, v: setattr(k, "value", v),
    ),
    "a deque": (lambda: collections.deque([1.0]), lambda k: k[-1], lambda k, v: k.append(v)),
    "a set": (lambda: {0.0}, lambda k: float(len(k)), lambda k, v: k.add(v)),
    "an array": (lambda: np.ones(1), lambda k: float(k[0]), lambda k, v: k.fill(v)),
    "an array of numbers": (
        lambda: array.array("d", [1.0]),
        lambda k: k[0],
        lambda k, v: k.__setitem__(0, v),
    ),
    "a tensor": (lambda: torch.ones(1), lambda k: k.tolist()[0], lambda k, v: k.fill_(v)),
    "a method": (
        lambda: Schedule().get,
        lambda k: k(),
        lambda k, v: setattr(k.__self__, "value", v),
    ),
    "a partial": (
        lambda: functools.partial(lambda table: table["value"], {"value": 1.0}),
        lambda k: k(),
        lambda k, v: k.args[0].update(value=v),
    ),
    "a closure": (lambda: around({"value": 1.0}), lambda k: k(), lambda k, v: k(v)),
    "an object's dict": (
        bare,
        lambda k: vars(k).get("value", 1.0),
        lambda k, v: setattr(k, "value", v),
    ),
}


@pytest.mark.parametrize("kind", share_of(KEPT, 3))
def test_objects_of_all_kinds_are_followed(kind: str) -> None:
    make, read, write = KEPT[kind]

    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * read(self.kept))

    def script(model: Any) -> Any:
        for value in (1.0, 3.0, 0.5):
            write(model.kept, value)
            model.zero_grad()
            loss = model(X)
            loss.backward()
            yield loss
        write(model.kept, 1.0)  # a closure is one object for all copies of the model

    as_unsplit(Model(make()), 1, (X,), script)


@pytest.mark.parametrize("make", [lambda: iter(range(9)), lambda: random.Random(3)])
def test_what_moves_on_by_itself_is_left_to_python(make: Any) -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = self.kept
            number = kept.random() if isinstance(kept, random.Random) else next(kept)
            return self.out(self.a(x) * number)

    plan = autoparallel.make_plan(Model(make()), 2, example_inputs=X)
    assert "something else at each call" in plan.breaks[0].reason


def test_objects_and_functions_as_arguments() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
            hidden = self.a(x)
            return self.out(given(hidden) if callable(given) else hidden * given.value)

    settings = types.SimpleNamespace(value=1.0)
    given: list[Any] = [torch.tanh, torch.sin, torch.tanh, Schedule(), settings]

    def script(model: Any) -> Any:
        for one in given:
            yield model(X, one)
        for value in (2.0, 1.0):
            settings.value = value
            yield model(X, settings)

    as_unsplit(Model(), 1, (X, torch.tanh), script)


def test_what_a_forward_keeps_and_writes_to() -> None:
    """A memory of its own, and a list that it was given."""

    class Model(Base):
        def forward(self, x: torch.Tensor, results: list[Any]) -> torch.Tensor:
            hidden = self.a(x)
            self.kept.append(hidden.detach().mean(0))
            results.append(hidden)
            return self.out(hidden + sum(self.kept))

    def script(model: Any) -> Any:
        for scale in (1.0, 2.0, 3.0):
            results: list[Any] = []
            yield model(X * scale, results)
            yield results[0]
        return len(model.kept)

    model = Model(collections.deque(maxlen=2))
    assert as_unsplit(model, 1, (X, []), script) == 2


@pytest.mark.parametrize("context", ["inference mode", "saved tensors"])
def test_contexts_that_a_trace_does_not_see(context: str) -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if context == "inference mode":
                with torch.inference_mode():
                    scale = self.a.weight.norm()
                return self.out(self.a(x) + scale)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
                hidden = self.a(x).exp()
            return self.out(hidden)

    def script(model: Any) -> Any:
        loss = model(X)
        loss.backward()
        yield loss

    as_unsplit(Model(), 2, (X,), script)


def test_what_runs_later_is_refused() -> None:
    class Generating(Base):
        def forward(self, x: torch.Tensor) -> Any:
            yield self.a(x)

    class Returning(Base):
        def forward(self, x: torch.Tensor) -> Any:
            hidden = self.a(x)
            return lambda scale: self.out(hidden * scale)

    for kind in (Generating, Returning):
        with pytest.raises(CaptureError, match=r"returns a (generator|function)"):
            autoparallel.make_plan(kind(), 2, example_inputs=X, strict_capture=True)


@functools.lru_cache(None)
def table(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float64)


TABLES: dict[int, torch.Tensor] = {}
SEEN: list[Any] = []


def test_planning_leaves_nothing_in_caches_and_lists() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            SEEN.append(1)
            if 12 not in TABLES:
                TABLES[12] = torch.ones(12, dtype=torch.float64)
            return self.out(self.a(x) + table(12) * TABLES[12])

    table.cache_clear()
    model = Model()
    autoparallel.make_plan(model, 2, example_inputs=X)
    assert SEEN == []
    assert TABLES == {}
    assert type(table(12)) is torch.Tensor
    assert type(model(X)) is torch.Tensor


def test_hooks_that_keep_results_anywhere() -> None:
    results: dict[str, torch.Tensor] = {}

    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x))

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        results["a"] = output.detach()

    model = Model()
    model.a.register_forward_hook(hook)

    def script(model: Any) -> Any:
        for scale in (1.0, 2.0):
            results.clear()
            yield model(X * scale)
            yield results["a"]

    as_unsplit(model, 1, (X,), script)


class Plain(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x))


def test_marks_on_parameters_are_kept() -> None:
    model = Plain()
    model.a.weight._no_weight_decay = True  # type: ignore[attr-defined]
    for example in (X, None):
        split = autoparallel.autoparallelize(model, 1, example_inputs=example)
        split(X)
        named = split.named_parameters()
        assert [n for n, p in named if getattr(p, "_no_weight_decay", False)] == ["a.weight"]


def test_one_memory_of_two_tensors_is_refused() -> None:
    model: Any = Plain()
    model.b.weight.data = model.a.weight.data.t()
    with pytest.raises(AliasError, match=r"a\.weight and b\.weight lie in the same memory"):
        autoparallel.make_plan(model, 2, example_inputs=X)
    model = Plain()
    model.register_buffer("view", model.a.weight.detach()[3:])
    with pytest.raises(AliasError, match="lie in the same memory"):
        autoparallel.make_plan(model, 2, example_inputs=X)
    # Beside each other, as in one flat buffer, they do no harm.
    flat = torch.randn(200, dtype=torch.float64)
    model = Plain()
    model.a.weight.data, model.b.weight.data = flat[:96].view(12, 8), flat[96:192].view(8, 12)
    autoparallel.make_plan(model, 2, example_inputs=X)


def test_an_optimizer_from_before_the_split() -> None:
    model: Any = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split = autoparallel.autoparallelize(model, 1, example_inputs=X)
    split(X).backward()
    with pytest.raises(AutoParallelError, match="SGD has the parameters of the model before"):
        optimizer.step()
    model(X).backward()  # the model itself may still be trained
    optimizer.step()


def test_scripted_modules_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4), torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(WrappedModelError, match=r"compiled by torch.jit"):
        autoparallel.make_plan(model, 2, example_inputs=torch.ones(2, 8))


def test_compiled_modules_and_lazy_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4), torch.compile(nn.Linear(4, 4), backend="eager"))
    with pytest.raises(WrappedModelError, match=r"compiled by torch.compile"):
        autoparallel.make_plan(model, 2, example_inputs=torch.ones(2, 8))
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    model[1].compile(backend="eager")
    with pytest.raises(WrappedModelError, match=r"compiled by torch.compile\s+where: 1"):
        autoparallel.autoparallelize(model, 1)
    lazy = nn.Sequential(nn.Linear(8, 4), nn.LazyLinear(4))
    with pytest.raises(WrappedModelError, match="has no size yet"):
        autoparallel.autoparallelize(lazy, 1)


def test_models_that_share_parameters_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """A model that is split again shares all of them, and is another one on purpose."""
    first = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    second = nn.Sequential(first[0], nn.Linear(4, 2))
    split = [autoparallel.autoparallelize(first, 1) for _ in range(2)]
    assert "trained apart" not in caplog.text
    split.append(autoparallel.autoparallelize(second, 1, example_inputs=torch.ones(2, 8)))
    assert "0.weight, 0.bias of Sequential are also in ParallelSequential" in caplog.text
    assert len(split) == 3  # those that nobody has any more are no matter


class Prints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("a batch of", x.shape[0])
        return self.layer(x)


class PrintsNumbers(Prints):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.mean()) > 0:
            print("the mean is", x.mean().item())
        return super().forward(x)


def test_what_a_forward_prints_is_told_or_printed(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program prints nothing, which a warning says; planning prints nothing either."""
    split = autoparallel.autoparallelize(Prints(), 1)
    split(torch.ones(2, 8))
    assert not capsys.readouterr().out
    assert "Prints.forward prints 'a batch of 2'" in caplog.text
    # What stays Python prints at each call, and once.
    split = autoparallel.autoparallelize(PrintsNumbers(), 1)
    for _ in range(2):
        split(torch.ones(2, 8))
    assert capsys.readouterr().out == "the mean is 1.0\na batch of 2\n" * 2


def test_a_parametrization_after_splitting_is_refused_and_leaves_the_class() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    split = autoparallel.autoparallelize(model, 1, example_inputs=torch.ones(2, 8))
    nn.utils.parametrize.register_parametrization(split[0], "weight", nn.Tanh())
    assert not hasattr(nn.Linear, "weight")
    with pytest.raises(AutoParallelError, match="another class than when it was split"):
        split(torch.ones(2, 8))


def test_a_forward_that_differentiates_by_itself_is_split_around() -> None:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            energy = self.b(self.a(x).tanh()).sum()
            (forces,) = torch.autograd.grad(energy, x, create_graph=True)
            return energy * 0.1 + forces.square().mean()

    def script(model: Any) -> Any:
        loss = model(X)
        loss.backward()
        yield loss

    as_unsplit(Model(), 2, (X,), script)
