"""Programs of a parallel module: made of a plan, and run on what the module holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.capture.refused_inputs import refuse_devices
from autoparallel.parallel.compiled_calls import is_compiled, run_compiled
from autoparallel.parallel.guards import Guards
from autoparallel.parallel.module_state import Entry, State
from autoparallel.parallel.parameters import (
    LocalParameter,
    computing_stream,
    refresh,
)
from autoparallel.parallel.pipeline_run import pipeline_program
from autoparallel.parallel.shown_parameters import held_by
from autoparallel.plan import Plan
from autoparallel.rewrite.block_functions import block_functions
from autoparallel.rewrite.emit import Program, emit
from autoparallel.rewrite.program import file_of
from autoparallel.runtime import rng
from autoparallel.runtime.faults import forget_note, note_failure, programs
from autoparallel.runtime.value_branches import OtherBranchError
from autoparallel.support.torch_private import without_function_overrides

__all__ = ["add_entry", "make_entry", "run_program"]

_AS_IT_IS = contextlib.nullcontext()
_CPU = torch.device("cpu")


def add_entry(module: nn.Module, state: State, plan: Plan) -> Entry:
    """Emit a plan's program for this rank, and keep it for calls that it fits."""
    captured = plan.captured
    assert captured is not None
    place = state.tree.pipeline
    if place is not None:
        program = pipeline_program(plan, captured, place, state.ranks)
    else:
        program = emit(captured.graph, plan, state.ranks, plan.model)
    entry = make_entry(module, state, plan, program)
    _ = entry.given  # as it is now
    state.entries.setdefault((captured.modes, captured.inputs), []).append(entry)
    return entry


def make_entry(module: nn.Module, state: State, plan: Plan, program: Program) -> Entry:
    """Return a program with the module's parameters, and with guards on what its trace has read.

    module, state: the parallel module, and its state. plan: the one that the program was emitted
    of, with its graph.
    """
    captured = plan.captured
    assert captured is not None
    bucket = state.tree.whole.bucket
    leaves = []
    for path, gradient in zip(program.parameters, program.gradients, strict=True):
        owner, _, name = path.rpartition(".")
        holder = held_by(module.get_submodule(owner))
        copy = state.tree.copies.get(id(holder[name]))
        leaves.append(
            LocalParameter(holder, name, path, state.parameters[path], gradient, bucket, copy)
        )
    nodes = captured.graph.nodes
    stored = {node.target: node.result for node in nodes if node.kind == "parameter"}
    planned = [(leaf, stored[leaf.path]) for leaf in leaves]
    reads = captured.reads
    if state.path or state.tree.depth:
        # Python that is shown whole parameters has other values in these.
        shown = {(id(inner), name) for inner, name, _, _ in state.tree.whole.references}
        reads = tuple(
            read
            for read in reads
            if (id(module.get_submodule(read.path)), read.place.rpartition(".")[2]) not in shown
        )
    entry = Entry(
        plan,
        captured,
        program,
        leaves,
        [node.result.shape for node in nodes if node.kind == "input"],
        Guards(module, reads, captured.left, state.tree.left, captured.constants.values()),
        [(leaf.owner, leaf.name) for leaf, value in planned if not value.requires_grad],
    )
    programs[file_of(program.source, plan.model, state.ranks)] = entry
    return entry


def run_program(
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
    for write in entry.captured.settled:
        for leaf in entry.leaves:  # a stage of a pipeline has not all of them
            if leaf.path == write.path:
                # It came after an optimizer's step: a copy is gathered anew below.
                write.settle(leaf.held)
    stream = computing_stream()
    with without_function_overrides():
        refresh(entry.parameters.copies, state.ranks)
        parameters = entry.parameters.get(stream)
    buffers = [module.get_buffer(path) for path in program.buffers]
    if program.mutations:
        # What the backward pass keeps of a buffer must not change when it is written to below.
        written_to = set(program.mutations)
        buffers = [
            buffer.clone() if path in written_to else buffer
            for path, buffer in zip(program.buffers, buffers, strict=True)
        ]
    device = parameters[0].device if parameters else _CPU
    constants = [entry.captured.constants[path].to(device) for path in program.constants]
    # Devices are looked at only when the program has failed: most calls are right.
    try:
        with rng.using(state.generator), _without_autocast(entry, device):
            run = _compiled(entry, state, parameters, device) if is_compiled() else program.run
            outputs, written = run(parameters, buffers, constants, inputs, device)
    except OtherBranchError:
        raise  # on all ranks alike, and the call goes on as Python: nothing has failed
    except Exception as error:
        if isinstance(error, RuntimeError):
            arguments = bind_inputs(state.skeleton, args, kwargs).arguments
            refuse_devices(state.skeleton, arguments, device)
        note_failure(error)
        raise
    forget_note()
    for path, value in zip(program.mutations, written, strict=True):
        module.get_buffer(path).copy_(value.detach())
    whole_shapes = entry.whole_shapes(inputs)
    returned = [
        entry.split_outputs.outside(output, layout, shape, state.mesh)
        for output, (layout, _), shape in zip(outputs, program.outputs, whole_shapes, strict=True)
    ]
    for number, path in entry.captured.own:
        owner, _, name = path.rpartition(".")
        holder = module.get_submodule(owner)
        if name in holder._parameters:
            state.tree.lend(path, returned[number], entry)
        else:
            tensors: Any = holder._buffers if name in holder._buffers else vars(holder)
            returned[number] = tensors[name]
    # The forward may have left something in attributes of modules; it is put there again.
    result, left = entry.captured.together(returned, inputs)
    for place, value in zip(entry.captured.left, left, strict=True):
        place.put(module, value)
        if len(place.route) == 1:
            state.tree.left.note(vars(place.owner(module)), place.route[0][1], value)
    for numbers in entry.captured.numbers:
        numbers.put()
    return result


def _compiled(
    entry: Entry, state: State, parameters: list[torch.Tensor], device: torch.device
) -> Callable[..., Any]:
    """Return what runs a program in a call that is compiled, and make its random words ready."""
    program, generator = entry.program, state.generator
    if entry.compiled is None:
        run = block_functions(program, parameters, entry.plan.model, state.ranks)
        entry.compiled = (
            partial(run_compiled, program.run)
            if run is None
            else partial(run, run_compiled, generator.draw_as)
        )
    generator.make_ready(program.draws, device)
    return entry.compiled


def _without_autocast(entry: Entry, device: torch.device) -> Any:
    """Return a context for a program that has the casts of autocast written out."""
    if entry.captured.surroundings.autocast is None:
        return _AS_IT_IS
    return torch.autocast(device.type, enabled=False)
