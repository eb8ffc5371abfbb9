"""Transforms of torch.func in a forward are traced as the plain ops that they make.

Outputs and every gradient are those of the unsplit model, at other sizes as well, in float64.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from broad_cases import share_of
from families import relative_error
from torch import nn
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import autoparallel
from autoparallel.capture.export import capture
from autoparallel.errors import CaptureError

TOLERANCE = 1e-12
# Asked by C's functions alone, of which no profile function is told.
clock = functools.partial(time.perf_counter_ns)


class Layer(nn.Module):
    """A residual layer, in which a transform does the work."""

    def __init__(self, work: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))
        self.held = [self.up.weight]
        self.work = work

    def row(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer makes of one row."""
        made: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return made

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return self.row(x).square().sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.work(self, x)


def value_and_slope(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    slope, value = vmap(grad_and_value(layer.energy))(x)
    made: torch.Tensor = slope + value[:, None]
    return made


def written(x: torch.Tensor) -> torch.Tensor:
    """A copy is written to, inside of the transform."""
    x = x.clone()
    x[0] = 0.0
    return x


def without_gradient(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """No gradient comes from the factor, to parameters that others give one."""

    def row(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            factor = layer.row(x)
        return layer.row(x) * factor + layer.row(x).detach().sin()

    made: torch.Tensor = vmap(row)(x)
    return made


def curved(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Ops whose derivatives are differentiated again by formulas of their own."""

    def energy(x: torch.Tensor) -> torch.Tensor:
        y = layer.row(x)
        return (torch.softmax(y, -1) * layer.scale + functional.gelu(y) * y.sigmoid().exp()).sum()

    made: torch.Tensor = vmap(grad(energy))(x)
    return made


def weights_alone(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Sizes of what is given otherwise are known within."""
    some = layer.up.weight.view(8, 2, 6)
    hidden = vmap(lambda weights: torch.relu(x @ weights.T))(some)
    made: torch.Tensor = layer.down(hidden.permute(1, 0, 2).flatten(1))
    return made


def adapted(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """As MAML does: two steps on the layer's own weights, and a call with what they become."""
    weights = dict(layer.down.named_parameters())
    hidden = torch.tanh(layer.up(x))

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return (functional_call(layer.down, weights, (hidden,)) - x).square().mean()

    for _ in range(2):
        slopes = grad(loss)(weights)
        weights = {name: weights[name] - 0.1 * slopes[name] for name in weights}
    made: torch.Tensor = functional_call(layer.down, weights, (hidden,))
    return made


WORK: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "a row at a time": lambda layer, x: vmap(layer.row)(x),
    "a module's rows": lambda layer, x: vmap(layer.down)(torch.tanh(layer.up(x))),
    "another dim": lambda layer, x: vmap(torch.sin, in_dims=1, out_dims=1)(layer.row(x)),
    "in chunks": lambda layer, x: vmap(layer.row, chunk_size=2)(x),
    "one inside another": lambda layer, x: vmap(
        lambda row: vmap(lambda weights: row * weights)(layer.up.weight[:6]).sum(0)
    )(layer.row(x)),
    "a gradient of each row": lambda layer, x: vmap(grad(layer.energy))(x),
    "no gradient": without_gradient,
    "gradients that are differentiated": curved,
    "value and gradient": value_and_slope,
    "forward derivatives": lambda layer, x: jvp(layer.row, (x,), (torch.ones_like(x),))[1],
    "jacobians": lambda layer, x: vmap(jacrev(layer.row))(x).sum(1),
    "second derivatives": lambda layer, x: vmap(hessian(lambda row: layer.row(row).sum()))(x).sum(
        1
    ),
    "steps of training": adapted,
    "weights alone": weights_alone,
    "a buffer": lambda layer, x: vmap(lambda row: row * layer.scale)(layer.row(x)),
    "a weight in a list": lambda layer, x: vmap(lambda row: layer.down(row @ layer.held[0].T))(x),
    "a tensor that is made": lambda layer, x: vmap(lambda row: row + torch.arange(6.0))(
        layer.row(x)
    ),
    "a size": lambda layer, x: vmap(lambda row: row / x.shape[0])(layer.row(x)),
    "a write": lambda layer, x: vmap(written)(layer.row(x)),
}
# Their own sizes are in what torch makes of them.
AT_ONE_SIZE = {
    "in chunks",
    "gradients that are differentiated",
    "forward derivatives",
    "second derivatives",
}


class Ensemble(nn.Module):
    """Networks whose weights are stacked, run as one."""

    def __init__(self) -> None:
        super().__init__()
        networks = [nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(4)]
        stacked, _ = stack_module_state(networks)  # type: ignore[arg-type]
        self.names = list(stacked)
        self.weights = nn.ParameterList(nn.Parameter(each.detach()) for each in stacked.values())
        self.shape = [networks[0].to("meta")]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def member(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = functional_call(self.shape[0], weights, (x,))
            return made

        weights = dict(zip(self.names, self.weights, strict=True))
        return vmap(member, (0, None))(weights, x).square().mean()


class Model(nn.Module):
    """Two layers and a loss."""

    def __init__(self, work: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(work), Layer(work))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def build(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return (Ensemble() if kind == "an ensemble" else Model(WORK[kind])).double()


@pytest.mark.parametrize("kind", share_of([*WORK, "an ensemble"], 6))
def test_transforms_are_traced_whole(kind: str) -> None:
    """Also parameters that only a transform reads are split; nothing stays Python."""
    x = torch.randn(8, 6).double()
    plan = autoparallel.make_plan(build(kind), 2, example_inputs=x)
    assert not plan.breaks
    assert plan.split_parameter_bytes > 0.99
    others = [] if kind in AT_ONE_SIZE else [torch.randn(11, 6).double()]
    for batch in (x, *others):
        model = build(kind)
        loss = model(batch)
        loss.backward()
        split = autoparallel.simulate(build(kind), plan=plan, example_inputs=batch)
        assert relative_error(split.output, loss.detach()) < TOLERANCE
        for path, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert relative_error(split.gradients[path], parameter.grad, 1e-9) < TOLERANCE, path


def reason(work: Callable[[Any, torch.Tensor], torch.Tensor]) -> str:
    """Return why a model whose layers do this work stays Python, but for its linear layers."""
    plan = autoparallel.make_plan(Model(work), 2, example_inputs=torch.randn(8, 6))
    assert {path for part in plan.parts for path in part.paths} >= {"layers.0.up", "layers.1.down"}
    return plan.breaks[0].reason


def test_random_numbers_are_drawn_outside() -> None:
    """Torch draws them in an order of its own there."""

    def drops(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = vmap(functional.dropout, randomness="different")(layer.row(x))
        return made

    assert "draws random numbers under a transform" in reason(drops)


def test_numbers_that_change_are_seen_inside() -> None:
    """A number that the forward finds out anew at each call is no constant of the graph."""

    def asks(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = vmap(lambda row: functional.elu(row, clock() % 1000003))(layer.row(x))
        return made

    assert "something else when it runs again" in reason(asks)


def by_op(x: torch.Tensor) -> None:
    x.mul_(2)


def by_index(x: torch.Tensor) -> None:
    x[0] = 0.0


@pytest.mark.parametrize("write", [by_op, by_index])
def test_writes_without_gradient_are_refused(write: Callable[[torch.Tensor], None]) -> None:
    """The gradient of what was there before goes on, which no plain op says."""

    def writes(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        def row(x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            with torch.no_grad():
                write(x)
            return x

        made: torch.Tensor = vmap(row)(layer.row(x))
        return made

    assert "writes to a tensor without gradients" in reason(writes)


def test_errors_that_the_model_catches_count() -> None:
    """It would go another way than it does when it is not traced."""

    def tries(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        try:
            made: torch.Tensor = vmap(functional.dropout, randomness="different")(layer.row(x))
        except Exception:
            return layer.row(x)
        return made

    assert "draws random numbers under a transform" in reason(tries)


class Seen:
    """An object of the user's that a function under a transform is given, and writes to."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor, self.uses = factor, 0


class Doubled(TorchFunctionMode):
    """A mode of the user's in which a sine is doubled."""

    def __torch_function__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.sin else result


def handed(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The object is the user's own within: it is not taken apart and put together anew."""
    seen = Seen(x * 2)

    def energy(x: torch.Tensor, seen: Seen) -> torch.Tensor:
        seen.uses += 1
        return (layer.row(x) * seen.factor).square().sum()

    made: torch.Tensor = grad(energy)(x, seen)
    return made * seen.uses


def kept(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """A tensor that is handed back as it was has the graph that it had."""

    def row(x: torch.Tensor) -> torch.Tensor:
        y = layer.row(x)
        with torch.no_grad():
            z = y.contiguous()
        return z * x

    made: torch.Tensor = vmap(row)(x)
    return made


@pytest.mark.parametrize("work", [handed, kept])
def test_what_is_around_and_within_is_the_users(
    work: Callable[[Any, torch.Tensor], torch.Tensor],
) -> None:
    x = torch.randn(8, 6).double()
    torch.manual_seed(3)
    model = Model(work).double()
    plan = autoparallel.make_plan(model, 2, example_inputs=x)
    assert not plan.breaks
    split = autoparallel.simulate(model, plan=plan, example_inputs=x)
    loss = model(x)
    loss.backward()
    assert relative_error(split.output, loss.detach()) < TOLERANCE
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_error(split.gradients[path], parameter.grad, 1e-9) < TOLERANCE, path


def test_a_mode_around_sees_what_is_within() -> None:
    """A model planned in a mode of the user's does what the mode does, in transforms too."""

    def sine(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = vmap(lambda row: torch.sin(layer.row(row)))(x)
        return made

    x = torch.randn(8, 6).double()
    torch.manual_seed(3)
    model = Model(sine).double()
    with Doubled():
        split = autoparallel.simulate(model, 2, example_inputs=x)
        assert relative_error(split.output, model(x).detach()) < TOLERANCE
    assert relative_error(split.output, model(x).detach()) > 0.01


def test_autograd_inside_is_refused() -> None:
    """Autograd detaches what its backward pass reads, once the forward has run."""

    def asks(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        def row(x: torch.Tensor) -> torch.Tensor:
            value = (x * layer.down.bias).tanh().sum()
            return torch.autograd.grad(value, layer.down.bias, create_graph=True)[0]

        made: torch.Tensor = vmap(row)(layer.row(x))
        return made

    with pytest.raises(CaptureError, match="calls autograd under a transform"):
        capture(Model(asks), (torch.randn(8, 6),), {})


def test_ops_that_leave_out_results_stay_python() -> None:
    """The gradient of a norm without weights has two results that are none."""

    def normed(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        def energy(x: torch.Tensor) -> torch.Tensor:
            return functional.layer_norm(x, (6,)).pow(3).sum()

        made: torch.Tensor = vmap(grad(energy))(layer.row(x))
        return made

    assert "leaves out one of its results" in reason(normed)


def test_other_transforms_stay_python() -> None:
    """Those that return a function, which is called later, are told."""

    def pulled(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        value, back = vjp(lambda rows: rows.sin() * 2, layer.row(x))
        made: torch.Tensor = back(value)[0]
        return made

    assert "under a transform of torch.func" in reason(pulled)
