"""All ranks of a plan in one process: each a thread, exchanging tensors where they meet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Surroundings, modes_of
from autoparallel.parallel.guards import Guards
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import Replan, state_of
from autoparallel.parallel.seeds import manual_seed
from autoparallel.placement import Layout, Partial, Shard, whole_layout
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.rewrite.pipeline_program import program_in_turn
from autoparallel.runtime import rng
from autoparallel.runtime.joint_moves import reduced
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.tensor_parts import join_layout, take_layout_part
from autoparallel.runtime.value_branches import OtherBranchError
from autoparallel.support.pytree import Skeleton, flatten, rebuild

__all__ = ["Simulation", "simulate_plan"]


@dataclass(frozen=True)
class Simulation:
    """The result of one simulated step on all ranks.

    output: what the model returns, put together. gradients: the parameters' gradients by path,
    unsharded. collectives: the number of collectives on rank 0 by kind, forward and backward.
    input_gradients: those of every input tensor, in order, None where none came. buffers: by path,
    as the forward left them. apart: the largest sum of differences between two ranks in a tensor
    that they should hold alike by the plan; 0.0 if the ranks agree bit for bit.
    """

    output: Any
    gradients: Mapping[str, torch.Tensor]
    collectives: Mapping[str, int]
    input_gradients: tuple[torch.Tensor | None, ...]
    buffers: Mapping[str, torch.Tensor]
    apart: float


def _loss_of(output: Any) -> torch.Tensor | None:
    """Return the first scalar in what a model returns that has a gradient, None without one."""
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

    model: the whole model with real weights, which stays as it is. args, kwargs: those of its call.
    backward: False, True (the scalar output that has a gradient) or a function from the rank's
    local output to its loss. seed: of the random numbers. replan: a function that plans modules of
    a model in parts when they are called otherwise than in the example run.
    Raises PlanError for a plan without its graph, and for inputs or modes that it was not made for;
    otherwise whatever a rank raised.
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
            fix="pass the arguments as in example_inputs, or plan with arguments like these",
        )
    # A trace in train mode draws dropout, and has other buffers written, than one in eval mode.
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
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if captured.surroundings != Surroundings.now(device):
        raise PlanError(
            "torch is in another state than when it was planned",
            why=f"planned for {captured.surroundings}, and now {Surroundings.now(device)}",
            fix="call it under the same autocast and default dtype, or plan again",
        )
    guards = Guards(model, captured.reads, captured.left)
    if not guards.hold():
        raise PlanError(
            f"the model is not the one that was planned for: {guards.doubtful()}",
            why="its forward reads attributes that have changed since, and the plan's graph has "
            "their old values",
            fix="plan again",
        )
    ranks = thread_ranks(plan.stage_mesh)
    weights = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    storage = {parameter.path: parameter.storage for parameter in plan.held_parameters}
    states = {parameter.path: parameter.state for parameter in plan.held_parameters}

    def work(rank: Ranks) -> _Ran:
        """Run one rank's program, and its backward pass, in a thread of its own."""
        if plan.pipeline is not None:
            program = program_in_turn(captured.graph, plan, rank)
        else:
            program = emit(captured.graph, plan, rank, plan.model)
        leaves = []
        for path in program.parameters:
            whole, layout = weights[path].detach(), storage[path]
            part = take_layout_part(whole, layout, rank.sizes, rank.coordinates).clone()
            for write in captured.settled:
                if write.path == path:
                    write.settle(part)
            leaves.append(part.requires_grad_(weights[path].requires_grad))
        local_inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        held = {path: buffers[path].clone() for path in program.buffers}
        with rng.using(rng.Generator(seed, mode=plan.options.rng)):
            outputs, written = program.run(
                leaves,
                list(held.values()),
                [captured.constants[path] for path in program.constants],
                local_inputs,
                device,
            )
        held.update(zip(program.mutations, written, strict=True))
        if backward:
            returned, _ = captured.together(outputs, local_inputs)
            loss = _loss_of(returned) if backward is True else backward(returned)
            if loss is not None:
                loss.backward()
        gradients = {path: leaf.grad for path, leaf in zip(program.parameters, leaves, strict=True)}
        # The parallel module's hooks do this for DTensors; here there are plain local leaves.
        layouts = dict(zip(program.parameters, program.gradients, strict=True))
        local = {path: grad for path, grad in gradients.items() if grad is not None}
        finished = reduced(
            list(local.values()),
            [layouts[path] for path in local],
            [states[path] for path in local],
            [tuple(weights[path].shape) for path in local],
            rank,
        )
        gradients.update(zip(local, finished, strict=True))
        return _Ran(outputs, gradients, [tensor.grad for tensor in local_inputs], held)

    try:
        results = run_ranks(ranks, work)
    except OtherBranchError:
        if plan.pipeline is not None:
            raise PlanError(
                "a branch on values goes another way than in the example run",
                why="the call would run as Python, and ranks with stages have no whole model",
                fix="simulate inputs that go the way that was planned for, or leave pp out",
            ) from None
        # The parallel module computes such a call as Python.
        return _simulate_parts(model, plan, args, kwargs, backward, seed, replan)
    structure = captured.returned(inputs)
    in_time = int(plan.pipeline is not None)
    outputs = tuple(layout[in_time:] for layout in plan.outputs)
    simulation = _together(results, ranks[0], states, outputs, structure)
    gradients = dict(simulation.gradients)
    # The program knows a tied parameter by its first path; the user may ask by any of them.
    for path, first in captured.aliases.items():
        if first in gradients:
            gradients[path] = gradients[first]
    # Where the forward left tensors in attributes, they are returned beside what it returned.
    output = simulation.output[0] if captured.left else simulation.output
    return replace(simulation, output=output, gradients=gradients)


def _together(
    results: list[_Ran],
    ranks: Ranks,
    layouts: Mapping[str, Layout],
    outputs: tuple[Layout, ...],
    structure: Skeleton,
) -> Simulation:
    """Return what the ranks have in the end, put together.

    results: in the order of the ranks. layouts: of the parameters' gradients, by path. outputs: the
    layouts of the outputs. structure: of what the model returns.
    """
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
    """Simulate a model in parts: each rank is a parallel module in a thread of its own."""

    def refuse(*_: Any) -> Plan:
        """Stand in for a function that plans, where none was passed."""
        raise PlanError(
            "a module is called otherwise than in the example run",
            why="the plan has no program for such a call, and nothing here plans one",
            fix="call autoparallel.simulate, which plans it, or pass replan=",
        )

    # The user's Python, and what shows it whole parameters, use global state such as torch's
    # generators: the ranks run in turn, from one collective to the next.
    ranks = thread_ranks(plan.mesh, in_turn=True)
    tensors, skeleton = flatten((args, dict(kwargs)))
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    around = Surroundings.now(device)
    autocast, usual_device = around.autocast, around.default_device == "cpu"

    def work(rank: Ranks) -> tuple[_Ran, Skeleton, Mapping[str, Layout]]:
        """Make one rank's parallel module, and run a step of it."""
        module = parallel_module(model, plan, rank, None, replan or refuse, 0)
        manual_seed(module, seed)
        # Copies, as each rank has its own, and Python may write to them.
        local_inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        local_args, local_kwargs = rebuild(skeleton, local_inputs)
        # A thread begins without the autocast and the default device that are around this call.
        with (
            torch.autocast(device.type, autocast, enabled=autocast is not None),
            nullcontext() if usual_device else torch.device(around.default_device),
        ):
            output = module(*local_args, **local_kwargs)
        if backward:
            loss = _loss_of(output) if backward is True else backward(output)
            if loss is not None:
                loss.backward()
        outputs, returned = flatten(output)
        named = module.named_parameters(remove_duplicate=False)
        gradients = {path: parameter.grad for path, parameter in named}
        inputs = [tensor.grad for tensor in local_inputs]
        ran = _Ran(outputs, gradients, inputs, dict(module.named_buffers()))
        return ran, returned, state_of(module).layouts

    results = run_ranks(ranks, work)
    first, returned, layouts = results[0]
    # The Python around the parts works on whole values, and returns such.
    outputs = (whole_layout(len(plan.mesh.axes)),) * len(first.outputs)
    return _together([ran for ran, _, _ in results], ranks[0], layouts, outputs, returned)


@dataclass(frozen=True)
class _Ran:
    """The local tensors that one rank has in the end. inputs: the gradients of its inputs."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    inputs: list[torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


class _Joined:
    """Puts the ranks' parts together, and compares those that should be the same.

    sizes: of the mesh axes, outermost first. apart: see Simulation.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes, self.apart = sizes, 0.0

    def maybe(self, parts: list[torch.Tensor | None], layout: Layout) -> torch.Tensor | None:
        """Return the whole of gradients, None where no rank has one.

        A rank without a gradient counts as zero where the others have it unsharded.
        """
        if all(part is None for part in parts):
            return None
        example = next(part for part in parts if part is not None)
        if not any(isinstance(placement, Shard) for placement in layout):
            parts = [torch.zeros_like(example) if part is None else part for part in parts]
        return self.of([part for part in parts if part is not None], layout)

    def of(self, parts: list[torch.Tensor], layout: Layout) -> torch.Tensor:
        """Return the whole tensor of which the ranks hold `parts`, in the order of the ranks."""
        parts = [part.detach() for part in parts]
        places = list(itertools.product(*map(range, self.sizes)))
        # Ranks that differ only on axes where the layout is I or R hold the same part. The first of
        # each such set is what the others are compared with.
        first: dict[tuple[int, ...], torch.Tensor] = {}
        for place, part in zip(places, parts, strict=True):
            alike = tuple(
                rank if isinstance(placement, (Shard, Partial)) else 0
                for rank, placement in zip(place, layout, strict=True)
            )
            self.compare(first.setdefault(alike, part), part)
        return join_layout(parts, layout, self.sizes)

    def compare(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Note the sum of differences of two tensors that should be the same; NaN equals NaN."""
        # In the widest type, so that the difference of two numbers is not rounded away.
        exact = torch.complex128 if one.is_complex() else torch.float64
        away = (other.to(exact) - one.to(exact)).abs().nan_to_num(math.inf)
        same = (other == one) | (other.isnan() & one.isnan())
        self.apart = max(self.apart, float(away.masked_fill(same, 0.0).sum()))
