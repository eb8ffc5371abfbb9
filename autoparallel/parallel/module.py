"""The parallel module: the user's class, its tree and names, with an emitted forward.

A call looks for the program that was emitted for its modes and inputs, plans and emits one where
there is none yet, and runs the user's own forward where none can be made.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.capture.refused_inputs import refuse_devices
from autoparallel.errors import AliasError, CaptureError, PlanError
from autoparallel.graph.captured import Modes, modes_of
from autoparallel.graph.graph import Sym
from autoparallel.parallel.copies import (
    deep_copy,
    refuse_pickling,
    saved_whole,
    whole_module,
)
from autoparallel.parallel.fill_tree import fill_tree, gathered_copies
from autoparallel.parallel.inner_hooks import InnerHooks
from autoparallel.parallel.module_programs import program_text
from autoparallel.parallel.module_state import Entry, Replan, State, Tree, state_of
from autoparallel.parallel.parameters import (
    GradientBucket,
    LocalParameter,
    ParameterLayouts,
    as_distributed,
    refresh,
)
from autoparallel.parallel.rank_agreement import (
    require_equal,
    require_same_plan,
    require_same_start,
)
from autoparallel.parallel.seeds import give_generator
from autoparallel.parallel.state_dicts import split_loaded
from autoparallel.parallel.uncaptured_python import WholeParameters, common_numbers, held_by
from autoparallel.placement import Layout, Shard
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.memory_writes import paused
from autoparallel.support.module_copy import on_meta, shallow_copy
from autoparallel.support.pytree import Skeleton, flatten

__all__ = ["parallel_module"]

_log = logging.getLogger(__name__)

# The most programs of one module. A constant argument that Python computes anew for every call
# would have a program made for each of them.
_MOST_PROGRAMS = 16


class _Parallel:
    """Mixed into the user's class: forward runs the emitted program."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the user's forward does, and return what it returns."""
        return _run(self, args, kwargs)  # type: ignore[arg-type]

    @property
    def plan(self) -> Plan:
        """The plan that this module follows.

        Raises PlanError for a module inside of the model that has none of its own.
        """
        plan = state_of(self).plan  # type: ignore[arg-type]
        if plan is None:
            raise PlanError(
                f"{type(self).__name__} has no plan of its own",
                why="it is a module of a model that runs as Python, and is planned in the calls "
                "that it gets",
                fix="ask the model for its plan",
            )
        return plan

    @property
    def emitted_program(self) -> str:
        """The Python that this rank runs in the current mode (train or eval).

        A model that is split in parts has a program for each part, under a comment that names it.
        Raises PlanError before the first call in a mode that was not planned for.
        """
        return program_text(self)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a second module that follows the same plan, with parameters of its own."""
        return deep_copy(self, memo)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise AutoParallelError: a rank's share of a model cannot be pickled."""
        refuse_pickling(self)  # type: ignore[arg-type]


def parallel_module(
    model: nn.Module,
    plan: Plan,
    ranks: Ranks,
    mesh: DeviceMesh | None,
    replan: Replan,
    checks: int,
) -> nn.Module:
    """Return a module of the user's class, for this rank, that follows `plan`.

    model: the user's, which is not changed; one on the meta device is materialized part by part.
    ranks: this rank's place on the plan's mesh. mesh: the DeviceMesh on which parameters become
    DTensors; None for a single process, where they stay plain. replan: a function that plans for
    other modes and inputs than the plan's. checks: number of first calls in which the ranks compare
    their inputs. Where the plan has parts, each of them becomes such a module in its place.
    A collective call. Raises AutoParallelError where the ranks start from different models or
    plans, or where a meta model cannot be initialized.
    """
    skeleton = on_meta(model)
    module = shallow_copy(model)
    require_same_plan(plan, ranks.world)
    require_same_start(model, ranks.world)
    named = list(model.named_parameters(remove_duplicate=False))
    # A tied parameter has several paths; the plan knows the first of them.
    first: dict[int, str] = {}
    planned = {choice.path: choice for choice in plan.parameters}
    parameters: dict[str, ParameterLayouts] = {}
    for path, parameter in named:
        choice = planned.get(first.setdefault(id(parameter), path))
        parameters[path] = ParameterLayouts.of(choice, tuple(parameter.shape), ranks.sizes)
    fill_tree(model, module, {path: each.state for path, each in parameters.items()}, ranks, mesh)
    copies = gathered_copies(module, parameters)
    whole = WholeParameters(module, parameters, ranks, first, copies)
    give_generator(module, plan.options.rng, ranks, mesh)
    strict = plan.options.strict_capture
    tree = Tree(module, skeleton, ranks, mesh, replan, strict, whole, copies)
    state = _become(module, "", tree, skeleton, parameters, plan)
    state.checks = checks
    if plan.captured is not None:
        _add(module, state, plan)
    for graph_break in plan.breaks:
        inner = module.get_submodule(graph_break.path)
        broken = state if inner is module else _inner(module, inner, graph_break.path, None)
        broken.python.add(modes_of(inner))
    for part in plan.parts:
        for path in part.paths:
            inner = module.get_submodule(path)
            _add(inner, _inner(module, inner, path, part.plan), part.plan)
    return module


def _become(
    module: nn.Module,
    path: str,
    tree: Tree,
    skeleton: nn.Module,
    parameters: dict[str, ParameterLayouts],
    plan: Plan | None,
) -> State:
    """Make a split module of one in the copied tree, and return its state; it has no program yet.

    path: the module's path in the model. skeleton: the same module on the meta device. parameters:
    the layouts of its parameters, by their paths in it. plan: the one that decided on them, if it
    has a plan of its own.
    """
    # A forward that the user has set on the object, not on the class, hides that of the class.
    forward = module.__dict__.pop("forward", None)
    if forward is None:
        forward = functools.partial(type(module).forward, module)
    kind: Any = type(module)
    # Registries that know classes by where they are defined, as Hugging Face's do, know
    # the subclass, too.
    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        **saved_whole(kind, whole_module),
    }
    module.__class__ = type(f"Parallel{kind.__name__}", (_Parallel, kind), body)
    state = State(path, tree, skeleton, parameters, 0, forward, plan)
    module.__dict__["_autoparallel"] = state
    module.register_load_state_dict_pre_hook(split_loaded)
    return state


def _inner(root: nn.Module, module: nn.Module, path: str, plan: Plan | None) -> State:
    """Make a split module of the one at `path` below `root`, which is one, and return its state."""
    state = state_of(root)
    parameters: dict[str, ParameterLayouts] = {}
    for below, inner in module.named_modules(remove_duplicate=False):
        for name, parameter in held_by(inner).items():
            if parameter is not None:
                inner_path = f"{below}.{name}" if below else name
                parameters[inner_path] = state.parameters[f"{path}.{inner_path}"]
    skeleton = state.skeleton.get_submodule(path)
    full = f"{state.path}.{path}" if state.path else path
    return _become(module, full, state.tree, skeleton, parameters, plan)


def _add(module: nn.Module, state: State, plan: Plan) -> Entry:
    """Emit a plan's program for this rank, and keep it for calls that it fits."""
    captured = plan.captured
    assert captured is not None
    program = emit(captured.graph, plan, state.ranks, plan.model)
    bucket = GradientBucket(state.ranks)
    leaves = []
    for path, gradient in zip(program.parameters, program.gradients, strict=True):
        owner, _, name = path.rpartition(".")
        holder = held_by(module.get_submodule(owner))
        copy = state.tree.copies.get(id(holder[name]))
        leaves.append(
            LocalParameter(holder, name, path, state.parameters[path], gradient, bucket, copy)
        )
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
    """Run the program that fits the call, or the user's Python where there is none."""
    state = state_of(module)
    if state.hooks is None:
        state.members = tuple(module.modules())
        state.hooks = InnerHooks(state.members, tuple(state.skeleton.modules()))
    # A program is traced in certain modes of all modules in it: with one layer frozen in eval mode,
    # it is another program.
    modes = tuple([inner.training for inner in state.members])
    if state.hooks.changed():
        # A program runs no hooks of the modules in it but those that it was traced with.
        if not state.settled:
            _log.warning(
                "%s runs as Python: hooks were registered in it", state.path or "the model"
            )
    # Where Python is all there is, and the ranks have compared their inputs, nothing is looked for.
    elif not (modes in state.python and not state.entries and state.checks <= 0):
        if not state.tree.depth:
            entry, inputs = _prepared(module, state, modes, args, kwargs)
            if entry is not None:
                return _run_program(module, state, entry, inputs, args, kwargs)
        else:
            # The user's Python has called this part. It may have written to parameters, which the
            # program must see; what the program itself writes is not the user's.
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
    """Return the program for a call, None where Python must run, and the tensors it is given.

    In the first calls, the ranks compare their inputs. Raises InputMismatchError where they differ.
    """
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
    """Run a program on the parameters, buffers and inputs as they are now; return its result.

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
    # Devices are looked at only when the program has failed: most calls are right.
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
    # The forward may have left tensors in attributes of modules; they are put there again.
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
    """Return the program that fits a call, made now if there is none; None where Python must run.

    Raises CaptureError and PlanError under strict_capture, and AliasError always: what keeps a view
    of a parameter would be wrong as Python, too.
    """
    for candidate in state.entries.get((modes, skeleton), ()):
        if candidate.fits(inputs):
            return candidate
    if state.full or modes in state.python:
        return None
    # What is traced is the skeleton, in the modes of the module.
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
    """Run the user's own forward, on whole parameters; what it calls is split where it can be."""
    if not state.settled:
        state.settled = True
        _settle(module, module, "")
    tree = state.tree
    # A forward that another one calls finds the parameters shown and the numbers seeded.
    if tree.depth:
        return state.forward(*args, **kwargs)
    tree.depth += 1
    try:
        with tree.whole.shown(), common_numbers(state.generator):
            return state.forward(*args, **kwargs)
    finally:
        tree.depth -= 1


def _settle(root: nn.Module, module: nn.Module, path: str) -> None:
    """Make split modules of the nearest ones below that have parameters and a forward.

    They have no program, and are planned when they are first called. Containers such as ModuleList
    have no forward: those in them are looked at.
    """
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
    """Return what the user gets of an output: the tensor, or a DTensor where it stays split.

    shape: of the whole output, in sizes that this call's inputs give.
    """
    split = any(isinstance(placement, Shard) for placement in layout)
    if not split or state.mesh is None:
        return output
    # A dim of an input whose size is a symbol by itself says what the symbol is in this call.
    actual_sizes: dict[Any, int] = {}
    for tensor, sizes in zip(inputs, entry.shapes, strict=True):
        for actual, size in zip(tensor.shape, sizes, strict=True):
            if isinstance(size, Sym) and size.expr.is_Symbol:
                actual_sizes[size.expr] = actual
    whole = tuple(int(s.expr.subs(actual_sizes)) if isinstance(s, Sym) else s for s in shape)
    return as_distributed(output, layout, whole, state.mesh)
