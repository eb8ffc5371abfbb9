"""A family's split model against the user's own: loss, every output, gradient and buffer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import more_families
import torch
from families import Float64, relative_error, worst_gradient
from more_families import tensors_in

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.parallel import simulate
from autoparallel.plan import Plan
from autoparallel.planning.search import search
from autoparallel.runtime.ranks import run_ranks

__all__ = ["Errors", "Step", "errors_of", "plan_for", "simulated", "unsplit"]


@dataclass(frozen=True)
class Step:
    """A Step is what one step of training leaves.

    outputs: all tensors that the model returns. gradients, buffers: by path.
    """

    loss: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Errors:
    """The largest relative errors of a step, and the paths of gradient and buffer that have them.

    apart: see Simulation.
    """

    loss: float
    outputs: float
    gradients: float
    buffers: float
    where: str
    apart: float = 0.0

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(self.loss, self.outputs, self.gradients, self.buffers)


def loss_of(output: Any) -> torch.Tensor:
    loss: torch.Tensor = output["loss"] if isinstance(output, dict) else output.loss
    return loss


@cache
def traced(name: str, dropout: float = 0.0) -> Plan:
    """The plan for one rank; its graph is that of all ranks."""
    with Float64():
        model = more_families.build(name, dropout)
        return autoparallel.make_plan(model, 1, example_inputs=more_families.inputs_for(name))


def plan_for(name: str, ranks: int | Mesh, dropout: float = 0.0) -> Plan:
    """The plan for that many ranks, or for a mesh of several axes."""
    plan = traced(name, dropout)
    if ranks == 1:
        return plan
    mesh = Mesh(tp=ranks) if isinstance(ranks, int) else ranks
    if plan.captured is not None:
        return search(plan.captured, plan.model, mesh, Options())
    with Float64():
        model = more_families.build(name, dropout)
        return autoparallel.make_plan(
            model, mesh=mesh, example_inputs=more_families.inputs_for(name)
        )


def simulated(name: str, plan: Plan, dropout: float = 0.0) -> tuple[Step, float]:
    """The step on all ranks of the plan, put together; and how far the ranks are apart."""
    with Float64(), mock.patch.object(simulate, "run_ranks", _in_float64):
        model, inputs = more_families.build(name, dropout), more_families.inputs_for(name)
        made = autoparallel.simulate(model, example_inputs=inputs, plan=plan)
    outputs = tuple(tensors_in(made.output))
    loss = loss_of(made.output).detach()
    return Step(loss, outputs, dict(made.gradients), dict(made.buffers)), made.apart


def _in_float64(ranks: Any, work: Any) -> Any:
    """Run all ranks under Float64, which does not reach their threads by itself."""

    def inside(rank: Any) -> Any:
        with Float64():
            return work(rank)

    return run_ranks(ranks, inside)


def unsplit(name: str) -> Step:
    """The step of the user's own module, or of ours on one rank where it draws random numbers."""
    if more_families.FAMILIES[name].random:
        return simulated(name, traced(name))[0]
    with Float64():
        model = more_families.build_reference(name)
        output = model(**more_families.inputs_for(name))
        loss_of(output).backward()
    named = model.named_parameters(remove_duplicate=False)
    gradients = {path: p.grad for path, p in named if p.grad is not None}
    outputs = tuple(tensor.detach() for tensor in tensors_in(output))
    return Step(loss_of(output).detach(), outputs, gradients, dict(model.named_buffers()))


def errors_of(actual: Step, expected: Step) -> Errors:
    """Return how far the one is from the other; infinity where something is missing on one side.

    An expert that no token has chosen has a gradient of zeros, and none in plain torch.
    """
    present = {
        path: gradient
        for path, gradient in actual.gradients.items()
        if path in expected.gradients or gradient.any()
    }
    gradients, where = worst_gradient(present, expected.gradients)
    outputs = float("inf")
    if len(actual.outputs) == len(expected.outputs):
        pairs = zip(actual.outputs, expected.outputs, strict=True)
        outputs = max([_away(a, b) for a, b in pairs], default=0.0)
    # A program has the buffers that it reads; the others it leaves as they are.
    buffers = max(
        [_away(tensor, expected.buffers[path]) for path, tensor in actual.buffers.items()],
        default=0.0,
    )
    loss = relative_error(actual.loss, expected.loss, 1e-2)
    return Errors(loss, outputs, gradients, buffers, where)


def _away(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error; infinity for other shapes or other infinities, NaN equals NaN."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not actual.is_floating_point() and not actual.is_complex():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    zero = torch.zeros((), dtype=actual.dtype)
    # Infinities that are the same would be NaN as a difference.
    return relative_error(
        torch.where(same, zero, actual),
        torch.where(same, zero, expected),
        float(torch.where(expected.isfinite(), expected, zero).norm()),
    )
