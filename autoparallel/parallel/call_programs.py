"""The program for a call: one that was emitted for its modes and inputs, or one made now."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.capture.branch_ways import Ways
from autoparallel.errors import AliasError, CaptureError, PlanError
from autoparallel.graph.captured import Modes
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.parallel.module_calls import add_entry
from autoparallel.parallel.module_state import (
    Entry,
    State,
)
from autoparallel.parallel.rank_agreement import (
    require_equal,
    require_same_plan,
)
from autoparallel.parallel.skeletons import own_forward, traceable
from autoparallel.runtime.value_branches import OtherBranchError
from autoparallel.support.torch_private import (
    saved_tensors_hooks_are_set,
    without_function_overrides,
)

__all__ = [
    "compared",
    "note_branch",
    "prepared",
]


_log = logging.getLogger(__name__)

# The most programs of one module. A constant argument that Python computes anew for every call
# would have a program made for each of them.
_MOST_PROGRAMS = 16


# The number in headers of calls that run as Python; -1 is that of a program that is yet to be made.
_AS_PYTHON = -2


def note_branch(state: State, entry: Entry, other: OtherBranchError) -> None:
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


def prepared(
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
    names, inputs, skeleton = state.calls.flattened(state.skeleton, args, kwargs)
    number = -1
    with without_function_overrides():
        surroundings = state.tree.surroundings()
        candidates = state.entries.get((modes, skeleton), ())
        for index, candidate in enumerate(candidates):
            if candidate.takes(skeleton) and candidate.fits(inputs, surroundings):
                number = index
                break
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


def compared(state: State, modes: Modes, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare how the ranks were called, in a call that runs as Python on this one.

    Others may have no hooks, and run a program. Raises InputMismatchError, on all of them.
    """
    headers = None if state.tree.depth else state.tree.headers
    if headers is not None:
        names, inputs, skeleton = state.calls.flattened(state.skeleton, args, kwargs)
        parameters = state.tree.shape.parameters
        with without_function_overrides():
            headers.compare(modes, inputs, skeleton, parameters, _AS_PYTHON, names)


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
