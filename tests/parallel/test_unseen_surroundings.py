"""What lies around a model and its forward reads: modules, the environment, switches, hooks."""

from __future__ import annotations

import contextvars
import importlib
import os
import sys
import types
from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from processes import run_processes
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from unseen import Base, Case, X, after_backward, differences, follows

import autoparallel


class Options:
    """Settings inside of settings."""

    def __init__(self) -> None:
        self.inner = types.SimpleNamespace(scale=1.0)


settings = types.ModuleType("unseen_settings")
vars(settings).update(scale=1.0, options=Options(), table={"options": Options()})
sys.modules["unseen_settings"] = settings
SCALE = 1.0
VARIABLE = contextvars.ContextVar("VARIABLE", default=1.0)
EMPTY: contextvars.ContextVar[float] = contextvars.ContextVar("EMPTY")
UNSET = contextvars.ContextVar("UNSET", default=2.0)


def looked_up() -> float:
    return float(importlib.import_module("unseen_settings").scale)


def imported() -> float:
    import unseen_settings as alias  # type: ignore[import-not-found]

    return float(alias.scale)


# What reads a number, and what changes it.
READ: dict[str, tuple[Any, Any]] = {
    "a module by importlib": (looked_up, lambda v: setattr(settings, "scale", v)),
    "a module by import": (imported, lambda v: setattr(settings, "scale", v)),
    "a module by sys.modules": (
        lambda: sys.modules["unseen_settings"].scale,
        lambda v: setattr(settings, "scale", v),
    ),
    "a module by getattr": (
        lambda: getattr(settings, "scale"),  # noqa: B009
        lambda v: setattr(settings, "scale", v),
    ),
    "globals()": (lambda: globals()["SCALE"], lambda v: globals().update(SCALE=v)),
    "an object in an object": (
        lambda: settings.options.inner.scale,
        lambda v: setattr(settings.options.inner, "scale", v),
    ),
    "an object in a dict": (
        lambda: settings.table["options"].inner.scale,
        lambda v: setattr(settings.table["options"].inner, "scale", v),
    ),
    "a context variable": (VARIABLE.get, VARIABLE.set),
    "one without a value": (lambda: EMPTY.get(1.0), EMPTY.set),
    "the environment": (
        lambda: float(os.environ.get("UNSEEN_SCALE", "1")) * float(os.getenv("UNSEEN_SCALE", "1")),
        lambda v: os.environ.__setitem__("UNSEEN_SCALE", str(v)),
    ),
    "a name in the environment": (
        lambda: 2.0 if "UNSEEN_FLAG" in os.environ else 1.0,
        lambda v: (os.environ.pop if v == 1.0 else os.environ.setdefault)("UNSEEN_FLAG", "1"),
    ),
    "deterministic algorithms": (
        lambda: 1.0 + torch.are_deterministic_algorithms_enabled(),
        lambda v: torch.use_deterministic_algorithms(v != 1.0),
    ),
    "anomaly detection": (
        lambda: 1.0 + torch.is_anomaly_enabled(),
        lambda v: torch.autograd.set_detect_anomaly(v != 1.0, check_nan=False),
    ),
}


@pytest.mark.parametrize("kind", share_of(READ, 3))
def test_what_a_forward_reads_around_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = READ[kind]
    monkeypatch.delenv("UNSEEN_SCALE", raising=False)
    monkeypatch.delenv("UNSEEN_FLAG", raising=False)

    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind == "a context variable":
                return self.out(self.a(x) * VARIABLE.get())
            if kind == "one without a value":
                return self.out(self.a(x) * EMPTY.get(1.0))
            return self.out(self.a(x) * read())

    def script(model: Any) -> Any:
        for value in (1.0, 3.0, 1.0):
            write(value)
            yield model(X)

    model = Model()
    follows(lambda: (model, script), 2)
    assert autoparallel.make_plan(model, 2, example_inputs=X).breaks == ()


def test_a_context_variable_at_its_own_default() -> None:
    """A plan fits the model that it was made for, where nobody has set the variable."""

    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x) * UNSET.get())

    model = Model()
    plan = autoparallel.make_plan(model, 2, example_inputs=X)
    made = autoparallel.simulate(model, example_inputs=X, plan=plan)
    torch.testing.assert_close(made.output, model(X).detach())


class Plain(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x).tanh())


def global_hooks() -> Case:
    register = nn.modules.module
    hooks: list[Any] = [
        (register.register_module_forward_hook, lambda m, args, output: output * 2),
        (register.register_module_forward_pre_hook, lambda m, args: (args[0] * 2,)),
        (register.register_module_full_backward_pre_hook, lambda m, grads: (grads[0] * 2,)),
        (
            register.register_module_full_backward_hook,
            lambda m, grads, _: tuple(None if grad is None else grad * 2 for grad in grads),
        ),
    ]

    def script(model: Any) -> Any:
        yield after_backward(model)
        for function, hook in hooks:
            handle = function(hook)
            x = X.clone().requires_grad_()
            yield after_backward(model, x), x.grad
            handle.remove()
        yield after_backward(model)

    return Plain(), script


def forward_gradients_inside() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                value, tangent = forward_ad.unpack_dual(self.a(dual).tanh())
            return self.out(value + tangent)

    return Model(), lambda model: iter([after_backward(model)])


def forward_gradients_around() -> Case:
    def script(model: Any) -> Any:
        yield model(X)
        with forward_ad.dual_level():
            result = model(forward_ad.make_dual(X, torch.ones_like(X)))
            value, tangent = forward_ad.unpack_dual(result)
            yield value, tangent
        yield after_backward(model)

    return Plain(), script


def function_transform_inside() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value, tangent = torch.func.jvp(lambda z: self.a(z).tanh(), (x,), (torch.ones_like(x),))
            return self.out(value + tangent)

    return Model(), lambda model: iter([after_backward(model)])


class Doubling(TorchFunctionMode):
    """Takes a function by the name that the model calls it by: a program calls another one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.Tensor.tanh else result


def function_mode_around() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x).tanh())

    def script(model: Any) -> Any:
        yield after_backward(model)
        with Doubling():
            yield after_backward(model)
        yield after_backward(model)

    return Model(), script


def default_device_around() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            here = torch.ones(12).device == x.device
            return self.out(self.a(x).tanh() * (1.0 if here else 2.0))

    def script(model: Any) -> Any:
        for device in ("cpu", "meta", "cpu"):
            with torch.device(device):
                yield after_backward(model)

    return Model(), script


# What these register or enter is one for all threads of a process.
ALONE = [
    *(global_hooks, forward_gradients_inside, forward_gradients_around),
    *(function_transform_inside, function_mode_around, default_device_around),
]


@pytest.mark.parametrize("case", ALONE)
def test_hooks_and_forward_gradients(case: Any) -> None:
    follows(case, 1)


def _alone(rank: int) -> dict[str, str]:
    return differences(rank, {case.__name__: case for case in ALONE})


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_hooks_and_forward_gradients_on_processes(world_size: int) -> None:
    assert run_processes(_alone, world_size) == [{}] * world_size


def test_a_mode_in_which_a_model_was_planned_is_in_its_program(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also in calls outside of it, which is said when the model is split."""

    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x).tanh())

    with Doubling():
        split = autoparallel.autoparallelize(Model(), 1, example_inputs=X)
        torch.testing.assert_close(split(X), Model()(X))
        assert "tanh" in split.emitted_program
    told = [record.message for record in caplog.records if "called outside" in record.message]
    assert len(told) == 1
    assert told[0].startswith("Doubling sees calls of torch's functions")


def test_a_mode_that_sees_parts_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            return function(*args, **(kwargs or {}))

    model = autoparallel.autoparallelize(Plain(), 1, example_inputs=X)
    for _ in range(2):
        with Counting():
            model(X)
    told = [row for row in caplog.messages if "Counting sees the ops that this rank runs" in row]
    assert len(told) == 1


def test_hooks_of_planning_are_no_hooks_of_the_user() -> None:
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    try:
        autoparallel.make_plan(Plain(), 2, example_inputs=X)
    finally:
        handle.remove()
    assert seen == []
