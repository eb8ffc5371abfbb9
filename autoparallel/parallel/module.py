"""The parallel module: the user's class, its tree and names, with an emitted forward.

A call looks for the program that was emitted for its modes and inputs, plans and emits one where
there is none yet, and runs the user's own forward where none can be made.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.graph.captured import modes_of
from autoparallel.parallel.call_headers import CallHeaders
from autoparallel.parallel.call_programs import (
    compared,
    note_branch,
    prepared,
)
from autoparallel.parallel.compiled_calls import CompiledCalls
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
from autoparallel.parallel.python_calls import (
    Forward,
    run_python,
)
from autoparallel.parallel.rank_agreement import (
    require_same_plan,
    require_same_start,
)
from autoparallel.parallel.refused_wrappers import RefusedWrappers
from autoparallel.parallel.restructure import restructure
from autoparallel.parallel.seeds import give_generator
from autoparallel.parallel.shown_parameters import held_by
from autoparallel.parallel.skeletons import attributes_of, traceable
from autoparallel.parallel.split_classes import class_of_classes
from autoparallel.parallel.state_dicts import split_loaded
from autoparallel.parallel.surrounding_modes import reason_for_python
from autoparallel.parallel.tree_shape import TreeShape
from autoparallel.parallel.uncaptured_python import WholeParameters
from autoparallel.plan import Plan
from autoparallel.rewrite.stages import cut_plan, holders_of
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.value_branches import OtherBranchError
from autoparallel.support.memory_writes import paused
from autoparallel.support.module_copy import on_meta, shallow_copy
from autoparallel.support.module_paths import join_path
from autoparallel.support.pytree import flatten

__all__ = ["parallel_module"]

_log = logging.getLogger(__name__)


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
        "forward": Forward(forward),
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
        state.tree.shape.refuse_classes()
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
        compared(state, modes, args, kwargs)
    elif not torch.compiler.is_compiling() and (reason := reason_for_python(state.tree.within)):
        _log.info("%s runs as Python: %s", state.path or "the model", reason)
        compared(state, modes, args, kwargs)
    # Where Python is all there is, and the ranks compare nothing, nothing is looked for.
    elif (
        (state.tree.headers is not None and not state.tree.depth)
        or state.entries
        or modes not in state.python
    ):
        if not state.tree.depth:
            entry, inputs = prepared(module, state, modes, args, kwargs)
            if entry is not None:
                try:
                    return run_program(module, state, entry, inputs, args, kwargs)
                except OtherBranchError as other:
                    note_branch(state, entry, other)
        else:
            # The user's Python has called this part. It may have written to parameters, which the
            # program must see; what the program itself writes is not the user's.
            state.tree.whole.settle()
            with paused():
                entry, inputs = prepared(module, state, modes, args, kwargs)
                if entry is not None:
                    try:
                        return run_program(module, state, entry, inputs, args, kwargs)
                    except OtherBranchError as other:
                        note_branch(state, entry, other)
    return run_python(module, state, args, kwargs)


def _restructured(module: nn.Module, state: State) -> State:
    """Take up other modules and parameters that the model has now; return the module's state."""
    tree = state.tree
    restructure(tree)
    traceable(tree)  # a call is bound to the signature of the module that there is now
    _open(tree.root, state_of(tree.root))
    if "_autoparallel" not in vars(module):  # it has no parameters now
        _become(module, state.path, tree, tree.skeleton.get_submodule(state.path), {}, None)
    return state_of(module)
