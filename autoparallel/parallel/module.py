"""The parallel module: the user's class, its tree and names, with an emitted forward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.capture.refused_inputs import refuse_devices
from autoparallel.errors import AliasError, CaptureError, PlanError
from autoparallel.graph.captured import Modes, modes_of
from autoparallel.graph.graph import Sym
from autoparallel.parallel.inner_hooks import InnerHooks
from autoparallel.parallel.materialize import materialize
from autoparallel.parallel.module_programs import program_text
from autoparallel.parallel.module_state import Entry, Replan, State, Tree, state_of
from autoparallel.parallel.parameters import (
    GatheredCopy,
    GradientBucket,
    LocalParameter,
    ParameterLayouts,
    as_distributed,
    refresh,
    whole_tensor,
)
from autoparallel.parallel.rank_agreement import (
    require_equal,
    require_same_plan,
    require_same_start,
)
from autoparallel.parallel.seeds import give_generator
from autoparallel.parallel.uncaptured_python import WholeParameters, common_numbers, held_by
from autoparallel.placement import Layout, Shard
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.memory_writes import paused
from autoparallel.support.module_copy import on_meta, redirect, shallow_copy
from autoparallel.support.pytree import Skeleton, flatten

__all__ = ["full_state_dict", "parallel_module"]

_log = logging.getLogger(__name__)

# Programs of one module. Python that computes constants for it would make new ones for ever.
_MOST_PROGRAMS = 16


class _Parallel:
    """Mixed into the user's class: forward runs the emitted program."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, args, kwargs)  # type: ignore[arg-type]

    @property
    def plan(self) -> Plan:
        """The plan that this module follows."""
        found = state_of(self).plan  # type: ignore[arg-type]
        assert found is not None
        return found

    @property
    def emitted_program(self) -> str:
        """The Python that this rank runs in the current mode (train or eval).

        Where the model is split in parts, the program of each part, under a comment that names it.
        Raises PlanError before the first call in a mode that was not planned for.
        """
        return program_text(self)  # type: ignore[arg-type]


def parallel_module(
    model: nn.Module,
    plan: Plan,
    ranks: Ranks,
    mesh: DeviceMesh | None,
    replan: Replan,
    checks: int,
) -> nn.Module:
    """A module of the user's class whose parameters are split as `plan` says.

    Parameters become DTensors on `mesh` (plain ones for a single rank); the original is not
    changed. A model on the meta device is materialized part by part. Where the plan has parts,
    each of them becomes such a module in its place.
    """
    skeleton = on_meta(model)
    made = shallow_copy(model)
    require_same_plan(plan, ranks.world)
    require_same_start(model, ranks.world)
    named = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    planned = {choice.path: choice for choice in plan.parameters}
    kept: dict[str, ParameterLayouts] = {}
    for path, parameter in named:
        choice = planned.get(first.setdefault(id(parameter), path))
        kept[path] = ParameterLayouts.of(choice, tuple(parameter.shape), len(ranks.sizes))
    _fill(model, made, {path: each.state for path, each in kept.items()}, ranks, mesh)
    copies = _copies(made, kept)
    whole = WholeParameters(made, kept, ranks, first, copies)
    give_generator(made, plan.options.rng, ranks, mesh)
    strict = plan.options.strict_capture
    tree = Tree(made, skeleton, ranks, mesh, replan, strict, whole, copies)
    state = _become(made, "", tree, skeleton, kept, plan)
    state.checks = checks
    if plan.captured is not None:
        _add(made, state, plan)
    for item in plan.breaks:
        inner = made.get_submodule(item.path)
        known = state if inner is made else _inner(made, inner, item.path, None)
        known.python.add(modes_of(inner))
    for part in plan.parts:
        for path in part.paths:
            inner = made.get_submodule(path)
            _add(inner, _inner(made, inner, path, part.plan), part.plan)
    return made


def _become(
    module: nn.Module,
    path: str,
    tree: Tree,
    skeleton: nn.Module,
    kept: dict[str, ParameterLayouts],
    plan: Plan | None,
) -> State:
    """Make a split module of one in the copied tree. It has no program yet."""
    own = module.__dict__.pop("forward", None)
    if own is None:
        own = functools.partial(type(module).forward, module)
    kind: Any = type(module)
    # Registries that know classes by where they are defined know it, too.
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(f"Parallel{kind.__name__}", (_Parallel, kind), body)
    state = State(path, tree, skeleton, kept, 0, own, plan)
    module.__dict__["_autoparallel"] = state
    module.register_load_state_dict_pre_hook(_split_loaded)
    return state


def _inner(root: nn.Module, module: nn.Module, path: str, plan: Plan | None) -> State:
    """Make a split module of the one at `path` below `root`."""
    state = state_of(root)
    kept: dict[str, ParameterLayouts] = {}
    for below, inner in module.named_modules(remove_duplicate=False):
        for name, parameter in held_by(inner).items():
            if parameter is not None:
                own = f"{below}.{name}" if below else name
                kept[own] = state.kept[f"{path}.{own}"]
    skeleton = state.skeleton.get_submodule(path)
    full = f"{state.path}.{path}" if state.path else path
    return _become(module, full, state.tree, skeleton, kept, plan)


def _fill(
    model: nn.Module,
    made: nn.Module,
    layouts: Mapping[str, Layout],
    ranks: Ranks,
    mesh: DeviceMesh | None,
) -> None:
    """Give the copied tree its own parameters, split, and its own buffers."""
    parts: dict[str, torch.Tensor] = {}
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        parts = materialize(model, layouts, ranks, device)
    twins: dict[int, nn.Parameter] = {}
    buffers: dict[int, torch.Tensor] = {}
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
                layout = layouts[full]
                part = parts.get(full)
                if part is None:
                    whole = parameter.detach()
                    part = take_layout_part(whole, layout, ranks.sizes, ranks.coordinates).clone()
                data = part
                if mesh is not None:
                    data = as_distributed(part.contiguous(), layout, tuple(parameter.shape), mesh)
                twins[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
            module._parameters[name] = twins[id(parameter)]
        for name, buffer in original._buffers.items():
            if buffer is not None:
                own = parts.get(prefix + name, buffer.detach().clone())
                module._buffers[name] = buffers.setdefault(id(buffer), own)
    redirect(made.modules(), buffers)


def _copies(made: nn.Module, kept: Mapping[str, ParameterLayouts]) -> dict[int, GatheredCopy]:
    """Of parameters of which the ranks keep less than computes: what computes."""
    found: dict[int, GatheredCopy] = {}
    for path, parameter in made.named_parameters():
        if kept[path].state != kept[path].storage:
            owner, _, name = path.rpartition(".")
            holder = held_by(made.get_submodule(owner))
            found[id(parameter)] = GatheredCopy(holder, name, kept[path])
    return found


def _add(made: nn.Module, state: State, plan: Plan) -> Entry:
    """Emit a plan's program and keep it for calls that it fits."""
    captured = plan.captured
    assert captured is not None
    program = emit(captured.graph, plan, state.ranks, plan.model)
    bundle = GradientBucket(state.ranks)
    leaves = []
    for path, gradient in zip(program.parameters, program.gradients, strict=True):
        owner, _, name = path.rpartition(".")
        holder = held_by(made.get_submodule(owner))
        copy = state.tree.copies.get(id(holder[name]))
        leaves.append(LocalParameter(holder, name, path, state.kept[path], gradient, bundle, copy))
    inputs = [node.result for node in captured.graph.nodes if node.kind == "input"]
    entry = Entry(
        plan,
        captured,
        program,
        leaves,
        [value.shape for value in inputs],
    )
    state.entries.setdefault((captured.modes, captured.inputs), []).append(entry)
    return entry


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a program, or Python where there is none."""
    state = state_of(module)
    if state.hooks is None:
        state.members = tuple(module.modules())
        state.hooks = InnerHooks(state.members, tuple(state.skeleton.modules()))
    modes = tuple([inner.training for inner in state.members])
    if state.hooks.changed():
        # A program does not run hooks of what it is of, but for those that it was traced with.
        if not state.settled:
            _log.warning(
                "%s runs as Python: hooks were registered in it", state.path or "the model"
            )
    elif not (modes in state.python and not state.entries and state.checks <= 0):
        if not state.tree.depth:
            entry, inputs = _prepared(module, state, modes, args, kwargs)
            if entry is not None:
                return _run_program(module, state, entry, inputs, args, kwargs)
        else:
            state.tree.whole.settle()
            with paused():
                entry, inputs = _prepared(module, state, modes, args, kwargs)
                if entry is not None:
                    return _run_program(module, state, entry, inputs, args, kwargs)
    return _run_python(module, state, args, kwargs)


def _prepared(
    module: nn.Module,
    state: State,
    modes: Modes,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Entry | None, list[torch.Tensor]]:
    """The program for a call, None where Python must run, and the tensors that it is given."""
    bound = bind_inputs(state.skeleton, args, kwargs)
    inputs, skeleton = flatten(dict(bound.arguments))
    if state.checks > 0 and state.ranks.world_size > 1:
        state.checks -= 1
        name = type(state.skeleton).__name__
        require_equal(inputs, list(bound.arguments), state.ranks.world, name)
    return _entry(module, state, modes, inputs, skeleton, args, kwargs), inputs


def _run_program(
    module: nn.Module,
    state: State,
    entry: Entry,
    inputs: list[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a program on the parameters, buffers and inputs as they are now.

    inputs: the tensors among args and kwargs. Raises InputMismatchError for a call whose inputs are
    on another device than the parameters.
    """
    program = entry.program
    copies = [leaf.copy for leaf in entry.leaves if leaf.copy is not None]
    refresh(copies, state.ranks)
    parameters = [leaf.get() for leaf in entry.leaves]
    buffers = [module.get_buffer(path) for path in program.buffers]
    if program.mutations:
        # What the backward pass keeps of a buffer must not change when it is written to below.
        written_to = set(program.mutations)
        buffers = [
            buffer.clone() if path in written_to else buffer
            for path, buffer in zip(program.buffers, buffers, strict=True)
        ]
    device = parameters[0].device if parameters else torch.device("cpu")
    constants = [entry.captured.constants[path].to(device) for path in program.constants]
    try:
        with rng.using(state.generator):
            outputs, written = program.run(parameters, buffers, constants, inputs, device)
    except RuntimeError:
        refuse_devices(state.skeleton, bind_inputs(state.skeleton, args, kwargs).arguments, device)
        raise
    for path, value in zip(program.mutations, written, strict=True):
        module.get_buffer(path).copy_(value.detach())
    returned = [
        _returned(output, layout, shape, inputs, entry, state)
        for output, (layout, shape) in zip(outputs, program.outputs, strict=True)
    ]
    result, left = entry.captured.together(returned)
    for path, value in left.items():
        owner, _, name = path.rpartition(".")
        vars(module.get_submodule(owner))[name] = value
    return result


def _entry(
    module: nn.Module,
    state: State,
    modes: Modes,
    inputs: list[torch.Tensor],
    skeleton: Skeleton,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Entry | None:
    """The program that fits a call, made now if there is none yet; None where Python must run."""
    for candidate in state.entries.get((modes, skeleton), ()):
        if candidate.fits(inputs):
            return candidate
    if state.full or modes in state.python:
        return None
    for path, inner in state.skeleton.named_modules():
        inner.training = module.get_submodule(path).training
    part = state.path != "" or state.tree.depth > 0
    try:
        root = state.tree.skeleton
        plan = state.tree.replan(root, state.path, args, kwargs, state.storage, part)
    except (CaptureError, PlanError) as error:
        if state.tree.strict or isinstance(error, AliasError):
            raise
        _log.warning("%s runs as plain Python from now on: %s", state.path or "the model", error)
        state.python.add(modes)
        return None
    if sum(map(len, state.entries.values())) >= _MOST_PROGRAMS:
        _log.warning(
            "%s was called in %d ways and runs as plain Python from now on, where it is called in "
            "others", state.path or "the model", _MOST_PROGRAMS,
        )  # fmt: skip
        state.full = True
        return None
    require_same_plan(plan, state.ranks.world)
    return _add(module, state, plan)


def _run_python(
    module: nn.Module, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The user's own forward, on whole values; what it calls is split where it can be."""
    if not state.settled:
        state.settled = True
        _settle(module, module, "")
    tree = state.tree
    if tree.depth:
        return state.own(*args, **kwargs)
    tree.depth += 1
    try:
        with tree.whole.shown(), common_numbers(state.generator):
            return state.own(*args, **kwargs)
    finally:
        tree.depth -= 1


def _settle(root: nn.Module, module: nn.Module, path: str) -> None:
    """The nearest modules below that have parameters and a forward are split when first called."""
    for name, child in module._modules.items():
        if child is None or "_autoparallel" in child.__dict__:
            continue
        below = f"{path}.{name}" if path else name
        if type(child).forward is nn.Module.forward:
            _settle(root, child, below)
        elif any(held_by(inner) for inner in child.modules()):
            _inner(root, child, below, None)


def _returned(
    output: torch.Tensor,
    layout: Layout,
    shape: tuple[Any, ...],
    inputs: list[torch.Tensor],
    entry: Entry,
    state: State,
) -> torch.Tensor:
    """What the user gets: the tensor, or a DTensor where it stays split."""
    split = any(isinstance(placement, Shard) for placement in layout)
    if not split or state.mesh is None:
        return output
    known: dict[Any, int] = {}
    for tensor, sizes in zip(inputs, entry.shapes, strict=True):
        for actual, size in zip(tensor.shape, sizes, strict=True):
            if isinstance(size, Sym) and size.expr.is_Symbol:
                known[size.expr] = actual
    whole = tuple(int(s.expr.subs(known)) if isinstance(s, Sym) else s for s in shape)
    return as_distributed(output, layout, whole, state.mesh)


def _split_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let load_state_dict take whole tensors: each rank keeps its part of them."""
    state = state_of(module)
    if state.mesh is None or state.tree.depth:  # the user's Python sees whole parameters
        return
    sizes, coordinates = state.ranks.sizes, state.ranks.coordinates
    for own, layout in state.layouts.items():
        path = prefix + own
        value = state_dict.get(path)
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            part = take_layout_part(value, layout, sizes, coordinates).contiguous()
            state_dict[path] = as_distributed(part, layout, tuple(value.shape), state.mesh)


def full_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole model's state under the original names, on every rank. A collective call."""
    state = state_of(module)
    found: dict[str, torch.Tensor] = {}
    for path, value in module.state_dict().items():
        layout = state.layouts.get(path)
        found[path] = value if layout is None else whole_tensor(value, layout, state.ranks)
    return found
