"""The parallel module: the user's class, its tree and names, with an emitted forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoparallel.errors import InputMismatchError
from autoparallel.graph.capture import Captured, bind_inputs
from autoparallel.graph.graph import Sym
from autoparallel.placement import Invariant, Placement, Shard
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import Program, emit
from autoparallel.runtime import rng
from autoparallel.runtime.agreement import digest, require_same_start
from autoparallel.runtime.collectives import take_part
from autoparallel.runtime.groups import Group
from autoparallel.runtime.parameters import (
    Bundle,
    Leaf,
    as_distributed,
    materialize,
    on_meta,
    shallow_copy,
    whole_tensor,
)
from autoparallel.runtime.seeds import generator_of, give_generator
from autoparallel.structure import Skeleton, flatten, rebuild

__all__ = ["State", "full_state_dict", "parallel_module", "state_of"]

Replan = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Mapping[str, Placement]], Plan]


@dataclass
class _Entry:
    """A program and what its inputs must look like."""

    plan: Plan
    captured: Captured
    program: Program
    leaves: list[Leaf]
    shapes: list[tuple[Any, ...]]


@dataclass
class State:
    """Everything that the parallel module adds to the user's.

    skeleton: the original on the meta device, to trace other modes and inputs. entries: programs
    by (training, structure of the inputs). checks: calls left that compare the ranks' inputs.
    """

    skeleton: nn.Module
    group: Group
    mesh: DeviceMesh | None
    storage: dict[str, Placement]
    replan: Replan
    checks: int
    entries: dict[tuple[bool, Skeleton], list[_Entry]] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The first plan: the one that decided how parameters are stored."""
        return next(iter(self.entries.values()))[0].plan


def state_of(module: nn.Module) -> State:
    """The state of a parallel module. Raises AttributeError for any other module."""
    found: State = module.__dict__["_autoparallel"]
    return found


class _Parallel:
    """Mixed into the user's class: forward runs the emitted program."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, args, kwargs)  # type: ignore[arg-type]

    @property
    def plan(self) -> Plan:
        """The plan that this module follows."""
        return state_of(self).plan  # type: ignore[arg-type]


def parallel_module(
    model: nn.Module,
    plan: Plan,
    group: Group,
    mesh: DeviceMesh | None,
    replan: Replan,
    checks: int,
) -> nn.Module:
    """A module of the user's class whose parameters are split as `plan` says.

    Parameters become DTensors on `mesh` (plain ones for a single rank); the original is not
    changed. A model on the meta device is materialized part by part.
    """
    captured = plan.captured
    assert captured is not None
    skeleton = on_meta(model)
    made = shallow_copy(model)
    kind = type(model)
    made.__class__ = type(f"Parallel{kind.__name__}", (_Parallel, kind), {})
    storage = {path: plan.storage.get(kept, Invariant()) for path, kept in captured.aliases.items()}
    for name, module in model.named_modules():
        for own in module._parameters:
            storage.setdefault(f"{name}.{own}" if name else own, Invariant())
    require_same_start(model, group)
    _fill(model, made, storage, group, mesh)
    state = State(skeleton, group, mesh, storage, replan, checks)
    made.__dict__["_autoparallel"] = state
    give_generator(made, plan.options.rng, group, mesh)
    made.register_load_state_dict_pre_hook(_split_loaded)
    _add(made, state, plan, model.training)
    return made


def _fill(
    model: nn.Module,
    made: nn.Module,
    storage: dict[str, Placement],
    group: Group,
    mesh: DeviceMesh | None,
) -> None:
    """Give the copied tree its own parameters, split, and its own buffers."""
    parts: dict[str, torch.Tensor] = {}
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        parts = materialize(model, storage, group, device)
    twins: dict[int, nn.Parameter] = {}
    originals = dict(model.named_modules(remove_duplicate=False))
    done: set[int] = set()
    for path, module in made.named_modules(remove_duplicate=False):
        if id(module) in done:
            continue
        done.add(id(module))
        prefix = f"{path}." if path else ""
        original = originals[path]
        for name, parameter in original._parameters.items():
            if parameter is None:
                continue
            full = prefix + name
            if id(parameter) not in twins:
                placed = storage[full]
                if full in parts:
                    part = parts[full]
                elif isinstance(placed, Shard):
                    whole = parameter.detach()
                    part = take_part(whole, placed, group.world_size, group.rank).clone()
                else:
                    part = parameter.detach().clone()
                data = part
                if mesh is not None:
                    data = as_distributed(part.contiguous(), placed, tuple(parameter.shape), mesh)
                twins[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
            module._parameters[name] = twins[id(parameter)]
        for name, buffer in original._buffers.items():
            if buffer is not None:
                module._buffers[name] = parts.get(prefix + name, buffer.detach().clone())


def _add(made: nn.Module, state: State, plan: Plan, training: bool) -> _Entry:
    """Emit a plan's program and keep it for calls that it fits."""
    captured = plan.captured
    assert captured is not None
    program = emit(captured.graph, plan, state.group, plan.model)
    bundle = Bundle(state.group)
    leaves = []
    for path in program.parameters:
        owner, _, name = path.rpartition(".")
        holder = made.get_submodule(owner)._parameters
        waits = bundle if path in program.deferred else None
        leaves.append(Leaf(holder, name, path, waits))
    inputs = [node.result for node in captured.graph.nodes if node.kind == "input"]
    entry = _Entry(
        plan,
        captured,
        program,
        leaves,
        [value.shape for value in inputs],
    )
    state.entries.setdefault((training, captured.inputs), []).append(entry)
    return entry


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    state = state_of(module)
    bound = bind_inputs(state.skeleton, args, kwargs)
    inputs, skeleton = flatten(dict(bound.arguments))
    if state.checks > 0 and state.group.world_size > 1:
        state.checks -= 1
        _require_equal(inputs, list(bound.arguments), state)
    entry = None
    for candidate in state.entries.get((module.training, skeleton), ()):
        if candidate.captured.fits(inputs):
            entry = candidate
            break
    if entry is None:
        state.skeleton.train(module.training)
        plan = state.replan(state.skeleton, args, kwargs, state.storage)
        entry = _add(module, state, plan, module.training)
    program = entry.program
    parameters = [leaf.get() for leaf in entry.leaves]
    buffers = [module.get_buffer(path) for path in program.buffers]
    device = parameters[0].device if parameters else torch.device("cpu")
    constants = [entry.captured.constants[path].to(device) for path in program.constants]
    with rng.using(generator_of(module)):
        outputs, written = program.run(parameters, buffers, constants, inputs, device)
    for path, value in zip(program.mutations, written, strict=True):
        module.get_buffer(path).copy_(value.detach())
    returned = [
        _returned(output, placement, shape, inputs, entry, state)
        for output, (placement, shape) in zip(outputs, program.outputs, strict=True)
    ]
    return rebuild(entry.captured.outputs, returned)


def _returned(
    output: torch.Tensor,
    placement: Placement,
    shape: tuple[Any, ...],
    inputs: list[torch.Tensor],
    entry: _Entry,
    state: State,
) -> torch.Tensor:
    """What the user gets: the tensor, or a DTensor where it stays split."""
    if not isinstance(placement, Shard) or state.mesh is None:
        return output
    known: dict[Any, int] = {}
    for tensor, sizes in zip(inputs, entry.shapes, strict=True):
        for actual, size in zip(tensor.shape, sizes, strict=True):
            if isinstance(size, Sym) and size.expr.is_Symbol:
                known[size.expr] = actual
    whole = tuple(int(s.expr.subs(known)) if isinstance(s, Sym) else s for s in shape)
    return as_distributed(output, placement, whole, state.mesh)


def _require_equal(inputs: list[torch.Tensor], names: list[str], state: State) -> None:
    """Compare cheap sums of all inputs between the ranks.

    Raises InputMismatchError, on every rank, naming the inputs that differ.
    """
    if not inputs:
        return
    sums = torch.stack([digest(tensor) for tensor in inputs])
    rows = state.group.all_gather(sums.contiguous())
    same = (rows == rows[0]) | (rows.isnan() & rows[0].isnan())
    different = ~same.all(-1).all(0)
    if bool(different.any()):
        which = [index for index, bad in enumerate(different.tolist()) if bad]
        shown = ", ".join(names[i] if len(names) == len(inputs) else f"input {i}" for i in which)
        raise InputMismatchError(
            f"the ranks were given different inputs: {shown}",
            where=f"rank {state.group.rank}, call of {type(state.skeleton).__name__}",
            why="all ranks of a tensor-parallel group work on one batch; the plan says that "
            "inputs are equal",
            fix="give every rank the same batch (seed the sampler alike), or switch the check "
            "off with check_inputs=0 where differences are meant",
        )


def _split_loaded(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Let load_state_dict take whole tensors: each rank keeps its part of them."""
    state = state_of(module)
    if state.mesh is None:
        return
    for path, placement in state.storage.items():
        value = state_dict.get(path)
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            part = value
            if isinstance(placement, Shard):
                part = take_part(value, placement, state.group.world_size, state.group.rank)
            state_dict[path] = as_distributed(
                part.contiguous(), placement, tuple(value.shape), state.mesh
            )


def full_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole model's state under the original names, on every rank. A collective call."""
    state = state_of(module)
    found: dict[str, torch.Tensor] = {}
    for path, value in module.state_dict().items():
        placement = state.storage.get(path)
        found[path] = value if placement is None else whole_tensor(value, placement, state.group)
    return found
