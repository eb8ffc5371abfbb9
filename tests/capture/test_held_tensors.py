"""Weights that a forward reaches past its modules: read in their place, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import relative_error, worst_gradient
from torch import nn

import autoparallel
from autoparallel.capture import block_folding as folding
from autoparallel.capture import equal_blocks as blocks
from autoparallel.capture import held_tensors as held
from autoparallel.capture.export import capture
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.capture.importer import Importer
from autoparallel.errors import AliasError, CaptureError

WIDTH = 6
Run = Callable[[Any, torch.Tensor], torch.Tensor]


class Inner(nn.Module):
    """A part of a model. run(module, x): its forward."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))
        self.one = nn.Parameter(torch.full((1,), 0.7))
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.run(self, x)


class Model(nn.Module):
    """breaks: whether Python must run it, so that it is planned in parts."""

    def __init__(self, run: Run, keep: Callable[[Any], Any], breaks: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.inner = Inner(run)
        self.breaks = breaks
        keep(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.breaks and float(x.detach().sum()) > 1e9:
            return x.sum()
        return self.inner(x).square().mean()


def make(run: Run, keep: Callable[[Any], Any], breaks: bool = False) -> Model:
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return Model(run, keep, breaks)
    finally:
        torch.set_default_dtype(before)


def sample() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)


def keeping(**chosen: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let the inner module keep what is chosen of the model."""

    def keep(model: Any) -> None:
        for name, choose in chosen.items():
            setattr(model.inner, name, choose(model))

    return keep


def own_list(model: Any) -> list[torch.Tensor]:
    return [model.inner.linear.weight, model.inner.scale, model.inner.one]


def from_list(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight, scale, one = module.kept
    return module.linear(x) @ weight * scale * one + torch.cat([weight, weight])[0].sum()


def from_object(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight, scale, one = module.kept.deep
    return module.linear(x) @ weight * scale * one


def stopped(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.linear(x) @ module.kept[0].detach()


READ = {
    "a list": (from_list, keeping(kept=own_list)),
    "an object": (from_object, keeping(kept=lambda m: SimpleNamespace(deep=own_list(m)))),
    "stopped inside": (stopped, keeping(kept=own_list)),
}


def compare(model: Model) -> None:
    """On two simulated ranks, after the weights have changed since planning."""
    plan = autoparallel.make_plan(model, 2, example_inputs=(sample(),))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(1.5)
    made = autoparallel.simulate(model, 2, example_inputs=(sample(),), plan=plan)
    loss = model(sample())
    loss.backward()
    expected = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert relative_error(made.output.detach(), loss.detach()) < 1e-12
    error, where = worst_gradient(dict(made.gradients), expected)
    assert error < 1e-12, where


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("name", READ)
def test_what_is_kept_is_read_in_its_place(name: str, breaks: bool) -> None:
    compare(make(*READ[name], breaks))


VIEWS = {
    "detached": lambda model: model.inner.linear.weight.detach(),
    "data": lambda model: model.inner.linear.weight.data,
    "cut": lambda model: model.inner.linear.weight[:, :],
    "transposed": lambda model: model.inner.linear.weight.T.T,
    "of a buffer": lambda model: model.inner.scale[:],
}


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_refused_by_name(name: str, breaks: bool) -> None:
    """Planned whole and in parts: a view from before the forward would stay as it is."""
    model = make(
        lambda m, x: m.linear(x) * m.kept[0].sum(), keeping(kept=lambda m: [VIEWS[name](m)])
    )
    model.breaks = breaks
    path = "scale" if name == "of a buffer" else "linear.weight"
    with pytest.raises(AliasError, match=f"shares the memory of inner.{path}") as caught:
        autoparallel.make_plan(model, 2, example_inputs=(sample(),))
    assert f"make it from inner.{path} inside of the forward" in str(caught.value)


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_refused_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = Model(
            lambda m, x: m.linear(x) * m.kept[0].sum(), keeping(kept=lambda m: [VIEWS[name](m)])
        )
    with pytest.raises(AliasError, match="shares the memory of inner"):
        autoparallel.make_plan(model, 2, example_inputs=(sample().float(),))


def test_a_look_at_the_shape_of_a_view_is_none_at_its_values() -> None:
    keep = keeping(kept=lambda m: [m.inner.linear.weight[:4]])
    compare(make(lambda m, x: m.linear(x) * m.kept[0].shape[0], keep))


def test_numbers_are_not_taken_from_weights() -> None:
    """A number that Python reads from a kept parameter would be the one of the trace for ever."""
    model = make(lambda m, x: m.linear(x) * float(m.kept[2]), keeping(kept=own_list))
    with pytest.raises(CaptureError, match="branches on the values"):
        capture(model, (sample(),), {})
    compare(make(lambda m, x: m.linear(x) * float(m.kept[2].detach()), keeping(kept=own_list)))


def test_what_objects_keep_is_refused_where_python_reads_it() -> None:
    keep = keeping(kept=lambda m: SimpleNamespace(weight=m.inner.linear.weight))
    model = make(lambda m, x: m.linear(x) * float(m.kept.weight.detach().sum()), keep)
    with pytest.raises(AliasError, match=r"inner\.kept refers to keeps inner\.linear\.weight"):
        autoparallel.make_plan(model, 2, example_inputs=(sample(),))


def test_weights_of_others_are_left_to_python() -> None:
    """A part cannot read what belongs to another module: it stays Python, which can."""
    keep = keeping(kept=lambda m: [m.stem.weight])
    compare(make(lambda m, x: m.linear(x) @ m.kept[0], keep, breaks=True))


def test_trained_tensors_that_are_no_parameters_are_refused() -> None:
    loose = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    model = make(lambda m, x: m.linear(x) * m.kept[0], keeping(kept=lambda m: [loose]))
    with pytest.raises(CaptureError, match="requires a gradient and is no parameter"):
        capture(model, (sample(),), {})


class Pairs(nn.Module):
    """Blocks that have a forward, and are used part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            first, second = vars(block)["_modules"].values()
            x = x + second(first(x).relu())
        return x.sum()


@pytest.mark.parametrize("guards", ["called", "put in place", "both"])
def test_each_guard_alone_is_enough(guards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced one by one where a hidden one is not called, or its weights are constants.

    Without both guards, the constants themselves are looked at.
    """
    if guards != "called":
        monkeypatch.setattr(folding.Folding, "require_called", lambda self: None)
    if guards != "put in place":
        monkeypatch.setattr(held.HeldTensors, "concerns", lambda self, item: False)
    model = Pairs()
    assert len(blocks.find_groups(model, called=True)) == 1
    captured = capture(model, (sample().float(),), {})
    assert captured.constants == {}
    assert captured.repeats == ()
    read = {name for node in captured.graph.nodes for name in node.operands()}
    weights = [node for node in captured.graph.nodes if node.kind == "parameter"]
    assert len(weights) == 16
    assert all(node.name in read for node in weights)


def test_a_weight_that_the_tracer_does_not_see_is_refused() -> None:
    model = Pairs()
    fold = folding.Folding((), frozenset())
    seen = held.HeldTensors(model, fold)
    importer = Importer(
        None, GraphBuilder(), model=model, folding=fold, held=seen, trained_inputs=()
    )
    weight = model.blocks[0].get_parameter("0.weight")
    with pytest.raises(CaptureError, match=r"does not see parameter blocks\.0\.0\.weight"):
        importer.require_all([("parameter", "blocks.0.0.weight", weight)])
