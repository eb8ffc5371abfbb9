"""The census sees each way in which a trace may lose what a model computes: planted one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoparallel.capture.census import census_of, require_agreement
from autoparallel.capture.graph_breaks import trace
from autoparallel.capture.intercepted_calls import apply_function
from autoparallel.capture.side_effects import NoReplacing
from autoparallel.capture.traced_calls import TracedCalls
from autoparallel.errors import CaptureError
from autoparallel.rules.lookup import find_rule


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is doubled."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * grads[0]


class Layers(nn.Module):
    """Two layers, between which something is done, and one that is not used."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use = use
        self.entry, self.out, self.unused = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return self.out(self.use(self.entry(x))).square().mean()


def hooked(h: torch.Tensor) -> torch.Tensor:
    """Register a hook on a tensor."""
    h.register_hook(lambda grad: 2 * grad)
    return h


X = torch.ones(3, 4)


def graph_of(model: nn.Module) -> Any:
    """Return the graph of the model as it is planned."""
    return trace(model, (X,), {}, known=find_rule)


def without_gradient(_: Any, call: Any, __: Any) -> Any:
    """Run a region as torch runs that of a reentrant checkpoint, where the tracer looks."""
    with torch.no_grad():
        return call()


PLANTED = {
    "a Function": (
        lambda h: Doubled.apply(h),
        (
            TracedCalls,
            "function",
            lambda _, cls, args, kwargs: apply_function(cls, *args, **kwargs),
        ),
        "Doubled",
        "the model alone applies this Function",
    ),
    "a checkpoint": (
        lambda h: checkpoint(torch.tanh, h, use_reentrant=True),
        (TracedCalls, "reentrant", without_gradient),
        "entry.bias, entry.weight",
        "a gradient reaches this in the model alone",
    ),
    "a hook": (
        hooked,
        (NoReplacing, "hooked", lambda *_: None),
        "register_hook",
        "the model hooks into its backward pass by this",
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_the_tracer_drops_is_missed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use, planted, name, why = PLANTED[kind]
    monkeypatch.setattr(*planted)
    with pytest.raises(CaptureError) as caught:
        graph_of(Layers(use))
    assert caught.value.what.endswith(f"is not what the model computes: {name}")
    assert why in caught.value.why


def test_a_gradient_that_the_model_stops() -> None:
    captured = graph_of(Layers(torch.tanh))
    stopping = Layers(lambda h: torch.tanh(h).detach())
    with pytest.raises(CaptureError, match=r"entry\.bias, entry\.weight"):
        require_agreement(captured, stopping, (X,), {})


def test_a_parameter_that_became_a_constant() -> None:
    model = Layers(torch.tanh)
    captured = graph_of(model)
    frozen = replace(captured, constants={"lifted": model.entry.weight.detach()[1:]})
    with pytest.raises(CaptureError, match=r"holds entry\.weight as the constant lifted"):
        require_agreement(frozen, model, (X,), {})


def test_what_a_census_says() -> None:
    """Parameters, inputs and Functions; the model is left as it was."""
    model = Layers(lambda h: Doubled.apply(h))
    model.entry.bias.requires_grad_(False)
    census = census_of(model, (X.clone().requires_grad_(),), {})
    assert census.reached == {"input 0", "entry.weight", "out.weight", "out.bias"}
    assert census.surely == {"out.weight", "out.bias"}
    assert census.functions == {"Doubled"}
    assert not census.hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "of",
    [
        lambda w: torch.ops.aten.native_batch_norm(w, None, None, None, None, True, 0.1, 1e-5)[1],
        lambda w: torch.nn.functional.layer_norm(w, [4]).detach() + torch.histc(w, 4, 0, 1),
        lambda w: torch.ops.aten.native_layer_norm(w, [4], None, None, 1e-5)[2],
    ],
    ids=["statistics of a batch", "a histogram", "statistics of rows"],
)
def test_results_without_a_gradient_are_no_difference(of: Any) -> None:
    """Torch gives these none, though their operand is trained; no gradient reaches it."""

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.told = nn.Linear(4, 4), nn.Parameter(torch.rand(4, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.used(x).sum(), of(self.told)

    captured = graph_of(Told())
    assert [captured.graph.values[name].requires_grad for name in captured.graph.outputs] == [
        True,
        False,
    ]


def test_what_whole_numbers_give_says_nothing_of_others() -> None:
    """An op of whole numbers has no gradient; called again with a trained value, it has one."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.lgamma(x.long()).sum() + self.weight.sum(), torch.lgamma(self.weight)

    calls = graph_of(Both()).graph.calls
    named = [node for node in calls if node.target == "aten.lgamma.default"]
    assert [node.result.requires_grad for node in named] == [False, True]
