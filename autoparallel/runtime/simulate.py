"""All ranks of a plan in one process: each a thread, exchanging tensors where they meet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoparallel.errors import PlanError
from autoparallel.graph.capture import bind_inputs
from autoparallel.placement import Partial, Shard
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime import rng
from autoparallel.runtime.collectives import join_parts, sum_together, take_part
from autoparallel.runtime.groups import LocalGroup, thread_groups
from autoparallel.structure import flatten, rebuild

__all__ = ["Simulation", "simulate_plan"]


@dataclass(frozen=True)
class Simulation:
    """output: what the model returns, put together. gradients: by parameter path, whole.

    collectives: kind -> number on rank 0, forward and backward.
    """

    output: Any
    gradients: Mapping[str, torch.Tensor]
    collectives: Mapping[str, int]


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
) -> Simulation:
    """Run `plan` on all its ranks, forward and, if the model returns a loss, backward.

    model: the whole model with real weights. backward: False, True (the scalar output that has a
    gradient) or a function from the rank's local output to its loss.
    Raises PlanError for a plan without its graph; otherwise whatever a rank raised.
    """
    captured = plan.captured
    if captured is None:
        raise PlanError("the plan has no graph", fix="simulate(model, world_size, ...) plans anew")
    bound = bind_inputs(model, args, kwargs)
    inputs, skeleton = flatten(dict(bound.arguments))
    if skeleton != captured.inputs:
        raise PlanError(
            "these inputs are not built as those planned for",
            why=f"{skeleton} against {captured.inputs}",
        )
    groups = thread_groups(plan.world_size)
    weights = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    device = next((p.device for p in weights.values()), torch.device("cpu"))
    results: list[Any] = [None] * plan.world_size
    errors: list[tuple[int, BaseException]] = []
    storage = plan.storage

    def run(group: LocalGroup) -> None:
        try:
            program = emit(captured.graph, plan, group, plan.model)
            leaves = []
            for path in program.parameters:
                whole, placed = weights[path].detach(), storage[path]
                part = whole
                if isinstance(placed, Shard):
                    part = take_part(whole, placed, group.world_size, group.rank)
                leaves.append(part.clone().requires_grad_(weights[path].requires_grad))
            with rng.using(rng.Generator(seed, mode=plan.options.rng)):
                outputs, _ = program.run(
                    leaves,
                    [buffers[path] for path in program.buffers],
                    [captured.constants[path] for path in program.constants],
                    inputs,
                    device,
                )
            if backward:
                local = rebuild(captured.outputs, outputs)
                loss = _loss_of(local) if backward is True else backward(local)
                if loss is not None:
                    loss.backward()
            summed = [
                leaf
                for path, leaf in zip(program.parameters, leaves, strict=True)
                if path in program.deferred and leaf.grad is not None
            ]
            grads = [leaf.grad for leaf in summed if leaf.grad is not None]
            totals = sum_together(grads, group) if grads else []
            for leaf, total in zip(summed, totals, strict=True):
                leaf.grad = total
            gradients = {
                path: leaf.grad for path, leaf in zip(program.parameters, leaves, strict=True)
            }
            results[group.rank] = (outputs, gradients)
        except BaseException as error:
            errors.append((group.rank, error))
            group.abort()

    threads = [threading.Thread(target=run, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        first = [e for e in errors if not isinstance(e[1], threading.BrokenBarrierError)]
        raise (first or errors)[0][1]
    whole = []
    for index, placement in enumerate(plan.outputs):
        parts = [results[rank][0][index] for rank in range(plan.world_size)]
        whole.append(_joined(parts, placement))
    gradients: dict[str, torch.Tensor] = {}
    for path in results[0][1]:
        parts = [results[rank][1][path] for rank in range(plan.world_size)]
        if parts[0] is not None:
            gradients[path] = _joined(parts, storage[path])
    for path, kept in captured.aliases.items():
        if kept in gradients:
            gradients[path] = gradients[kept]
    return Simulation(rebuild(captured.outputs, whole), gradients, dict(groups[0].counts))


def _joined(parts: list[torch.Tensor], placement: Any) -> torch.Tensor:
    if isinstance(placement, Shard):
        return join_parts([part.detach() for part in parts], placement)
    if isinstance(placement, Partial):
        return torch.stack([part.detach() for part in parts]).sum(0)
    return parts[0].detach()
