"""Python that no op of a trace tells of, on two processes, and in copies of split modules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from processes import run_processes
from torch import nn
from unseen import Base, Case, X, after_backward

import autoparallel
from autoparallel.errors import AutoParallelError


def changing(model: nn.Module, *changes: Callable[[Any], None]) -> Case:
    """Return a model with a script that calls it before and after each change."""

    def script(split: Any) -> Any:
        yield after_backward(split)
        for change in changes:
            change(split)
            yield after_backward(split)
            yield after_backward(split)

    return model, script


def attributes() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept["calls"] = self.kept.get("calls", 0) + 1
            return self.out(self.a(x).tanh() * self.kept["scale"] / self.kept["calls"])

    return changing(Model({"scale": 2.0}), lambda model: model.kept.update(scale=3.0))


@functools.lru_cache
def table_of(size: int) -> torch.Tensor:
    return torch.linspace(0, 1, size, dtype=torch.float64)


def remembered() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x).tanh() * table_of(self.kept))

    return changing(Model(12), lambda model: table_of.cache_clear())


def enclosed() -> Case:
    strength = 1.0

    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x).tanh() * strength)

    def change(_: Any) -> None:
        nonlocal strength
        strength += 1

    def begin(_: Any) -> None:
        nonlocal strength
        strength = 1.0

    return changing(Model(), begin, change)


class Same(nn.Module):
    """Objects by identity: a copy of a module has copies of what it keeps, but for these."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.inner, self.kind = Base(), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.out(self.inner.a(x).tanh() * (2.0 if self.kind is First else 1.0))


class First:
    pass


class Second:
    pass


def identity() -> Case:
    return changing(Same(First), lambda model: setattr(model, "kind", Second))


def remade() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.kept is None or self.kept.size(0) != len(x):
                self.kept = torch.ones(len(x), 12, dtype=torch.float64).tril()
            return self.out(self.a(x).tanh() * self.kept)

    return changing(
        Model(), lambda model: setattr(model, "kept", None), lambda model: model.kept.mul_(2)
    )


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, options: dict[str, float]) -> torch.Tensor:
        ctx.options = options
        return x * options["forward"]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.options["backward"], None


def function_with_a_dict() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(Scaled.apply(self.a(x).tanh(), self.kept))

    options = {"forward": 2.0, "backward": -1.0}
    return changing(Model(options), lambda model: model.kept.update(backward=0.5))


def buffer() -> Case:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(12, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x).tanh()
            with torch.no_grad():
                self.seen.mul_(0.5).add_(hidden.mean(0))
            return self.out(hidden - self.seen)

    return changing(Model(), lambda model: model.seen.zero_())


def hook() -> Case:
    class Model(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x).tanh())

    def change(model: Any) -> None:
        model.a.register_forward_hook(lambda module, args, output: output * 2)

    return changing(Model(), change)


KINDS = (attributes, remembered, enclosed, identity, remade, function_with_a_dict, buffer, hook)


def whole(model: Any, script: Any) -> list[Any]:
    """Return what each step of a script yields, and the gradients after it."""
    return [(step.detach().clone(), gradients(model)) for step in script(model)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    return {
        path: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
        for path, grad in named.items()
    }


def compare(rank: int) -> dict[str, str]:
    """Return where a split module, a copy of it, or a copy after a call differs, by name."""
    found = {}
    for kind in KINDS:
        for way in ("itself", "copied", "called and copied"):
            runs = []
            for splits in (False, True):
                model: Any
                model, script = kind()
                if splits:
                    model = autoparallel.autoparallelize(model, 2, example_inputs=X)
                if way == "called and copied":
                    model(X)
                runs.append(whole(model if way == "itself" else copy.deepcopy(model), script))
            try:
                torch.testing.assert_close(runs[1], runs[0], rtol=1e-10, atol=1e-12)
            except AssertionError as error:
                found[f"{kind.__name__}, {way}"] = str(error)
    return found


def test_kinds_and_copies() -> None:
    assert run_processes(compare, 2) == [{}, {}]


def saved(rank: int, folder: str) -> str:
    """A split module says how to save it, and what was saved so goes on as the split one does."""
    model, script = buffer()
    split = autoparallel.autoparallelize(copy.deepcopy(model), 2, example_inputs=X)
    after_backward(split)
    try:
        torch.save(split, f"{folder}/{rank}")
    except AutoParallelError as error:
        said = str(error)
    state = autoparallel.full_state_dict(split)
    if rank == 0:
        torch.save(state, f"{folder}/whole")
    torch.distributed.barrier()
    model.load_state_dict(torch.load(f"{folder}/whole"))
    again = autoparallel.autoparallelize(copy.deepcopy(model), 2, example_inputs=X)
    expected = whole(model, script)
    for each in (split, again):
        torch.testing.assert_close(whole(each, script), expected, rtol=1e-10, atol=1e-12)
    return said


def test_a_module_is_saved_by_its_state(tmp_path: Any) -> None:
    assert all("full_state_dict" in said for said in run_processes(saved, 2, str(tmp_path)))
