"""All ranks of a plan in one process: each a thread, exchanging tensors where they meet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.errors import PlanError
from autoparallel.graph.captured import modes_of
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import Replan, state_of
from autoparallel.parallel.seeds import manual_seed
from autoparallel.placement import Layout, Partial, Shard, whole_layout
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.tensor_parts import join_layout, reduced, take_layout_part
from autoparallel.support.pytree import Skeleton, flatten, rebuild

__all__ = ["Simulation", "simulate_plan"]


@dataclass(frozen=True)
class Simulation:
    """output: what the model returns, put together. gradients: by parameter path, whole.

    collectives: kind -> number on rank 0, forward and backward. input_gradients: of every input
    tensor, in order, None where none came. buffers: by path, as the forward left them.
    apart: where ranks hold the same by the plan, the sum of their differences.
    """

    output: Any
    gradients: Mapping[str, torch.Tensor]
    collectives: Mapping[str, int]
    input_gradients: tuple[torch.Tensor | None, ...]
    buffers: Mapping[str, torch.Tensor]
    apart: float


def _loss_of(output: Any) -> torch.Tensor | None:
    tensors, _ = flatten(output)
    scalars = [t for t in tensors if t.dim() == 0 and t.requires_grad]
    return scalars[0] if scalars else None


def simulate_plan(
    model: nn.Module,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    backward: bool | Callable[[Any], torch.Tensor] = True,
    seed: int = 0,
    replan: Replan | None = None,
) -> Simulation:
    """Run `plan` on all its ranks, forward and, if the model returns a loss, backward.

    model: the whole model with real weights. backward: False, True (the scalar output that has a
    gradient) or a function from the rank's local output to its loss. replan: plans modules of a
    model in parts when they are called otherwise than in the example run.
    Raises PlanError for a plan without its graph; otherwise whatever a rank raised.
    """
    if not plan.is_traced:
        raise PlanError("the plan has no graph", fix="simulate(model, world_size, ...) plans anew")
    if plan.captured is None:
        return _simulate_parts(model, plan, args, kwargs, backward, seed, replan)
    captured = plan.captured
    bound = bind_inputs(model, args, kwargs)
    inputs, skeleton = flatten(dict(bound.arguments))
    if skeleton != captured.inputs:
        raise PlanError(
            "these inputs are not built as those planned for",
            why=f"{skeleton} against {captured.inputs}",
        )
    if captured.modes != modes_of(model):
        raise PlanError(
            "the model, or a module in it, is in another mode (train, eval) than planned for",
            fix="call train() or eval() as before planning, or plan again",
        )
    if not captured.fits(inputs):
        raise PlanError(
            "these inputs have other sizes or types than those planned for, or need gradients",
            why="the program was traced for "
            + ", ".join(str(n.result) for n in captured.graph.nodes if n.kind == "input"),
            fix="plan with inputs like these",
        )
    ranks = thread_ranks(plan.mesh)
    weights = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    device = next((p.device for p in weights.values()), torch.device("cpu"))
    storage = plan.storage
    states = {parameter.path: parameter.state for parameter in plan.parameters}

    def work(own: Ranks) -> _Ran:
        program = emit(captured.graph, plan, own, plan.model)
        leaves = []
        for path in program.parameters:
            whole, layout = weights[path].detach(), storage[path]
            part = take_layout_part(whole, layout, own.sizes, own.coordinates)
            leaves.append(part.clone().requires_grad_(weights[path].requires_grad))
        given = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        held = {path: buffers[path].clone() for path in program.buffers}
        with rng.using(rng.Generator(seed, mode=plan.options.rng)):
            outputs, written = program.run(
                leaves,
                list(held.values()),
                [captured.constants[path] for path in program.constants],
                given,
                device,
            )
        held.update(zip(program.mutations, written, strict=True))
        if backward:
            local, _ = captured.together(outputs)
            loss = _loss_of(local) if backward is True else backward(local)
            if loss is not None:
                loss.backward()
        gradients = {path: leaf.grad for path, leaf in zip(program.parameters, leaves, strict=True)}
        lies = dict(zip(program.parameters, program.gradients, strict=True))
        made = {path: grad for path, grad in gradients.items() if grad is not None}
        done = reduced(
            list(made.values()),
            [lies[path] for path in made],
            [states[path] for path in made],
            own,
        )
        gradients.update(zip(made, done, strict=True))
        return _Ran(outputs, gradients, [tensor.grad for tensor in given], held)

    results = run_ranks(ranks, work)
    made = _together(results, ranks[0], states, plan.outputs, captured.outputs)
    gradients = dict(made.gradients)
    for path, kept in captured.aliases.items():
        if kept in gradients:
            gradients[path] = gradients[kept]
    output = made.output[0] if captured.left else made.output
    return replace(made, output=output, gradients=gradients)


def _together(
    results: list[_Ran],
    ranks: Ranks,
    layouts: Mapping[str, Layout],
    outputs: tuple[Layout, ...],
    structure: Skeleton,
) -> Simulation:
    """What the ranks have in the end, put together. structure: of what the model returns."""
    joined = _Joined(ranks.sizes)
    same = whole_layout(len(ranks.sizes))
    whole = [
        joined.of([ran.outputs[index] for ran in results], layout)
        for index, layout in enumerate(outputs)
    ]
    gradients: dict[str, torch.Tensor] = {}
    for path in results[0].gradients:
        layout = layouts.get(path, same)  # one that the forward has made is whole
        gradient = joined.maybe([ran.gradients[path] for ran in results], layout)
        if gradient is not None:
            gradients[path] = gradient
    return Simulation(
        rebuild(structure, whole),
        gradients,
        ranks.counts,
        tuple(
            joined.maybe([ran.inputs[index] for ran in results], same)
            for index in range(len(results[0].inputs))
        ),
        {
            path: joined.of([ran.buffers[path] for ran in results], same)
            for path in results[0].buffers
        },
        joined.apart,
    )


def _simulate_parts(
    model: nn.Module,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    backward: bool | Callable[[Any], torch.Tensor],
    seed: int,
    replan: Replan | None,
) -> Simulation:
    """The same for a model in parts: each rank is a parallel module in a thread of its own."""

    def refuse(*_: Any) -> Plan:
        raise PlanError("a module is called otherwise than in the example run")

    ranks = thread_ranks(plan.mesh, in_turn=True)
    tensors, skeleton = flatten((args, dict(kwargs)))

    def work(own: Ranks) -> tuple[_Ran, Skeleton, Mapping[str, Layout]]:
        made = parallel_module(model, plan, own, None, replan or refuse, 0)
        manual_seed(made, seed)
        # Copies, as each rank has its own, and Python may write to them.
        given = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        own_args, own_kwargs = rebuild(skeleton, given)
        output = made(*own_args, **own_kwargs)
        if backward:
            loss = _loss_of(output) if backward is True else backward(output)
            if loss is not None:
                loss.backward()
        outputs, returned = flatten(output)
        named = made.named_parameters(remove_duplicate=False)
        gradients = {path: parameter.grad for path, parameter in named}
        inputs = [tensor.grad for tensor in given]
        ran = _Ran(outputs, gradients, inputs, dict(made.named_buffers()))
        return ran, returned, state_of(made).layouts

    results = run_ranks(ranks, work)
    first, returned, layouts = results[0]
    outputs = (whole_layout(len(plan.mesh.axes)),) * len(first.outputs)
    return _together([ran for ran, _, _ in results], ranks[0], layouts, outputs, returned)


@dataclass(frozen=True)
class _Ran:
    """What one rank has in the end. inputs: their gradients."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    inputs: list[torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


class _Joined:
    """Puts the ranks' parts together. apart: how far those differed that should be the same."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes, self.apart = sizes, 0.0

    def maybe(self, parts: list[torch.Tensor | None], layout: Layout) -> torch.Tensor | None:
        """The whole of gradients, None where no rank has one."""
        if all(part is None for part in parts):
            return None
        example = next(part for part in parts if part is not None)
        if not any(isinstance(placement, Shard) for placement in layout):
            parts = [torch.zeros_like(example) if part is None else part for part in parts]
        return self.of([part for part in parts if part is not None], layout)

    def of(self, parts: list[torch.Tensor], layout: Layout) -> torch.Tensor:
        """The whole tensor."""
        parts = [part.detach() for part in parts]
        places = list(itertools.product(*map(range, self.sizes)))
        first: dict[tuple[int, ...], torch.Tensor] = {}
        for place, part in zip(places, parts, strict=True):
            alike = tuple(
                rank if isinstance(placement, (Shard, Partial)) else 0
                for rank, placement in zip(place, layout, strict=True)
            )
            self.compare(first.setdefault(alike, part), part)
        return join_layout(parts, layout, self.sizes)

    def compare(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Note how far two are apart that should be the same."""
        exact = torch.complex128 if one.is_complex() else torch.float64
        away = (other.to(exact) - one.to(exact)).abs().nan_to_num(math.inf)
        same = (other == one) | (other.isnan() & one.isnan())
        self.apart = max(self.apart, float(away.masked_fill(same, 0.0).sum()))
