"""Branches on values: the program has the way of the example inputs, and Python has the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from broad_cases import broad
from families import relative_error, worst_gradient
from split_ranks import as_unsplit, programs_of
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.parallel import module_calls
from autoparallel.parallel.simulate import Simulation

WIDTH = 12


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Layers(nn.Module):
    """Three equal layers, each of which goes its own way at `way`, and their mean square."""

    def __init__(self, way: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.way(torch.tanh(layer(x)))
        return x.square().mean()


def finite(y: torch.Tensor) -> torch.Tensor:
    """The check of many detectors, and a sign that differs between the layers."""
    if not torch.isfinite(y).all():
        y = y.clamp(-1, 1)
    return y * 2 if y.sum() > 0 else y


def asked(y: torch.Tensor) -> torch.Tensor:
    """The truth value, as .item() gives it, and of two tensors."""
    positive = (y.sum() > 0).item()
    same = torch.equal(y[0], y[0].abs()) or torch.allclose(y, -y)
    return y.abs() if positive and not same else y.exp()


def checked(y: torch.Tensor) -> torch.Tensor:
    """Torch's own checks, of which one asks inside of a function of torch's."""
    torch._check_tensor_all(y.sum() < 1e9)
    variance = 1.1 + y
    return y + functional.gaussian_nll_loss(y, torch.zeros_like(y), variance)


def sizes(y: torch.Tensor) -> torch.Tensor:
    """Numbers that follow from sizes alone: read, as a size, and in a slice."""
    half = torch.div(torch.tensor(y.shape[-1]), 2, rounding_mode="trunc")
    rows = torch.tensor(y.shape[0])
    y = y.reshape(rows, 2, half)[:, :, : half + 0]
    return functional.pad(y.flatten(1), (0, half))[:, : 2 * int(half)]


def listed(y: torch.Tensor) -> torch.Tensor:
    """Sizes in a table, as detectors have those of their levels."""
    table = torch.tensor([[2, 3], [1, 6]])
    levels = y.split([height * width for height, width in table.tolist()], 1)
    return torch.cat(levels[::-1], 1) * table.sum().tolist() / 12


WAYS = [finite, asked, checked, sizes, listed]


def parity(model: nn.Module, made: Simulation, x: torch.Tensor) -> None:
    model.zero_grad()
    loss = model(x)
    loss.backward()
    assert relative_error(made.output.detach(), loss.detach()) < 1e-13
    gradients = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert worst_gradient(dict(made.gradients), gradients)[0] < 1e-12


@pytest.mark.parametrize("world_size", [*broad(2), 3])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_way_of_the_example_is_one_program(
    way: Callable[..., torch.Tensor], world_size: int
) -> None:
    model, x = Layers(way).double(), numbers(5, WIDTH)
    plan = autoparallel.make_plan(model, world_size, example_inputs=(x,))
    assert not plan.breaks
    parity(model, autoparallel.simulate(model, example_inputs=(x,), plan=plan), x)


@pytest.mark.parametrize("way", [finite, *broad(asked)], ids=lambda way: way.__name__)
def test_other_ways_are_computed_as_python(
    way: Callable[..., torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Layers(way).double(), numbers(5, WIDTH)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    with caplog.at_level(logging.WARNING):
        for other in (-x, -x.abs()):
            made = autoparallel.simulate(model, example_inputs=(other,), plan=plan)
            parity(model, made, other)
    assert "is computed as Python where a branch on values goes another way" in caplog.text
    assert "test_branch_ways.py" in caplog.text


def test_a_way_through_other_layers() -> None:
    """The program knows nothing of the layer that the example does not call."""

    class OneOfTwo(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = self.layers[0] if x.sum() > 0 else self.layers[1]
            return (self.layers[2](chosen(x))).square().mean()

    model, x = OneOfTwo(finite).double(), numbers(5, WIDTH).abs()
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert not plan.breaks
    for other in (x, -x):
        parity(model, autoparallel.simulate(model, example_inputs=(other,), plan=plan), other)


def test_a_check_that_fails_raises_what_the_model_raises() -> None:
    class Judged(Layers):
        def forward(self, x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
            y = self.layers[0](x)
            return functional.gaussian_nll_loss(y, torch.zeros_like(y), variance)

    model, variance = Judged(finite).double(), numbers(5, WIDTH).abs()
    split = autoparallel.autoparallelize(model, 1, example_inputs=(variance, variance))
    assert not split.plan.breaks
    with pytest.raises(ValueError, match="negative entry"):
        split(variance, -variance)


def drawn(y: torch.Tensor) -> torch.Tensor:
    return y if torch.rand(()) < 0.5 else 2 * y


def counted(y: torch.Tensor) -> torch.Tensor:
    return y * int((y > 0).sum())


@pytest.mark.parametrize("way", [drawn, counted], ids=lambda way: way.__name__)
def test_draws_and_numbers_of_data_stay_python(way: Callable[..., torch.Tensor]) -> None:
    """A layer that is left out by chance, and a number that is another one in every batch."""
    model, x = Layers(way).double(), numbers(5, WIDTH)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert [item.path for item in plan.breaks] == [""]


def number_of(tensor: torch.Tensor) -> int:
    """One line that reads what sizes decide on, and what the data do."""
    return int(tensor)


def mixed(y: torch.Tensor) -> torch.Tensor:
    return y * number_of(torch.tensor(y.shape[-1])) / (1 + number_of((y > 0).sum()))


def oftener_with_gradients(y: torch.Tensor) -> torch.Tensor:
    """The example run records no gradients, and the trace does."""
    for _ in range(2 if torch.is_grad_enabled() else 1):
        y = y * 2 if y.sum() > 0 else y
    return y


@pytest.mark.parametrize("way", [mixed, oftener_with_gradients], ids=lambda way: way.__name__)
def test_a_line_that_the_run_tells_too_little_of_stays_python(
    way: Callable[..., torch.Tensor],
) -> None:
    """The same trace is not tried for ever."""
    model, x = Layers(way).double(), numbers(5, WIDTH)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert [item.path for item in plan.breaks] == [""]


def test_a_check_of_another_package_is_a_branch(caplog: pytest.LogCaptureFixture) -> None:
    """Its folder has a name that begins with torch; what torch's own checks ask must be true."""
    names: dict[str, Any] = {}
    text = "def _check_large(y):\n    return bool(y.abs().max() > 100)\n"
    exec(compile(text, f"{Path(torch.__file__).parent}stories/checks.py", "exec"), names)

    check_large = names["_check_large"]

    def scaled(y: torch.Tensor) -> torch.Tensor:
        return y / 100 if check_large(y) else y

    model, x = Layers(scaled).double(), numbers(5, WIDTH)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert not plan.breaks
    with caplog.at_level(logging.WARNING):
        parity(model, autoparallel.simulate(model, example_inputs=(x,), plan=plan), x)
    assert "computed as Python" not in caplog.text


def test_other_modes_go_the_ways_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running model has no values by which to plan; where a call turns back, nothing failed."""
    monkeypatch.setattr(module_calls, "note_failure", None)

    class Normed(Layers):
        def __init__(self) -> None:
            super().__init__(torch.sin)
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x) + 0.1 * x
            return super().forward(y / 100 if y.abs().max() > 100 else y)

    x = numbers(5, WIDTH)

    def script(module: nn.Module) -> Iterator[Any]:
        for training in (True, False, True):
            module.train(training)
            for inputs in (x, numbers(7, WIDTH)):
                module.zero_grad()
                loss = module(inputs)
                loss.backward()
                yield loss
            yield list(module.buffers())
        programs = programs_of(module)
        yield module(1e4 * x)
        return programs

    assert as_unsplit(Normed().double(), 2, (x,), script) == 2


def test_a_counter_stays_python() -> None:
    """A buffer that the forward writes to is another number in the next call."""

    class Counts(Layers):
        def __init__(self) -> None:
            super().__init__(finite)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            return super().forward(x) / int(self.steps)

    plan = autoparallel.make_plan(Counts().double(), 2, example_inputs=(numbers(5, WIDTH),))
    assert [item.path for item in plan.breaks] == [""]


class Block(nn.Module):
    """A block of several equal ones, which may take a way of its own."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.mix, self.branches = nn.Linear(WIDTH, WIDTH), branches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.mix(x))
        return y * 2 if self.branches and y.sum() > 0 else y


class Checked(nn.Module):
    """Equal blocks between two checks, as detectors check their losses."""

    def __init__(self, branches: bool, seldom: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList(Block(branches) for _ in range(4))
        self.seldom = seldom

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.isfinite(x).all()
        for block in self.blocks:
            x = block(x)
        wrong = torch.isnan(x) if self.seldom else x > 0
        if wrong.any():
            x = x * 3
        return x.square().mean()


@pytest.mark.parametrize(
    ("branches", "seldom", "exports", "folded"),
    [(False, True, 1, True), (False, False, 2, True), (True, True, 3, False)],
    ids=["guessed", "guessed wrongly", "in blocks"],
)
def test_checks_are_guessed_and_equal_blocks_fold_between_them(
    branches: bool, seldom: bool, exports: int, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, export = [], torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda *args, **kwargs: counted.append(1) or export(*args, **kwargs)
    )
    model, x = Checked(branches, seldom).double(), numbers(5, WIDTH)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert plan.captured is not None
    assert not plan.breaks
    assert len(counted) == exports
    assert bool(plan.captured.repeats) == folded
    for other in (x, -x):
        made = autoparallel.simulate(model, example_inputs=(other,), plan=plan)
        parity(model, made, other)
    three = autoparallel.make_plan(model, 3, example_inputs=(x,))
    parity(model, autoparallel.simulate(model, example_inputs=(x,), plan=three), x)


class Refused(nn.Module):
    """A check, and then what no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mix(x)
        assert torch.isfinite(y).all()
        return (y * float(y.detach().numpy().shape[0])).square().mean()


def test_a_trace_that_fails_behind_a_right_guess_is_not_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted, export = [], torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda *args, **kwargs: counted.append(1) or export(*args, **kwargs)
    )
    model, x = Refused().double(), numbers(5, WIDTH)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert [one.path for one in plan.breaks] == [""]
    # The model, and the layer in it.
    assert len(counted) == 2
    parity(model, autoparallel.simulate(model, example_inputs=(x,), plan=plan), x)
