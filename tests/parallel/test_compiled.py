"""torch.compile of a split module: one graph for each program, and whatever changes is noticed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import autoparallel
from autoparallel.errors import CaptureError, WrappedModelError

pytestmark = pytest.mark.usefixtures("one_trace", "fresh_compiler")

INDUCTOR = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++"),
]
ROWS = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


class Scaled(nn.Module):
    """A Scaled reads an attribute, writes to a buffer, and drops when it trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.factor, self.dropout = 2.0, nn.Dropout(0.25)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.second(self.dropout(torch.relu(self.first(x)))) * self.factor


class Blocks(nn.Module):
    """A Blocks has two equal blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.25)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Branching(nn.Module):
    """A Branching has a forward that no trace holds, and parts that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y if float(y.sum()) > 1e9 else y * 2


@cache
def plan_for(kind: type[nn.Module]) -> Any:
    return autoparallel.make_plan(kind().double(), 1, example_inputs=ROWS)


def split(kind: type[nn.Module]) -> Any:
    return autoparallel.apply_plan(kind().double(), plan_for(kind))


def deferred(kind: type[nn.Module]) -> Any:
    """The same, planned in the first call."""
    return autoparallel.autoparallelize(kind().double(), 1)


def whole_graph(module: Any, backend: str = "eager") -> Any:
    return torch.compile(module, backend=backend, fullgraph=True)


def in_place(module: Any, backend: str = "eager") -> Any:
    module.compile(backend=backend, fullgraph=True)
    return module


def step(call: Any, module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The result of a call, and all gradients of one number of it."""
    module.zero_grad()
    result = call(x)
    (result * torch.arange(1.0, 7.0, dtype=torch.float64)).sum().backward()
    return [result.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def same(call: Any, module: Any, other: Any, x: torch.Tensor) -> bool:
    """Whether a compiled module does in a step what another one does that is not compiled."""
    one, two = step(call, module, x), step(other, other, x)
    return len(one) == len(two) and all(map(torch.equal, one, two))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("make", "compiled", "backend"),
    [
        (deferred, whole_graph, "eager"),
        (deferred, in_place, "eager"),
        (split, in_place, "eager"),
        (split, whole_graph, "aot_eager"),
        pytest.param(split, whole_graph, "inductor", marks=INDUCTOR),
    ],
)
def test_a_module_is_one_graph_from_the_first_call(
    make: Callable[[type[nn.Module]], Any], compiled: Callable[..., Any], backend: str
) -> None:
    """Gradients, buffers and random numbers are those of the module that is not compiled."""
    module, other = make(Scaled), make(Scaled)
    call = compiled(module, backend)
    for n in range(3):
        pairs = zip(step(call, module, ROWS + n), step(other, other, ROWS + n), strict=True)
        # Inductor computes in another order.
        assert all(torch.allclose(*pair, rtol=1e-12, atol=1e-14) for pair in pairs)
    assert graphs() == 1
    assert not counters["graph_break"]
    assert module.calls == other.calls == 3
    assert autoparallel.rng_state(module) == autoparallel.rng_state(other)


def test_other_sizes_compile_once_more() -> None:
    """The first size is taken for constant, the second one makes a graph for all."""
    module, other = split(Scaled), split(Scaled)
    call = whole_graph(module)
    for rows in (4, 7, 5, 9, 3, 17):
        assert same(call, module, other, torch.randn(rows, 6, dtype=torch.float64))
    assert graphs() == 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "mode": lambda module: module.eval(),
    "mode of a part": lambda module: module.dropout.eval(),
    "attribute": lambda module: setattr(module, "factor", 3.0),
    "frozen": lambda module: module.first.weight.requires_grad_(False),
    "written": lambda module: module.first.weight.data.mul_(2),
    "other parameter": lambda module: setattr(
        module.second, "bias", nn.Parameter(torch.ones(6, dtype=torch.float64))
    ),
    "other module": lambda module: setattr(module, "dropout", nn.Identity()),
    "buffer": lambda module: module.calls.fill_(9),
    "loaded": lambda module: module.load_state_dict(
        {name: value * 2 for name, value in module.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_changes_after_the_first_call_is_noticed(change: Callable[[Any], Any]) -> None:
    module, other = split(Scaled), split(Scaled)
    call = in_place(module)
    assert same(call, module, other, ROWS)
    change(module)
    change(other)
    assert same(call, module, other, ROWS)
    assert module.calls == other.calls
    assert graphs() in (1, 2)
    assert not counters["graph_break"]


def test_frozen_parameters_that_train_again_get_gradients() -> None:
    module = split(Scaled)
    call = whole_graph(module)
    module.first.weight.requires_grad_(False)
    assert len(step(call, module, ROWS)) == 4
    module.first.weight.requires_grad_(True)
    assert len(step(call, module, ROWS)) == 5


def test_gradients_are_off_where_they_are_off_around_the_call() -> None:
    module, other = split(Scaled), split(Scaled)
    call = whole_graph(module)
    for _ in range(2):
        with torch.no_grad():
            result = call(ROWS)
            assert torch.equal(result, other(ROWS))
            assert not result.requires_grad
        assert same(call, module, other, ROWS)


def test_blocks_are_recomputed_in_the_backward_pass() -> None:
    """The plan's own blocks are regions that the compiler recomputes."""
    plan = autoparallel.make_plan(Blocks().double(), 1, example_inputs=ROWS, recompute="full")
    module, other = (autoparallel.apply_plan(Blocks().double(), plan) for _ in range(2))
    assert "recomputed(" in module.emitted_program
    assert same(whole_graph(module, "aot_eager"), module, other, ROWS)
    assert graphs() == 1


def test_a_copy_of_a_compiled_module_is_not_compiled() -> None:
    module = in_place(split(Scaled))
    module(ROWS)
    twin = copy.deepcopy(module)
    assert same(module, module, twin, ROWS)
    assert graphs() == 1
    assert twin._compiled_call_impl is None


def test_parts_of_a_model_that_stays_python_are_compiled() -> None:
    module, other = split(Branching), split(Branching)
    call = torch.compile(module, backend="eager")
    assert same(call, module, other, ROWS)
    assert graphs() == 1


def test_a_model_that_stays_python_is_no_full_graph() -> None:
    call = whole_graph(split(Branching))
    with pytest.raises(CaptureError, match="runs as the user's Python"):
        call(ROWS)


def test_hooks_inside_are_told_under_fullgraph() -> None:
    """They run as Python, which a graph leaves out."""
    module = split(Scaled)
    call = whole_graph(module)
    call(ROWS)
    module.first.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match="hooks were registered"):
        call(ROWS)


def test_hooks_around_the_call_run() -> None:
    module, other = split(Scaled), split(Scaled)
    for each in (module, other):
        each.register_forward_hook(lambda _, args, result: result * 3)
    assert same(whole_graph(module), module, other, ROWS)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_function_that_calls_a_split_module_may_be_compiled() -> None:
    """The program is a graph of its own in it."""
    module, other = split(Scaled), split(Scaled)
    call = torch.compile(lambda x: module(x * 2) + 1, backend="eager")
    assert torch.equal(call(ROWS), other(ROWS * 2) + 1)
    whole = torch.compile(lambda x: module(x) + 1, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile the module itself"):
        whole(ROWS)


def test_a_module_inside_may_be_compiled_by_itself() -> None:
    module, other = split(Scaled), split(Scaled)
    call = whole_graph(module.first)
    assert torch.equal(call(ROWS), other.first(ROWS))
    assert graphs() == 1


def test_a_module_inside_whose_calls_are_replaced_is_not_compiled_in_vain() -> None:
    module = split(Scaled)
    with pytest.raises(WrappedModelError, match=r"where: first"):
        module.first.compile(backend="eager")


def test_modules_inside_of_a_model_that_stays_python_are_compiled_in_place() -> None:
    module, other = split(Branching), split(Branching)
    module.inner.compile(backend="eager", fullgraph=True)
    assert same(module, module, other, ROWS)
    assert graphs() == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_programs_of_torch_fx_draw_anew_when_they_are_compiled() -> None:
    """They have no call around them that computes what their random numbers follow from."""
    module, other = split(Scaled), split(Scaled)
    call = torch.compile(autoparallel.to_fx(module), backend="eager")
    for _ in range(2):
        assert torch.equal(call(ROWS)[0], other(ROWS))
    assert torch.equal(whole_graph(module)(ROWS), other(ROWS))
