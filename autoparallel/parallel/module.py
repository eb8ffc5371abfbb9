"""The parallel module: the user's class, its tree and names, with an emitted forward.

A call looks for the program that was emitted for its modes and inputs, plans and emits one where
there is none yet, and runs the user's own forward where none can be made.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.capture.branch_ways import Ways
from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.errors import AliasError, AutoParallelError, CaptureError, PlanError
from autoparallel.graph.captured import Modes, modes_of
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.parallel.call_headers import CallHeaders
from autoparallel.parallel.compiled_calls import CompiledCalls, refuse_full_graph
from autoparallel.parallel.copies import (
    deep_copy,
    refuse_pickling,
    saved_whole,
    whole_module,
)
from autoparallel.parallel.fill_tree import fill_tree, gathered_copies
from autoparallel.parallel.functional_parameters import (
    cut_for_call,
    refuse_export,
    refuse_transforms,
)
from autoparallel.parallel.inner_hooks import InnerHooks
from autoparallel.parallel.local_inputs import LocalInputs
from autoparallel.parallel.module_calls import add_entry, run_program
from autoparallel.parallel.module_programs import program_text
from autoparallel.parallel.module_state import (
    Entry,
    Replan,
    State,
    Tree,
    state_of,
    user_forward,
)
from autoparallel.parallel.optimizer_steps import note_originals
from autoparallel.parallel.parameters import (
    ParameterLayouts,
)
from autoparallel.parallel.pipeline_call import loss_alone
from autoparallel.parallel.pipeline_place import PipelinePlace
from autoparallel.parallel.pipelined_parameters import note_stages
from autoparallel.parallel.rank_agreement import (
    require_equal,
    require_same_plan,
    require_same_start,
)
from autoparallel.parallel.refused_wrappers import RefusedWrappers
from autoparallel.parallel.restructure import restructure
from autoparallel.parallel.seeds import give_generator
from autoparallel.parallel.skeletons import attributes_of, own_forward, traceable
from autoparallel.parallel.split_classes import class_of_classes
from autoparallel.parallel.state_dicts import split_loaded
from autoparallel.parallel.tree_shape import TreeShape
from autoparallel.parallel.uncaptured_python import WholeParameters, common_numbers, held_by
from autoparallel.plan import Plan
from autoparallel.rewrite.stages import cut_plan, holders_of
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.value_branches import OtherBranchError
from autoparallel.support.memory_writes import paused
from autoparallel.support.module_copy import on_meta, shallow_copy
from autoparallel.support.module_paths import join_path
from autoparallel.support.pytree import flatten
from autoparallel.support.torch_private import (
    forward_gradients_are_on,
    in_function_transform,
    saved_tensors_hooks_are_set,
    without_function_overrides,
)

__all__ = ["parallel_module"]

_log = logging.getLogger(__name__)

# The most programs of one module. A constant argument that Python computes anew for every call
# would have a program made for each of them.
_MOST_PROGRAMS = 16
# The number in headers of calls that run as Python; -1 is that of a program that is yet to be made.
_AS_PYTHON = -2


class _Forward:
    """The attribute `forward` of a parallel module: its program, or what the user has put there.

    A function that is assigned to it runs as Python on whole parameters, and may call the forward
    that was there before. It lies where such an attribute of a plain module does, so that programs
    of the modules around notice it. function: the one that runs programs.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, module: Any, kind: Any = None) -> Any:
        if module is None:
            return self.function
        if "forward" not in vars(module):
            return types.MethodType(self.function, module)
        return functools.partial(_run_replaced, module, vars(module)["forward"])

    def __set__(self, module: Any, forward: Any) -> None:
        own = isinstance(forward, types.MethodType) and forward.__func__ is self.function
        if own and forward.__self__ is module:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = forward

    def __delete__(self, module: Any) -> None:
        if "forward" not in vars(module):
            raise AttributeError("forward")
        del vars(module)["forward"]


def _run_replaced(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a forward that the user has put in the place of the module's, as Python."""
    return _run_python(module, state_of(module), args, kwargs, forward)


class _Parallel(CompiledCalls, RefusedWrappers):
    """Mixed into the user's class; its forward, which `_class_of` adds, runs emitted programs."""

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
    local: LocalInputs | None = None,
    pipeline: tuple[Any, int] | None = None,
) -> nn.Module:
    """Return a module of the user's class, for this rank, that follows `plan`.

    model: the user's, which is not changed; one on the meta device is materialized part by part.
    ranks: this rank's place on the plan's mesh. mesh: the DeviceMesh on which parameters become
    DTensors; None for a single process, where they stay plain. replan: a function that plans for
    other modes and inputs than the plan's. checks: number of first calls in which the ranks compare
    their inputs. local: the inputs of which ranks bring parts of the batch, None where all bring
    the whole. pipeline: torch's process group of the ranks that are alike in all but their stage,
    and the number of this rank's; None without stages. ranks and mesh are then those of the stage,
    and parameters of other stages have no memory here. Where the plan has parts, each of them
    becomes such a module in its place.
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
    planned = {choice.path: choice for choice in plan.held_parameters}
    parameters: dict[str, ParameterLayouts] = {}
    for path, parameter in named:
        choice = planned.get(first.setdefault(id(parameter), path))
        parameters[path] = ParameterLayouts.of(choice, tuple(parameter.shape), ranks.sizes)
    place = None
    if pipeline is not None:
        assert plan.captured is not None
        stages = cut_plan(plan.captured.graph, plan)
        assert plan.pipeline is not None
        holders = holders_of(stages, plan.pipeline)
        by_path = {path: holders.get(first[id(parameter)]) for path, parameter in named}
        place = PipelinePlace(*pipeline, {p: some for p, some in by_path.items() if some})
    absent = [path for path, _ in named if place is not None and not place.holds(path)]
    states = {path: each.state for path, each in parameters.items()}
    fill_tree(model, module, states, ranks, mesh, absent)
    copies = gathered_copies(module, parameters)
    overlap = plan.options.overlap
    whole = WholeParameters(module, parameters, ranks, first, copies, overlap)
    give_generator(module, plan.options.rng, ranks, mesh)
    strict = plan.options.strict_capture
    held = dict(module.named_parameters(remove_duplicate=False))
    shape = TreeShape(module.modules())
    tree = Tree(module, skeleton, ranks, mesh, replan, strict, whole, copies, held, shape, local)
    tree.pipeline = place
    if place is not None:
        note_stages(module, place)
    state = _become(module, "", tree, skeleton, parameters, plan)
    state.checks = checks
    if checks > 0:
        tree.headers = CallHeaders(ranks.world, type(model).__name__, checks)
    if plan.captured is not None:
        add_entry(module, state, plan)
    _open(module, state)
    for graph_break in plan.breaks:
        inner = module.get_submodule(graph_break.path)
        state_of(inner).python.add(modes_of(inner))
    for part in plan.parts:
        for path in part.paths:
            inner = module.get_submodule(path)
            state_of(inner).plan = part.plan
            add_entry(inner, state_of(inner), part.plan)
    tree.attributes = attributes_of(module)
    note_originals(model, module)
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
    own_forward = module.__dict__.pop("forward", None)
    kind: Any = type(module)
    forward = user_forward(module, kind, own_forward)
    key = (kind, "" if path else "Parallel")
    if key not in tree.classes:
        tree.classes[key] = _class_of(*key, stages=tree.pipeline is not None and not path)
    module.__class__ = tree.classes[key]
    load_hook = module.register_load_state_dict_pre_hook(split_loaded)
    state = State(path, tree, skeleton, parameters, 0, forward, own_forward, load_hook, plan)
    module.__dict__["_autoparallel"] = state
    return state


def _class_of(kind: Any, prefix: str, stages: bool = False) -> type[nn.Module]:
    """Return the class of parallel modules of the user's class, a child of it.

    prefix: of its name. The modules inside of a model are called as the user calls them: libraries
    tell their kinds by the names of classes, and the printed model is read. stages: it is cut into
    stages; it then has a method `step`, unless the user's class has one.

    Its forward has the signature and the documentation of the user's, by which others find out what
    to call it with: Hugging Face's Trainer drops the columns of a dataset that it does not name.
    """

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, args, kwargs)

    # Registries that know classes by where they are defined, as Hugging Face's do, know
    # the subclass, too.
    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "forward": _Forward(forward),
        **saved_whole(kind, whole_module),
    }
    if stages and not hasattr(kind, "step"):
        body["step"] = _step
    meta = class_of_classes(type(kind))
    parallel: type[nn.Module] = meta(f"{prefix}{kind.__name__}", (_Parallel, kind), body)
    return parallel


def _step(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run a forward and a backward pass, and return the loss, the same on all ranks.

    args, kwargs: of a call of the model. It does what a call and `loss.backward()` do, where the
    loss is the first scalar with a gradient that the model returns. What else it returns stays on
    the ranks of the last stage, which saves sending logits to all others.
    Raises AutoParallelError for a model that returns no loss.

    Example: `loss = model.step(input_ids=tokens, labels=labels)`, then `optimizer.step()`.
    """
    with loss_alone():
        tensors, _ = flatten(self(*args, **kwargs))
    losses = [each for each in tensors if not each.shape and each.requires_grad]
    if not losses:
        raise AutoParallelError(
            f"{type(self).__name__}.step() of a model that returns no loss",
            why="the backward pass begins at the first scalar with a gradient, and there is none",
            fix="return the loss from forward, as with labels=...; or call the model, compute the "
            "loss of what it returns, and call loss.backward()",
        )
    losses[0].backward()
    return losses[0].detach()


def _open(root: nn.Module, state: State) -> None:
    """Make split modules of all modules in the tree that have parameters and a forward.

    They have no program yet. One is planned for when such a module is called: by the user, who may
    call any part of the model, or by the forward of a module that runs as Python.
    """
    for path, module in root.named_modules():
        if "_autoparallel" in vars(module):
            continue
        forward = type(module).forward
        inner_paths = [
            join_path(below, name)
            for below, inner in module.named_modules(remove_duplicate=False)
            for name, parameter in held_by(inner).items()
            if parameter is not None
        ]
        # Containers such as ModuleList have no forward; what is in them is met by itself. A class
        # that was compiled into torch takes no Python in place of its forward.
        compiled = isinstance(module, torch.jit.ScriptModule)
        if not inner_paths or forward is nn.Module.forward or compiled:
            continue
        parameters = {inner: state.parameters[f"{path}.{inner}"] for inner in inner_paths}
        _become(module, path, state.tree, state.skeleton.get_submodule(path), parameters, None)


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the program that fits the call, or the user's Python where there is none."""
    state = state_of(module)
    local = state.tree.local
    # Only what the user calls is given local batches: what Python calls within has whole ones.
    if local is not None and not state.tree.depth and not state.path:
        args, kwargs = local.gather(signature(state.skeleton.forward), args, kwargs, state.ranks)
    if state.tree.lent:
        state.tree.refuse_written()
    if not state.tree.depth:
        refuse_export(state)
        if state.tree.shape.changed():
            refuse_transforms(state)
            with cut_for_call(state):
                return _run_planned(module, _restructured(module, state), args, kwargs)
    return _run_planned(module, state, args, kwargs)


def _run_planned(
    module: nn.Module, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run a call of a module whose modules and parameters are known; see `_run`."""
    if state.hooks is None:
        state.members = tuple(module.modules())
        state.hooks = InnerHooks(state.members, tuple(state.skeleton.modules()))
    # A program is traced in certain modes of all modules in it: with one layer frozen in eval mode,
    # it is another program.
    modes = tuple([inner.training for inner in state.members])
    if state.hooks.changed():
        # A program runs no hooks of the modules in it but those that it was traced with.
        if not state.warned:
            state.warned = True
            _log.warning(
                "%s runs as Python: hooks were registered in it", state.path or "the model"
            )
        _compared(state, modes, args, kwargs)
    elif not torch.compiler.is_compiling() and (
        forward_gradients_are_on() or in_function_transform()
    ):
        _log.info("%s runs as Python: programs have no other derivatives", state.path)
        _compared(state, modes, args, kwargs)
    # Where Python is all there is, and the ranks compare nothing, nothing is looked for.
    elif (
        (state.tree.headers is not None and not state.tree.depth)
        or state.entries
        or modes not in state.python
    ):
        if not state.tree.depth:
            entry, inputs = _prepared(module, state, modes, args, kwargs)
            if entry is not None:
                try:
                    return run_program(module, state, entry, inputs, args, kwargs)
                except OtherBranchError as other:
                    _note_branch(state, entry, other)
        else:
            # The user's Python has called this part. It may have written to parameters, which the
            # program must see; what the program itself writes is not the user's.
            state.tree.whole.settle()
            with paused():
                entry, inputs = _prepared(module, state, modes, args, kwargs)
                if entry is not None:
                    try:
                        return run_program(module, state, entry, inputs, args, kwargs)
                    except OtherBranchError as other:
                        _note_branch(state, entry, other)
    return _run_python(module, state, args, kwargs)


def _note_branch(state: State, entry: Entry, other: OtherBranchError) -> None:
    """Tell, once for each program, that a call is computed as Python after all, and why."""
    if entry.told:
        return
    entry.told = True
    check = next(
        node
        for node in entry.captured.graph.calls
        if node.target == BRANCH_TAKEN and node.args[2] == other.number
    )
    _log.warning(
        "%s is computed as Python where a branch on values goes another way than in the example "
        "(%s)", state.path or "the model", check.line or check.where,
    )  # fmt: skip


def _restructured(module: nn.Module, state: State) -> State:
    """Take up other modules and parameters that the model has now; return the module's state."""
    tree = state.tree
    restructure(tree)
    traceable(tree)  # a call is bound to the signature of the module that there is now
    _open(tree.root, state_of(tree.root))
    if "_autoparallel" not in vars(module):  # it has no parameters now
        _become(module, state.path, tree, tree.skeleton.get_submodule(state.path), {}, None)
    return state_of(module)


def _prepared(
    module: nn.Module,
    state: State,
    modes: Modes,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Entry | None, list[torch.Tensor]]:
    """Return the program for a call, None where Python must run, and the tensors it is given.

    The ranks compare how they were called, and in the first calls all numbers of their inputs.
    Raises InputMismatchError where they differ.
    """
    bound = bind_inputs(state.skeleton, args, kwargs)
    inputs, skeleton = flatten(dict(bound.arguments))
    surroundings = state.tree.surroundings()
    number = -1
    with without_function_overrides():
        candidates = state.entries.get((modes, skeleton), ())
        for index, candidate in enumerate(candidates):
            if candidate.takes(skeleton) and candidate.fits(inputs, surroundings):
                number = index
                break
    names = list(bound.arguments)
    headers = None if state.tree.depth else state.tree.headers
    if headers is not None:
        parameters = state.tree.shape.parameters
        with without_function_overrides():
            headers.compare(modes, inputs, skeleton, parameters, number, names)
    if state.checks > 0 and state.ranks.world_size > 1:
        state.checks -= 1
        require_equal(inputs, names, state.ranks.world, type(state.skeleton).__name__)
    if number >= 0:
        return candidates[number], inputs
    return _new_entry(module, state, modes, args, kwargs), inputs


def _compared(state: State, modes: Modes, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare how the ranks were called, in a call that runs as Python on this one.

    Others may have no hooks, and run a program. Raises InputMismatchError, on all of them.
    """
    headers = None if state.tree.depth else state.tree.headers
    if headers is not None:
        bound = bind_inputs(state.skeleton, args, kwargs)
        inputs, skeleton = flatten(dict(bound.arguments))
        parameters = state.tree.shape.parameters
        with without_function_overrides():
            headers.compare(modes, inputs, skeleton, parameters, _AS_PYTHON, list(bound.arguments))


def _new_entry(
    module: nn.Module,
    state: State,
    modes: Modes,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Entry | None:
    """Return a program that is made now for a call; None where Python must run.

    Raises CaptureError and PlanError under strict_capture, and AliasError always: what keeps a view
    of a parameter would be wrong as Python, too.
    """
    if state.full or modes in state.python:
        return None
    # What is traced is the skeleton, in the modes of the module.
    root = traceable(state.tree)
    for path, inner in root.get_submodule(state.path).named_modules():
        inner.training = module.get_submodule(path).training
    part = state.path != "" or state.tree.depth > 0
    try:
        with own_forward(root.get_submodule(state.path), module), _own_saved_tensors():
            ways = _known_ways(state)
            plan = state.tree.replan(root, state.path, args, kwargs, state.storage, part, ways)
    except (CaptureError, PlanError) as error:
        if state.tree.strict or isinstance(error, AliasError) or state.tree.pipeline is not None:
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
    entry = add_entry(module, state, plan)
    if not entry.guards.hold():
        _log.warning(
            "%s runs as plain Python from now on: what its forward reads of %s is another object "
            "at every look", state.path or "the model", entry.guards.doubtful(),
        )  # fmt: skip
        state.entries[plan.captured.modes, plan.captured.inputs].pop()  # type: ignore[union-attr]
        state.python.add(modes)
        return None
    return entry


def _known_ways(state: State) -> Ways:
    """Return the ways that the module's programs go where it branches on values."""
    ways: dict[Any, tuple[Any, ...]] = {}
    for several in state.entries.values():
        for entry in several:
            for line, answers in entry.captured.ways.items():
                ways.setdefault(line, answers)
    return ways


def _own_saved_tensors() -> Any:
    """Return a context in which hooks on what autograd saves see nothing.

    A checkpoint counts what is saved in its first pass. Planning, which tries the model out, falls
    into that pass alone.
    """
    if not saved_tensors_hooks_are_set():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def _run_python(
    module: nn.Module,
    state: State,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    forward: Any = None,
) -> Any:
    """Run the user's own forward, on whole parameters; what it calls is split where it can be.

    forward: another function to run in its place.
    """
    forward = forward or state.forward
    tree = state.tree
    if tree.pipeline is not None:
        raise AutoParallelError(
            f"{state.path or type(state.skeleton).__name__} would run as Python, on a mesh with "
            "stages",
            why="no program is right for this call: hooks were registered in the model, a branch "
            "on values goes another way, its forward was replaced, or torch.func transforms it; "
            "and this rank has the parameters of its own stage alone",
            fix="call it as it was planned for, or leave pp out of the mesh",
        )
    # A forward that another one calls finds the parameters shown and the numbers seeded.
    if tree.depth:
        return forward(*args, **kwargs)
    refuse_full_graph(state.path or type(state.skeleton).__name__)
    tree.depth += 1
    try:
        # Where nothing is split, numbers are drawn as a transform of torch.func wants them.
        common = (
            contextlib.nullcontext()
            if in_function_transform()
            else common_numbers(state.generator, state.ranks.world)
        )
        with tree.whole.shown(), common:
            result = forward(*args, **kwargs)
    finally:
        tree.depth -= 1
    if tree.headers is not None:
        with without_function_overrides():
            tree.headers.compare_results(result)
    return result
