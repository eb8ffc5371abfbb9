"""Autograd Functions of the user's: their own backward is what a split module runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from processes import run_processes
from releases import applied_by_keyword, tried_under_autocast
from torch import nn
from torch.nn import functional
from user_functions import CARRIED, Gated, Layers, Returned, Reversed, layers

import autoparallel
from autoparallel.capture.custom_functions import function_op
from autoparallel.errors import UnsupportedOpError


def planned(model: nn.Module, world_size: int, x: torch.Tensor) -> Any:
    """Return the plan of a model whose split step is its own: loss, and every gradient."""
    whole = copy.deepcopy(model)
    loss = whole(x)
    loss.backward()
    plan = autoparallel.make_plan(model, world_size, example_inputs=x)
    made = autoparallel.simulate(model, example_inputs=x, plan=plan)
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-12, atol=0)
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    torch.testing.assert_close(dict(made.gradients), expected, rtol=1e-10, atol=1e-13)
    return plan


def functions_of(plan: Any) -> list[str]:
    """Return the names of the Functions that are ops of a plan."""
    operations = [function_op(op.target) for op in plan.ops]
    return [operation.name for operation in operations if operation is not None]


@pytest.mark.parametrize("world_size", [*broad(2), 3])
@pytest.mark.parametrize(
    "kind",
    share_of(
        [
            pytest.param(kind, marks=applied_by_keyword if kind == "keyword" else ())
            for kind in CARRIED
        ],
        2,
    ),
)
def test_its_own_backward_runs(kind: str, world_size: int) -> None:
    model, x = layers(CARRIED[kind])
    plan = planned(model, world_size, x)
    assert not plan.breaks
    assert functions_of(plan)


class Runs(torch.autograd.Function):
    """Runs a module that it is given, without a graph, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + module(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = x + ctx.module(x)
        torch.autograd.backward(y, grad)
        return x.grad, None


def reads_around(x: torch.Tensor, model: Layers, late: bool) -> torch.Tensor:
    """Apply a Function that reads a parameter that it is not given. late: in its backward."""

    class Around(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * (1.0 if late else model.scale)

        @staticmethod
        def backward(ctx, grad):
            return grad * model.scale

    return Around.apply(x)


class Draws(torch.autograd.Function):
    """Drops elements by random numbers."""

    @staticmethod
    def forward(ctx, x):
        kept = (torch.rand_like(x) > 0).to(x.dtype)
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0]


class Dirty(torch.autograd.Function):
    """Writes to its operand."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Measured(torch.autograd.Function):
    """Goes one of two ways, by the values of its operand."""

    @staticmethod
    def forward(ctx, x):
        ctx.sign = 1 if float(x.sum()) > 1e9 else -1
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.sign * grad


class Listed(torch.autograd.Function):
    """Takes its tensors in a list, where autograd does not see them."""

    @staticmethod
    def forward(ctx, x, others):
        return x + others[0]

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, None


class Noting(torch.autograd.Function):
    """Puts what it has seen into a container that it is given, in its backward if it is a dict."""

    @staticmethod
    def forward(ctx, x, notes):
        ctx.notes = notes
        if isinstance(notes, list):
            notes.append(2.0)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if isinstance(ctx.notes, dict):
            ctx.notes["seen"] = True
        return 2 * grad, None


def noted(h: torch.Tensor, notes: Any) -> torch.Tensor:
    """Return what comes of a note that a Function leaves in its list."""
    return Noting.apply(h, notes) * sum(notes)


REFUSED = {
    "module": (lambda h, m: Runs.apply(h, m.gate), "one of its arguments is a Linear"),
    "reads around": (lambda h, m: reads_around(h, m, False), "none of its arguments"),
    "reads late": (lambda h, m: reads_around(h, m, True), "none of its arguments"),
    "draws": (lambda h, m: Draws.apply(h), "it draws random numbers"),
    "dirty": (lambda h, m: Dirty.apply(h.clone()), "it writes to a tensor"),
    "values": (lambda h, m: Measured.apply(h), "cannot be followed"),
    "list": (lambda h, m: Listed.apply(h, [m.scale]), "tensors in lists"),
    "dict": (lambda h, m: Listed.apply(h, {0: m.scale}), "tensors in lists"),
    "notes": (lambda h, m: noted(h, [1.0]), "it writes to a list or a dict"),
    "late notes": (lambda h, m: Noting.apply(h, {}), "it writes to a list or a dict"),
    "written view": (lambda h, m: written_view(h), "returns a view of its operand"),
}


def written_view(h: torch.Tensor) -> torch.Tensor:
    """Return a view that a Function has made, after its operand was written to."""
    with torch.no_grad():
        base = h.detach().clone()
        view = Reversed.apply(base, 1.0)
        base.add_(1)
    return h * view


class Keeping(torch.autograd.Function):
    """Keeps a list or a dict of settings for its backward pass."""

    @staticmethod
    def forward(ctx, x, settings):
        ctx.settings = settings
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.settings[0] * grad, None


class Kept(nn.Module):
    """Gives a Function settings that are its own, or of this call alone."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.up, self.own, self.settings = nn.Linear(4, 6), own, {0: 2.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Keeping.apply(self.up(x), self.settings if self.own else [2.0]).square().mean()


@pytest.mark.parametrize("own", [True, False])
def test_settings_that_change_before_the_backward_pass(own: bool) -> None:
    torch.manual_seed(0)
    model, x = Kept(own).double(), torch.randn(5, 4, dtype=torch.float64)
    split = autoparallel.autoparallelize(copy.deepcopy(model), 1, example_inputs=x)
    plan = planned(copy.deepcopy(model), 2, x)
    for module in (model, split):
        loss = module(x)
        module.settings[0] = 3.0
        loss.backward()
    assert split.up.weight.grad is not None
    torch.testing.assert_close(split.up.weight.grad, model.up.weight.grad, rtol=1e-12, atol=0)
    assert functions_of(plan) == ([] if own else ["Keeping"])


@pytest.mark.parametrize("world_size", [*broad(2), 3])
@pytest.mark.parametrize("kind", share_of(REFUSED, 2))
def test_what_no_op_can_say_stays_python(kind: str, world_size: int) -> None:
    use, why = REFUSED[kind]
    model, x = layers(use)
    plan = planned(model, world_size, x)
    assert why in plan.breaks[0].reason
    assert plan.ops, "the layers around it are split"


class DrawsLate(torch.autograd.Function):
    """Draws random numbers in its backward, where no two ranks would draw the same."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand_like(grad)


def test_a_backward_that_draws_is_refused() -> None:
    model, x = layers(lambda h, m: DrawsLate.apply(h))
    with pytest.raises(UnsupportedOpError, match="DrawsLate draws random numbers"):
        autoparallel.make_plan(model, 2, example_inputs=x)


def train(rank: int) -> None:
    """Some steps of a model with two Functions, beside the plain model."""
    torch.set_num_threads(1)
    plain, x = layers(lambda h, m: Returned.apply(Gated.apply(h, m.gate(h))))
    split = autoparallel.autoparallelize(copy.deepcopy(plain), 2, example_inputs=x)
    losses: list[list[float]] = [[], []]
    for module, record in zip((split, plain), losses, strict=True):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = module(x)
            loss.backward()
            optimizer.step()
            record.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][2] < losses[0][0]


def test_processes_agree_on_the_op() -> None:
    """Ranks compare their plans, in which a Function goes by its content."""
    run_processes(train, 2, start="spawn")


class Deep(nn.Module):
    """A stack of equal blocks, each with a Function, whose factor is the block's own."""

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(factor) for factor in factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a loss."""
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Block(nn.Module):
    """A small layer with a Function amid."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's result."""
        return x + self.down(Reversed.apply(functional.gelu(self.up(x)), self.factor))


@pytest.mark.parametrize(("factors", "count"), [([0.5] * 4, 1), ([0.5, 0.25, 0.5, 0.25], 2)])
def test_one_op_for_equal_blocks(factors: list[float], count: int) -> None:
    torch.manual_seed(0)
    model, x = Deep(factors).double(), torch.randn(5, 12, dtype=torch.float64)
    plan = planned(model, 2, x)
    targets = [op.target for op in plan.ops if function_op(op.target)]
    assert (len(targets), len(set(targets))) == (4, count)


def test_elements_are_split_and_a_norm_is_whole() -> None:
    plans = []
    for kind in ("straight through", "norm of the gradient"):
        model, x = layers(CARRIED[kind])
        plans.append(autoparallel.make_plan(model, 2, example_inputs=x))
    split, whole = plans
    (one,) = (op for op in split.ops if "Rounded" in op.target)
    (two,) = (op for op in whole.ops if "Normalized" in op.target)
    assert one.name == "rounded"
    assert "S" in str(one.results)
    assert "S" not in str(two.results)


def test_the_same_function_has_the_same_name() -> None:
    """Classes that are made anew at each call are one op where they are of the same content."""
    names = [
        [op.target for op in autoparallel.make_plan(model, 2, example_inputs=x).ops]
        for model, x in (layers(CARRIED["integers"]), layers(CARRIED["integers"]))
    ]
    assert names[0] == names[1]


@tried_under_autocast
def test_under_autocast() -> None:
    """A Function's own products run in the lower precision, as in the model."""

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            rows, grads = x.flatten(0, 1).to(grad.dtype), grad.flatten(0, 1)
            return 2 * grad @ weight.T.to(grad.dtype), rows.T @ grads

    def use(h: torch.Tensor, m: Layers) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return Product.apply(h, m.square).float()

    model, x = layers(use)
    model, x = model.float(), x.float()
    loss = model(x)
    loss.backward()
    plan = autoparallel.make_plan(model, 2, example_inputs=x)
    made = autoparallel.simulate(model, example_inputs=x, plan=plan)
    assert functions_of(plan) == ["Product"]
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-3, atol=0)
    for path, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (made.gradients[path] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 2e-2, path


class Times(torch.autograd.Function):
    """Multiplies by what a function makes of 2, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor(2.0)

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.factor(2.0), None


class Holder:
    def __init__(self, number: float) -> None:
        self.number = number


def by_keyword(number: float) -> Any:
    def factor(x, *, times=number):
        return x * times

    return factor


def by_object(number: float) -> Any:
    def factor(x, of=Holder(number)):  # noqa: B008
        return x * of.number

    return factor


@pytest.mark.parametrize(
    "make",
    [by_keyword, by_object, lambda number: {2.0: number}.get],
    ids=["a keyword's default", "an object", "a table"],
)
def test_functions_of_one_code_that_refer_to_others_are_others(make: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.factors = nn.Linear(4, 4), (make(3.0), make(5.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, two = (Times.apply(self.layer(x), factor) for factor in self.factors)
            return (one * one.sin() + two.square()).sum()

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(6, 4, dtype=torch.float64)
    loss = model(x)
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    made = autoparallel.simulate(model, world_size=2, example_inputs=(x,))
    torch.testing.assert_close(made.output, loss)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(made.gradients[name], gradient)
