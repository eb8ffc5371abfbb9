"""A model in parts on real processes, and in other modes than it was planned for."""

from __future__ import annotations

import copy
import random
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from broad_cases import broad
from broken_models import Block, Branches, build, inputs
from families import relative_error, worst_gradient
from processes import run_processes
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from traces import trace_ahead

import autoparallel
from autoparallel.parallel.common_numbers import common_numbers
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.parameters import whole_tensor
from autoparallel.planning.replan import Replanner
from autoparallel.runtime.groups import thread_groups
from autoparallel.runtime.ranks import run_ranks, thread_ranks
from autoparallel.runtime.rng import Generator


def whole_gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient of a parallel module, put together. A collective call."""
    state = state_of(module)
    named = module.named_parameters(remove_duplicate=False)
    return {
        path: whole_tensor(own.grad, state.layouts[path], state.ranks)
        for path, own in named
        if own.grad is not None
    }


NAMES = ("Drops", "Counts")
OTHERS = ("Branches", "Reads", "Packed")


def begun(names: tuple[str, ...]) -> None:
    """Trace what each rank would, in training and in evaluation."""
    for name in names:
        one = autoparallel.autoparallelize(build(name), 1, example_inputs=inputs())
        with torch.no_grad():
            one.eval()(**inputs())


def train(rank: int, names: tuple[str, ...]) -> list[float]:
    """Some steps of each model beside the plain one; then saving, loading and evaluating."""
    torch.set_num_threads(1)
    losses = []
    for name in names:
        model, batch = build(name), inputs()
        torch.manual_seed(0)
        parallel = autoparallel.autoparallelize(model, 2, example_inputs=batch)
        assert [path for path, _ in parallel.named_parameters()] == [
            path for path, _ in model.named_parameters()
        ]
        assert all(isinstance(own, DTensor) for own in parallel.parameters())
        assert parallel.embed.weight is parallel.head.weight
        generator = Generator(seed=autoparallel.rng_state(parallel)["seed"])
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, parallel)]
        for step in range(3):
            batch = {key: value.roll(step, 0) for key, value in inputs().items()}
            for seed in (torch.manual_seed, random.seed, numpy.random.seed):
                seed(rank)
            own = parallel(**batch)["loss"]
            own.backward()
            with common_numbers(generator, thread_groups(2)[0]):
                loss = model(**batch)["loss"]
            loss.backward()
            assert relative_error(own.detach(), loss.detach()) < 1e-10, (name, step)
            named = model.named_parameters(remove_duplicate=False)
            gradients = {path: p.grad for path, p in named if p.grad is not None}
            assert worst_gradient(whole_gradients(parallel), gradients)[0] < 1e-9, (name, step)
            norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (model, parallel)]
            assert relative_error(norms[1].full_tensor(), norms[0]) < 1e-10
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(own))
        state = autoparallel.full_state_dict(parallel)
        for path, value in model.state_dict().items():
            assert relative_error(state[path].double(), value.double()) < 1e-9, (name, path)
        parallel.eval()
        model.eval()
        with torch.no_grad():
            own, expected = parallel(**batch)["logits"], model(**batch)["logits"]
        own = own.full_tensor() if isinstance(own, DTensor) else own
        assert relative_error(own, expected) < 1e-10, name
        other = build(name)
        other.load_state_dict(state)
        parallel.load_state_dict(build(name).state_dict())
        parallel.load_state_dict(other.state_dict())
        after = autoparallel.full_state_dict(parallel)
        assert all(torch.equal(after[path], value) for path, value in state.items())
    refuse_other_paths(rank)
    return losses


class OneOfTwo(nn.Module):
    """Which block is called, and so can be planned, depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) if float(x.detach().sum()) > 0 else self.second(x)


def refuse_other_paths(rank: int) -> None:
    torch.manual_seed(0)
    x = torch.ones(4, 12) * (1 if rank else -1)
    with pytest.raises(autoparallel.AutoParallelError, match="different parts"):
        autoparallel.autoparallelize(OneOfTwo(), 2, example_inputs=x)


class Mixes(nn.Module):
    """A depth that Python decides on, and numpy's mix of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = float(numpy.random.beta(1.0, 1.0))
        x = part * x + (1 - part) * x.flip(0)
        for layer in self.layers:
            if random.random() < 0.7:
                x = torch.tanh(layer(x))
        return x.square().sum()


def mixed(model: nn.Module, seed: int) -> list[float]:
    random.seed(seed)
    numpy.random.seed(seed)
    losses = [float(model(torch.ones(4, 12).double().cumsum(0))) for _ in range(4)]
    return [*losses, random.random(), float(numpy.random.rand())]


def draw_outside_of_torch(rank: int) -> tuple[list[float], list[float]]:
    """Losses after seeds that are the same on all ranks, and after others on each."""
    torch.manual_seed(0)
    model = Mixes().double()
    split = autoparallel.autoparallelize(model, 2)
    return [a - b for a, b in zip(mixed(split, 5), mixed(model, 5), strict=True)], mixed(
        split, rank
    )


def test_numbers_of_python_and_numpy_are_the_users_where_ranks_agree() -> None:
    first, second = run_processes(draw_outside_of_torch, 2)
    for same, _ in (first, second):
        assert same == pytest.approx([0.0] * 6, abs=1e-12)
    # Else they are common to the ranks all the same, and each rank's own go on by themselves.
    assert first[1][:4] == second[1][:4]
    assert len(set(first[1][:4])) == 4
    assert first[1][4:] != second[1][4:]


@pytest.mark.parametrize("names", [NAMES, *broad((OTHERS,))], ids=["some", "others"])
def test_two_processes(names: tuple[str, ...]) -> None:
    """Training, clipping, state dicts and evaluation; both ranks go the same way."""
    first, second = run_processes(train, 2, names, before=partial(trace_ahead, begun, names))
    assert first == second


class Recomputes(nn.Module):
    """Dropout in a split block and in Python, recomputed in the backward pass or not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(Block(), nn.Dropout(0.5))
        self.python = PythonBlock()
        self.again = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            for part in (self.block, self.python):
                x = checkpoint(part, x, use_reentrant=False) if self.again else part(x)
        return x.square().sum() if float(x.detach().sum()) != 0.123 else x.sum()


class PythonBlock(Branches):
    """Branches, and drops elements."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_recomputed_parts_draw_what_they_drew() -> None:
    torch.manual_seed(3)
    model, x = Recomputes().double(), torch.randn(4, 12).double()
    results = []
    for again in (False, True):
        parallel = autoparallel.autoparallelize(model, 1, example_inputs=x)
        assert {item.path for item in parallel.plan.breaks} == {"", "python"}
        autoparallel.manual_seed(parallel, 1)
        parallel.again = again
        loss = parallel(x)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in parallel.named_parameters()}))
    (loss, gradients), (other, others) = results
    assert relative_error(other, loss) < 1e-12
    assert worst_gradient(others, gradients)[0] < 1e-10


def test_plans_are_applied_from_json_and_made_at_the_first_call() -> None:
    model, batch = build("Branches"), inputs()
    expected = model(**batch)["loss"].detach()
    plan = autoparallel.make_plan(model, 1, example_inputs=batch)
    read = autoparallel.Plan.from_json(plan.to_json())
    applied = autoparallel.apply_plan(model, read, example_inputs=batch)
    assert relative_error(applied(**batch)["loss"].detach(), expected) < 1e-12
    with pytest.raises(autoparallel.AutoParallelError, match="made for another"):
        autoparallel.apply_plan(build("Keeping"), read, example_inputs=batch)
    waiting = autoparallel.autoparallelize(model, 1)
    optimizer = torch.optim.SGD(waiting.parameters(), lr=0.1)
    loss = waiting(**batch)["loss"]
    assert relative_error(loss.detach(), expected) < 1e-12
    loss.backward()
    optimizer.step()
    assert relative_error(waiting(**batch)["loss"].detach(), expected) > 1e-3
    assert torch.equal(model(**batch)["loss"], expected)


class OnlyInEvaluation(nn.Module):
    """Traced whole in training; in evaluation it looks at values, and so does a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = Block(), Careful(), 1.0

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if not self.training and float(x.detach().sum()) == 0.123:
            return x
        return self.second(self.first(x) * scale).sum()


class Careful(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if self.training or x.sum() > 0 else -x)


def test_breaks_that_are_met_later() -> None:
    """In another mode: what is stored split is gathered where Python reads it."""
    torch.manual_seed(3)
    model, x = OnlyInEvaluation().double(), torch.randn(4, 12).double()
    plan = autoparallel.make_plan(model, 2, example_inputs=x)
    assert not plan.breaks

    def passes(module: Any) -> Any:
        outputs = []
        for training in (True, False, True, False):
            module.train(training)
            outputs.append(module(x))
        return outputs

    results = on_ranks(model, plan, passes)
    for own, expected in zip(results, passes(copy.deepcopy(model)), strict=True):
        assert relative_error(own.detach(), expected.detach()) < 1e-12


def test_constants_that_never_repeat_end_in_python() -> None:
    """A number that Python computes anew for each call would be a new program each time."""
    torch.manual_seed(3)
    model, x = OnlyInEvaluation().double(), torch.randn(4, 12).double()
    parallel = autoparallel.autoparallelize(model, 1, example_inputs=x)
    for index in range(20):
        own, expected = parallel(x, scale=index / 7), model(x, scale=index / 7)
        assert relative_error(own.detach(), expected.detach()) < 1e-12
    assert sum(map(len, state_of(parallel).entries.values())) == 16
    assert len(state_of(parallel.first).entries) == 1


def on_ranks(model: nn.Module, plan: autoparallel.Plan, work: Any) -> Any:
    """What `work` returns on rank 0 of a simulated group."""
    every = thread_ranks(plan.mesh, in_turn=True)
    replanner = Replanner(plan.model, plan.mesh, plan.options)
    return run_ranks(
        every, lambda ranks: work(parallel_module(model, plan, ranks, None, replanner, 0))
    )[0]
